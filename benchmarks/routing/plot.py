"""Draws what a choice of engine came to: the share of prompts found cached, and TTFT."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.routing.conversations import Turn, hit_rate


def draw(policies: Mapping[str, Sequence[Turn]], path: Path) -> None:
    """Write a PNG: the hit rate of each turn, and the share of first tokens within a time."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (rates, times) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, turns in policies.items():
        numbers = sorted({turn.number for turn in turns})
        rates.plot(
            [number + 1 for number in numbers],
            [hit_rate([turn for turn in turns if turn.number == number]) for number in numbers],
            marker="o",
            label=name,
        )
        times_s = np.sort([turn.result.ttft_s for turn in turns if turn.result.ttft_s is not None])
        times.plot(times_s, np.arange(1, len(times_s) + 1) / max(1, len(times_s)), label=name)
    rates.set(
        title="Prompt tokens found cached",
        xlabel="turn of the conversation",
        ylabel="share",
        ylim=(0, 1),
    )
    times.set(
        title="Time to first token",
        xlabel="s",
        ylabel="share of requests",
        ylim=(0, 1),
        xlim=(0, None),
    )
    rates.legend()
    times.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
