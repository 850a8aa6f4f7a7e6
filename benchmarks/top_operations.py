"""Shows what takes the time in a trace that POST /start_profile has written.

    python benchmarks/top_operations.py /tmp/traces/rank-0

Reads the latest trace below the folder and prints, for each kind of operation, the time of its own
(what it spends in others is theirs), its share of all, and how often it ran. Operations of one kind
are those whose names differ by a number at the end. For time lines, open the folder in TensorBoard
(package xprof), or the file `*.trace.json.gz` at https://ui.perfetto.dev.
"""

import argparse
import collections
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

# Of the device where there is one; on a CPU the operations are on the threads of the host.
_DEVICE = "/device:"
_HOST = "/host:CPU"
_END_MARK = "end: "
_NUMBER = re.compile(r"[.\d]+$")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=25, help="kinds of operations to show")
    arguments = parser.parse_args()
    traces = sorted(arguments.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        print(f"top_operations: no trace lies below {arguments.folder}", file=sys.stderr)
        return 2
    times_ns: collections.defaultdict[str, float] = collections.defaultdict(float)
    counts: collections.Counter[str] = collections.Counter()
    for name, own_ns in operations(ProfileData.from_file(str(traces[-1]))):
        kind = _NUMBER.sub("", name)
        times_ns[kind] += own_ns
        counts[kind] += 1
    total_ns = sum(times_ns.values()) or 1.0
    print(f"{traces[-1]}\n{'share':>7}{'ms':>11}{'times':>9}  operation")
    longest_first = sorted(times_ns.items(), key=lambda item: -item[1])
    for kind, own_ns in longest_first[: arguments.top]:
        print(f"{own_ns / total_ns:>7.1%}{own_ns / 1e6:>11.2f}{counts[kind]:>9}  {kind}")
    return 0


def operations(profile: Any) -> Iterator[tuple[str, float]]:
    """Each operation's name and the nanoseconds that it did not spend in another one.

    Args:
        profile: A `jax.profiler.ProfileData`.
    """
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith(_DEVICE)]
    for plane in devices or [plane for plane in planes if plane.name == _HOST]:
        for line in plane.lines:
            yield from own_times(
                (event.start_ns, event.start_ns + event.duration_ns, event.name)
                for event in line.events
                if not event.name.startswith(_END_MARK)
            )


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Names and own times of (start, end, name) that nest in one another, of one thread."""
    open_events: list[tuple[float, str]] = []
    inner: list[float] = []

    def close(start: float) -> Iterator[tuple[str, float]]:
        while open_events and open_events[-1][0] <= start:
            _, name = open_events.pop()
            yield name, inner.pop()

    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        yield from close(start)
        if inner:
            inner[-1] -= end - start
        open_events.append((end, name))
        inner.append(end - start)
    yield from close(float("inf"))


if __name__ == "__main__":
    sys.exit(main())
