"""Measures how the time per token grows with the context and with concurrency.

    python benchmarks/bench_growth.py --model-path DIRECTORY --device cpu --plot growth.png

Runs the engine in this process, without HTTP and without Ray. Prompts are random token ids, all
requests of a point begin together, and a point's figure is the median time between two tokens while
all of them decode. Beside it stands what reading memory alone would take: the weights once a step
and each request's keys and values, at the rate at which this machine's JAX sums a large array. So
the last column is the share of that rate which decoding reaches. Every flag of the engine
(docs/flags.md) is taken too.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.serving.prompts import find_vocab_size
from benchmarks.serving.results import BenchRequest
from benchmarks.serving.timed_engine import TimedEngine
from cluster.cli import parse_command_line
from engine.config import EngineConfig
from engine.errors import QwenOnRayError
from engine.hub import resolve_checkpoint
from engine.models.config import load_model_config

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
READ_BYTES = 512 * 2**20
READ_TIMES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement.

    Attributes:
        context: Tokens of each request, prompt and half of the output.
        tpot_ms: Median time between two tokens of a request.
        read_ms: Of the same bytes, at the machine's rate.
    """

    concurrency: int
    context: int
    tpot_ms: float
    read_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--concurrencies", type=int, nargs="*", default=list(CONCURRENCIES))
    parser.add_argument("--context", type=int, default=256, help="where concurrency grows")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all points as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both curves")
    arguments, others = parser.parse_known_args(argv)
    longest = max([*arguments.contexts, arguments.context]) + arguments.output_len
    most = max([1, *arguments.concurrencies])
    tokens = max(longest, most * (arguments.context + arguments.output_len + 128))
    flags = ["--context-length", str(longest), "--max-running-requests", str(most)]
    flags += ["--max-total-tokens", str(tokens), "--no-enable-prefix-caching"]
    try:
        config = parse_command_line([*flags, *others], prog=parser.prog).config
        by_context, by_concurrency = asyncio.run(measure(config, arguments))
    except QwenOnRayError as error:
        print(f"bench_growth: {error}", file=sys.stderr)
        return 2
    print(format_points([*by_context, *by_concurrency]))
    if arguments.output:
        found = {
            "by_context": list(map(asdict, by_context)),
            "by_concurrency": list(map(asdict, by_concurrency)),
        }
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(by_context, by_concurrency, arguments.plot)
    return 0


async def measure(
    config: EngineConfig, arguments: argparse.Namespace
) -> tuple[list[Point], list[Point]]:
    """Start the engine and measure both series of points."""
    directory = resolve_checkpoint(config.model_path)
    model = load_model_config(directory)
    vocab_size = find_vocab_size(str(directory)) or model.vocab_size
    weight_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2
    rng = np.random.default_rng(0)
    engine = TimedEngine(config, temperature=0.0, ignores_eos=True)
    await engine.start()
    bytes_per_s = read_rate()
    print(f"memory is read at {bytes_per_s / 1e9:.1f} GB/s", file=sys.stderr)
    running = asyncio.create_task(engine.run())

    async def point(concurrency: int, prompt_len: int) -> Point:
        requests = [
            BenchRequest(
                prompt=rng.integers(0, vocab_size, prompt_len).tolist(),
                prompt_len=prompt_len,
                output_len=arguments.output_len,
            )
            for _ in range(concurrency)
        ]
        results = await asyncio.gather(*map(engine.send, requests))
        start_s = results[0].start_s
        times_s = [
            [result.start_s - start_s + arrival.at_s for arrival in result.arrivals]
            for result in results
        ]
        all_decode_s = max(times[0] for times in times_s)
        gaps_s = [
            gap_s
            for times in times_s
            for before_s, gap_s in zip(times, np.diff(times), strict=False)
            if before_s >= all_decode_s
        ]
        context = prompt_len + arguments.output_len // 2
        read_bytes = weight_bytes + concurrency * context * kv_bytes
        return Point(
            concurrency=concurrency,
            context=context,
            tpot_ms=statistics.median(gaps_s) * 1e3,
            read_ms=read_bytes / bytes_per_s * 1e3,
        )

    try:
        await engine.send(BenchRequest(prompt=[1] * 8, prompt_len=8, output_len=8))
        total = len(arguments.contexts) + len(arguments.concurrencies)
        with tqdm(total=total, desc="points") as bar:

            async def counted(concurrency: int, prompt_len: int) -> Point:
                found = await point(concurrency, prompt_len)
                bar.update()
                return found

            by_context = [await counted(1, context) for context in arguments.contexts]
            by_concurrency = [
                await counted(number, arguments.context) for number in arguments.concurrencies
            ]
    finally:
        running.cancel()
        await engine.stop()
    return by_context, by_concurrency


def read_rate() -> float:
    """Bytes per second of a sum over a large array, best of a few."""
    array = jnp.ones(READ_BYTES // 4, jnp.float32)
    add_up = jax.jit(jnp.sum)
    add_up(array).block_until_ready()
    times_s = []
    for _ in range(READ_TIMES):
        start_s = time.perf_counter()
        add_up(array).block_until_ready()
        times_s.append(time.perf_counter() - start_s)
    return READ_BYTES / min(times_s)


def format_points(points: Sequence[Point]) -> str:
    lines = [
        "| concurrency | context | TPOT ms | memory alone ms | share |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        lines.append(
            f"| {point.concurrency} | {point.context} | {point.tpot_ms:.1f} | {point.read_ms:.1f} "
            f"| {point.read_ms / point.tpot_ms:.0%} |"
        )
    return "\n".join(lines)


def draw(by_context: Sequence[Point], by_concurrency: Sequence[Point], path: Path) -> None:
    """Draw TPOT over both, and what reading memory alone would take."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, points, name in (
        (left, by_context, "context"),
        (right, by_concurrency, "concurrency"),
    ):
        places = [getattr(point, name) for point in points]
        axes.plot(places, [point.tpot_ms for point in points], "o-", label="TPOT")
        axes.plot(places, [point.read_ms for point in points], "--", label="memory alone")
        axes.set_xscale("log", base=2)
        axes.set(xlabel=name, ylabel="ms per token of a request", ylim=(0, None))
        axes.legend()
    left.set_title("One request")
    if by_concurrency:
        right.set_title(f"Requests of {by_concurrency[0].context} tokens")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
