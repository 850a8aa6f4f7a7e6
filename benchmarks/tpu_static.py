"""What the TPU's compiler says of our kernels and steps, without a TPU.

    python benchmarks/tpu_static.py
    python benchmarks/tpu_static.py --only "decode kernel" --json

Each figure is compiled in a process of its own, for v6e. Cycles count at 1.75 GHz.

Kernels: cycles of the compiler's static profile, an execution of the program's own instructions
with a model of its copies, with every length a constant. Of decodes two batch sizes are profiled
and scaled to the batch that is named. The model of copies is generous where several are in flight,
because they do not share the memory's rate; so a figure above 100 % says that the memory is the
limit, no more. Of a chunk, blocks of keys that are attended alike are a loop, all else is unrolled;
the product unit is 256 deep, so that heads of 128 can fill half of it in one of their two products:
the ceiling is 67 %.

Steps: the sum of the compiler's estimates of all operations that run when no feature is asked for,
kernels and collectives apart.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from cluster.plan_command import on_slice, read_arguments
from engine.compile_ahead import compile_ahead, compile_some
from engine.compile_worker import EngineFacts, ProgramFacts
from engine.config import EngineConfig, parse_config
from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.kernels.tpu.static_profile import ChunkProfile, DecodeProfile, profile
from engine.step import Bucket
from engine.topology import chip_of
from engine.tpu_slice import Slice, chip_kind

GENERATION = "v6e"
CLOCK_HZ = chip_kind(GENERATION).clock_hz
NUM_TOKENS = 32768
ROOT = Path(__file__).parents[1]
CONFIGS, SHAPES = ROOT / "configs", ROOT / "tests" / "data" / "model_configs"
NUM_LAYERS, HIDDEN_SIZE = 32, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of the table; `is_met` is None where there is no goal."""

    name: str
    value: float
    unit: str
    goal: str = ""
    is_met: bool | None = None


def at_least(name: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(name=name, value=value, unit=unit, goal=f"≥ {goal:g}", is_met=value >= goal)


def at_most(name: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(name=name, value=value, unit=unit, goal=f"≤ {goal:g}", is_met=value <= goal)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose case contains it")
    parser.add_argument("--json", action="store_true", help="a list of objects, not a table")
    arguments = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if arguments.only in name}
    figures: list[Figure] = []
    for name, case in (bar := tqdm(cases.items(), disable=not sys.stderr.isatty())):
        bar.set_description(name)
        figures += case(name)
    if arguments.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1, ensure_ascii=False))
    else:
        print_table(figures)
    return 0


def print_table(figures: list[Figure]) -> None:
    for figure in figures:
        met = {None: "", True: "met", False: "not met"}[figure.is_met]
        print(f"{figure.name:<72} {figure.value:>10.4g} {figure.unit:<8} {figure.goal:<8} {met}")


def decode_kernel(
    *,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    goal: float | None = None,
    context: int = 2048,
) -> Callable[[str], list[Figure]]:
    """Of a batch of 64, by the difference of two smaller ones."""
    layout = kernel_layout(num_heads, num_kv_heads)
    batch = 64

    def case(name: str) -> list[Figure]:
        few, many = (
            profile(
                DecodeProfile(
                    generation=GENERATION,
                    layout=layout,
                    page_size=page_size,
                    context=context,
                    rounds=rounds,
                )
            )
            for rounds in (2, 4)
        )
        per_seq = (many.cycles - few.cycles) / (many.batch - few.batch)
        total = few.cycles + per_seq * (batch - few.batch)
        num_bytes = batch * context * num_kv_heads * 2 * LANES * 2
        roofline = num_bytes / chip_of(GENERATION).mem_bw_bytes_per_second * CLOCK_HZ
        return [share(f"{name}: roofline ÷ static cycles", roofline / total, goal)]

    return case


def mixed_kernel(
    *, num_heads: int, num_kv_heads: int, page_size: int, goal: float | None = None
) -> Callable[[str], list[Figure]]:
    """Of one chunk, profiled as a whole: products that the mask lets through ÷ all cycles."""
    layout = kernel_layout(num_heads, num_kv_heads)
    start, length = 6144, 2048

    def case(name: str) -> list[Figure]:
        found = profile(
            ChunkProfile(
                generation=GENERATION,
                layout=layout,
                page_size=page_size,
                start=start,
                length=length,
            )
        )
        pairs = start * length + length * (length + 1) // 2
        flops = 4 * LANES * num_heads * pairs
        roofline = flops / chip_of(GENERATION).bf16_ops_per_second * CLOCK_HZ
        return [share(f"{name}: roofline ÷ static cycles", roofline / found.cycles, goal)]

    return case


def kernel_layout(num_heads: int, num_kv_heads: int) -> RowLayout:
    return RowLayout(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=LANES, is_float32=False
    )


def share(name: str, ratio: float, goal: float | None) -> Figure:
    if goal is None:
        return Figure(name=name, value=100 * ratio, unit="%")
    return at_least(name, 100 * ratio, "%", goal)


def step(num_seqs: int, num_chunk_tokens: int = 0) -> tuple[EngineFacts, ProgramFacts]:
    """One of Qwen-7B's steps, compiled for v6e-4."""
    config = EngineConfig(
        model_path=str(SHAPES / "qwen-7b-chat"),
        device="tpu",
        tp_size=4,
        chunked_prefill_size=max(num_chunk_tokens, 128),
        context_length=8192,
        max_total_tokens=NUM_TOKENS,
    )
    engine, (found,) = compile_some(
        config, Slice(GENERATION, "2x2"), [Bucket(num_seqs, num_chunk_tokens)]
    )
    return engine, found


