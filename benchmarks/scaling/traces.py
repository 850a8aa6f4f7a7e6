"""Requests over time: synthetic ones, and those of a file as the Azure LLM inference trace has it.

Lengths are in tokens; nothing here knows how long an engine takes for them.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Of the file, in this order; others may follow."""

DAY_S = 86_400.0
_MEAN_CONTEXT = 1_000
_MEAN_GENERATED = 300
_SPREAD = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of their arrival.

    Attributes:
        arrival_s: From the trace's beginning, which is 0.
        context: Prompt tokens of each.
        generated: Output tokens of each.
        end_s: When the trace ends; nothing arrives later.
    """

    name: str
    arrival_s: np.ndarray
    context: np.ndarray
    generated: np.ndarray
    end_s: float


def make_trace(
    name: str,
    requests_per_s: Callable[[np.ndarray], np.ndarray],
    end_s: float,
    rng: np.random.Generator,
    *,
    is_even: bool = False,
) -> Trace:
    """Draw requests whose rate changes over time, with lengths as chats have them.

    Args:
        requests_per_s: Of an array of seconds.
        is_even: Requests come at equal distances and are all alike, so that only the policy is
            left to move; else they come by chance (a Poisson process).
    """
    seconds = np.arange(int(end_s), dtype=float)
    rates = requests_per_s(seconds)
    if is_even:
        due = np.floor(np.cumsum(rates)).astype(int)
        counts = np.diff(due, prepend=0)
    else:
        counts = rng.poisson(rates)
    starts = np.repeat(seconds, counts)
    arrival_s = np.sort(starts + (0.5 if is_even else rng.random(len(starts))))
    shape = (2, len(starts))
    lengths = np.ones(shape) if is_even else rng.lognormal(-(_SPREAD**2) / 2, _SPREAD, shape)
    return Trace(
        name=name,
        arrival_s=arrival_s,
        context=np.ceil(_MEAN_CONTEXT * lengths[0]).astype(int),
        generated=np.ceil(_MEAN_GENERATED * lengths[1]).astype(int),
        end_s=end_s,
    )


def steps(
    levels: Sequence[float] | np.ndarray, each_s: float
) -> Callable[[np.ndarray], np.ndarray]:
    """A rate that stays at each level for so long."""
    return lambda seconds: np.asarray(levels)[
        np.minimum(seconds // each_s, len(levels) - 1).astype(int)
    ]


def ramp(low: float, high: float, end_s: float) -> Callable[[np.ndarray], np.ndarray]:
    """A rate that rises evenly for the first half, and falls for the second."""
    return lambda seconds: low + (high - low) * (1 - np.abs(2 * seconds / end_s - 1))


def bursts(
    low: float, high: float, every_s: float, for_s: float
) -> Callable[[np.ndarray], np.ndarray]:
    """A low rate with a short high one every so often."""
    return lambda seconds: np.where(seconds % every_s < every_s - for_s, low, high)


def diurnal(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    """A rate that is lowest at the beginning and highest half a day later."""
    return lambda seconds: low + (high - low) * (1 - np.cos(2 * np.pi * seconds / DAY_S)) / 2


def read_csv(path: Path) -> Trace:
    """Read a trace of Azure's form; its first request arrives at 0.

    Raises:
        ValueError: A column or a value is missing, naming the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}; a trace has the columns "
                f"{', '.join(COLUMNS)}."
            )
        rows = []
        for line, row in enumerate(reader, start=2):
            try:
                moment = datetime.fromisoformat(row["TIMESTAMP"])
                context, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            rows.append((moment.timestamp(), context, generated))
    if not rows:
        raise ValueError(f"{path} has no request.")
    rows.sort()
    arrival_s, context, generated = (np.array(column) for column in zip(*rows, strict=True))
    arrival_s = arrival_s - arrival_s[0]
    return Trace(
        name=path.stem,
        arrival_s=arrival_s,
        context=context.astype(int),
        generated=generated.astype(int),
        end_s=float(np.floor(arrival_s[-1])) + 1,
    )


def write_csv(trace: Trace, path: Path) -> None:
    """Write a trace in Azure's form."""
    beginning = datetime(2026, 1, 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for arrival_s, context, generated in zip(
            trace.arrival_s, trace.context, trace.generated, strict=True
        ):
            moment = beginning + timedelta(seconds=float(arrival_s))
            writer.writerow((moment.isoformat(" ", "microseconds"), context, generated))
