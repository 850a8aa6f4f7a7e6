"""Mixed load and random faults for a long time: what is lost, and what grows.

    python tests/e2e/soak.py --minutes 30
    python tests/e2e/soak.py --minutes 1 --engines 1 --hosts 1 --faults leader-killed

Starts a Ray of its own with engines on this machine, as faults.py does. Clients ask in every way
(streams, whole answers, several choices, log probabilities, stop strings, penalties, long prompts
and short) for answers that are known, and one in four leaves before the end. Faults hit at random
until --calm-share of the time is left, so that leaders and hosts live long enough to show growth.

All this must hold at the end: nothing lost, nothing wrong; no request in any engine or router, and
every page of each cache free or kept for prompts to come; nothing compiled while serving; and no
process that lived for --judged-share of the time or more has grown beyond the bounds from the first
third of its life to the last, in memory or in open files.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from tests.e2e.faults import (
    FAULTS,
    MODEL,
    NOTICE_TIMEOUT_S,
    RECOVERY_TIMEOUT_S,
    START_TIMEOUT_S,
    serving,
    wait_for_processes,
    wait_until,
)
from tests.e2e.mixed_load import MixedLoad, Tally, leftovers_of, make_works
from tests.e2e.process_sizes import Growth, ProcessSizes

# Those that need no hosts of their own, but for the one that needs a kernel which ends connections.
KINDS = ("rank-killed", "rank-frozen", "leader-killed", "leader-frozen", "router-killed")
QUIET_TIMEOUT_S = 60
# The tiny model has a token for each letter, more or less, and a context of 512.
NUM_SENTENCES = 6


@dataclass(slots=True)
class Soak:
    """What a run has seen.

    Attributes:
        faults: How many of each.
        leftovers: What was not at rest when all clients had gone.
    """

    tally: Tally
    sizes: ProcessSizes
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    leftovers: list[str] = field(default_factory=list)


async def soak(arguments: argparse.Namespace, base_url: str) -> Soak:
    """Load, break and watch for the time asked for; then see what is left."""
    random.seed(arguments.seed)
    num_ranks = arguments.engines * arguments.hosts
    load = MixedLoad(base_url, MODEL, make_works(arguments.tokens, num_sentences=NUM_SENTENCES))
    seen = Soak(load.tally, ProcessSizes())
    await wait_until(base_url, num_ranks, all_serve=True, timeout_s=START_TIMEOUT_S)
    await load.learn_answers()
    started_s = time.monotonic()
    end_s = started_s + 60 * arguments.minutes
    calm_s = end_s - 60 * arguments.minutes * arguments.calm_share
    watching = asyncio.create_task(watch(arguments, seen, started_s))
    try:
        async with load.asking(arguments.streams):
            await break_until(calm_s, arguments, base_url, num_ranks, seen.faults)
            await asyncio.sleep(max(0.0, end_s - time.monotonic()))
        await wait_until(base_url, num_ranks, all_serve=True, timeout_s=RECOVERY_TIMEOUT_S)
        seen.leftovers = await find_leftovers(base_url, 4 * arguments.routers)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await load.close()
    seen.seconds = time.monotonic() - started_s
    return seen


async def break_until(
    end_s: float,
    arguments: argparse.Namespace,
    base_url: str,
    num_ranks: int,
    faults: Counter[str],
) -> None:
    """Let faults hit, each after the one before is mended."""
    while True:
        pause_s = random.uniform(0, 2 * arguments.between_faults_s)
        if not arguments.faults or time.monotonic() + pause_s > end_s:
            return
        await asyncio.sleep(pause_s)
        name = random.choice(arguments.faults)
        FAULTS[name].inject(None)
        faults[name] += 1
        if FAULTS[name].stops_engine:
            await wait_until(base_url, num_ranks, all_serve=False, timeout_s=NOTICE_TIMEOUT_S)
        await wait_for_processes(arguments)
        await wait_until(base_url, num_ranks, all_serve=True, timeout_s=RECOVERY_TIMEOUT_S)


async def watch(arguments: argparse.Namespace, seen: Soak, started_s: float) -> None:
    """Sample all processes and tell how it goes; runs for ever."""
    while True:
        await asyncio.to_thread(seen.sizes.take)
        tally = seen.tally
        sizes = ", ".join(f"{role} {mb:.0f} MB" for role, mb in seen.sizes.latest_mb().items())
        print(
            f"{time.monotonic() - started_s:5.0f} s: {tally.whole.total()} answers, "
            f"{tally.left} left, {tally.lost} lost, {tally.wrong} wrong, "
            f"{seen.faults.total()} faults; {sizes}",
            file=sys.stderr,
            flush=True,
        )
        await asyncio.sleep(arguments.sample_s)


async def find_leftovers(base_url: str, num_answers: int) -> list[str]:
    """What still holds something though nobody asks; what engines tell may be a second old.

    Args:
        num_answers: Each is one router's, by chance, and all must be good.
    """
    deadline_s = time.monotonic() + QUIET_TIMEOUT_S
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        while True:
            leftovers = []
            for _ in range(num_answers):
                leftovers += leftovers_of((await client.get("/fleet")).json())
            if not leftovers or time.monotonic() > deadline_s:
                return leftovers
            await asyncio.sleep(0.5)


def grown(arguments: argparse.Namespace, growth: Growth) -> bool:
    return growth.is_judged and (
        growth.rss_growth_mb > arguments.max_growth_mb
        or growth.files_growth > arguments.max_growth_files
    )


def table(arguments: argparse.Namespace, seen: Soak, growths: list[Growth]) -> str:
    tally = seen.tally
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(tally.whole.items()))
    faults = ", ".join(f"{name} {count}" for name, count in sorted(seen.faults.items())) or "none"
    lines = [
        f"{seen.seconds / 60:.1f} minutes; faults: {faults}",
        f"{tally.whole.total()} whole answers ({kinds}), {tally.left} left by their client, "
        f"{tally.breaks} connections broken, {tally.lost} lost, {tally.wrong} wrong",
        "at the end: " + ("; ".join(seen.leftovers) or "nothing runs or waits, no page is in use"),
        "",
        "| process | lived, s | memory, MB: first third, last | open files: first third, last | |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.role} | {each.life_s:.0f} | {each.rss_mb[0]:.1f}, {each.rss_mb[1]:.1f} | "
        f"{each.num_files[0]:.0f}, {each.num_files[1]:.0f} | "
        f"{'has grown' if grown(arguments, each) else 'steady'} |"
        for each in growths
        if each.is_judged
    ]
    num_short = sum(not each.is_judged for each in growths)
    return "\n".join([*lines, "", f"{num_short} more processes lived too short to be judged"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = [name for name, fault in FAULTS.items() if not fault.needs_hosts]
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=2, help="of each engine")
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=6, help="requests under way")
    parser.add_argument("--tokens", type=int, default=120, help="of each answer")
    parser.add_argument("--faults", nargs="*", choices=here, default=list(KINDS))
    parser.add_argument(
        "--between-faults-s", type=float, default=10.0, help="mean pause after a recovery"
    )
    parser.add_argument("--calm-share", type=float, default=0.4, help="of the time, at its end")
    parser.add_argument("--judged-share", type=float, default=0.3, help="of the time")
    parser.add_argument("--max-growth-mb", type=float, default=16.0, help="of any process")
    parser.add_argument("--max-growth-files", type=float, default=8.0, help="of any process")
    parser.add_argument("--sample-s", type=float, default=5.0, help="between looks at processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with serving(arguments) as base_url:
        seen = asyncio.run(soak(arguments, base_url))
    growths = seen.sizes.growths(least_life_s=60 * arguments.minutes * arguments.judged_share)
    print(table(arguments, seen, growths))
    for error in seen.tally.errors:
        print(error, file=sys.stderr)
    if arguments.json:
        figures = {
            "seconds": seen.seconds,
            "faults": seen.faults,
            "whole": seen.tally.whole,
            "left": seen.tally.left,
            "breaks": seen.tally.breaks,
            "lost": seen.tally.lost,
            "wrong": seen.tally.wrong,
            "errors": seen.tally.errors,
            "leftovers": seen.leftovers,
            "processes": [asdict(each) | {"grown": grown(arguments, each)} for each in growths],
        }
        arguments.json.write_text(json.dumps(figures, indent=1))
    is_bad = seen.tally.lost or seen.tally.wrong or seen.leftovers
    return 1 if is_bad or any(grown(arguments, each) for each in growths) else 0


if __name__ == "__main__":
    sys.exit(main())