def decode_step(*, num_seqs: int) -> Callable[[str], list[Figure]]:
    def case(name: str) -> list[Figure]:
        engine, found = step(num_seqs)
        roofline_s = engine.streamed_bytes / chip_of(GENERATION).mem_bw_bytes_per_second
        two_all_reduces = NUM_LAYERS * 2 * num_seqs * HIDDEN_SIZE * 2
        cache_bytes = engine.num_pages * engine.page_bytes
        return [
            at_least(
                f"{name}: weights' roofline ÷ cycles",
                100 * roofline_s * CLOCK_HZ / found.cycles,
                "%",
                92,
            ),
            at_most(f"{name}: temporaries", found.temporary_bytes / 1e9, "GB", 0.1),
            at_least(
                f"{name}: updated in place ÷ cache", 100 * found.alias_bytes / cache_bytes, "%", 100
            ),
            at_most(
                f"{name}: collectives with no copy of weights beside ÷ two all-reduces a layer",
                found.idle_bytes / two_all_reduces,
                "",
                1,
            ),
            Figure(
                name=f"{name}: all collectives ÷ two bfloat16 all-reduces a layer",
                value=found.collective_bytes / two_all_reduces,
                unit="",
            ),
            Figure(name=f"{name}: tracing and compiling", value=found.seconds, unit="s"),
        ]

    return case


def prefill_step(*, num_tokens: int) -> Callable[[str], list[Figure]]:
    """Attention: its kernels, and what lays queries, keys and outputs out for them."""

    def case(name: str) -> list[Figure]:
        _, found = step(64, num_tokens)
        without = (found.cycles - found.attention_cycles) / NUM_LAYERS / 1e6
        return [
            at_most(f"{name}: cycles a layer without attention", without, "million", 3.6),
            Figure(
                name=f"{name}: cycles a layer with attention's, but its kernels'",
                value=found.cycles / NUM_LAYERS / 1e6,
                unit="million",
            ),
            Figure(name=f"{name}: tracing and compiling", value=found.seconds, unit="s"),
        ]

    return case


def all_programs(
    file: str, model: str, slice_name: str, *, goal_s: float | None = None
) -> Callable[[str], list[Figure]]:
    """Every program of a configuration, as a start or `qwen-on-ray compile` makes them."""

    def case(name: str) -> list[Figure]:
        tpu = Slice.parse(slice_name)
        fields = read_arguments(CONFIGS / file, None) | {"model_path": str(SHAPES / model)}
        config = parse_config(on_slice(fields, tpu))
        started_s = time.monotonic()
        compiled = compile_ahead(config, tpu)
        seconds = time.monotonic() - started_s
        row = f"{name}: {len(compiled.programs)} programs on {os.cpu_count()} processors"
        tokens = (compiled.num_pages - 1) * config.page_size
        return [
            Figure(name=row, value=seconds, unit="s")
            if goal_s is None
            else at_most(row, seconds, "s", goal_s),
            Figure(name=f"{name}: tokens in the cache", value=tokens, unit=""),
        ]

    return case


CASES: dict[str, Callable[[str], list[Figure]]] = {
    "decode kernel, 8 q / 8 kv heads, page 16": decode_kernel(
        num_heads=8, num_kv_heads=8, page_size=16, goal=85
    ),
    "decode kernel, 8 q / 8 kv heads, page 128": decode_kernel(
        num_heads=8, num_kv_heads=8, page_size=128, goal=85
    ),
    "decode kernel, 7 q / 1 kv heads, page 64": decode_kernel(
        num_heads=7, num_kv_heads=1, page_size=64, goal=80
    ),
    "decode kernel, 8 q / 2 kv heads, page 64": decode_kernel(
        num_heads=8, num_kv_heads=2, page_size=64, goal=80
    ),
    "decode kernel, 7 q / 1 kv heads, page 16": decode_kernel(
        num_heads=7, num_kv_heads=1, page_size=16
    ),
    "decode kernel, 8 q / 2 kv heads, page 16": decode_kernel(
        num_heads=8, num_kv_heads=2, page_size=16
    ),
    "decode kernel, 8 q / 8 kv heads, page 1": decode_kernel(
        num_heads=8, num_kv_heads=8, page_size=1
    ),
    "decode kernel, 512 cached tokens, 8 q / 8 kv heads, page 16": decode_kernel(
        num_heads=8, num_kv_heads=8, page_size=16, context=512
    ),
    "mixed kernel, 2048 tokens on 6144, 8 q / 8 kv heads, page 16": mixed_kernel(
        num_heads=8, num_kv_heads=8, page_size=16, goal=60
    ),
    "mixed kernel, 2048 tokens on 6144, 8 q / 2 kv heads, page 64": mixed_kernel(
        num_heads=8, num_kv_heads=2, page_size=64
    ),
    "Qwen-7B, v6e-4, decode of 8": decode_step(num_seqs=8),
    "Qwen-7B, v6e-4, decode of 64": decode_step(num_seqs=64),
    "Qwen-7B, v6e-4, prefill of 8192": prefill_step(num_tokens=8192),
    "all of configs/qwen7b.yaml, v6e-4": all_programs(
        "qwen7b.yaml", "qwen-7b-chat", "v6e:2x2", goal_s=120
    ),
    **{
        f"all of configs/{file}, {slice_name}": all_programs(file, model, slice_name)
        for file, model, slices in (
            ("qwen2.5-7b.yaml", "qwen2.5-7b-instruct", ("v6e:2x2", "v6e:1x1", "v5e:2x4")),
            ("qwen3-8b.yaml", "qwen3-8b", ("v6e:2x2", "v6e:2x4", "v7x:2x2x1")),
            ("qwen3-32b-v6e-16.yaml", "qwen3-32b", ("v6e:4x4",)),
        )
        for slice_name in slices
    },
}


if __name__ == "__main__":
    sys.exit(main())
