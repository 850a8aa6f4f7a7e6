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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import EngineConfig
from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.kernels.tpu.static_profile import ChunkProfile, DecodeProfile, profile
from engine.models.config import load_model_config
from engine.program_cost import CLOCK_HZ, program_cost
from engine.runner.kv_cache import bytes_per_device
from engine.runner.programs import EnginePrograms
from engine.sharding import make_mesh
from engine.topology import chip_of, compile_environment, topology_devices

GENERATION = "v6e"
TIMEOUT_S = 900
NUM_PAGES = 2048
QWEN_7B: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "vocab_size": 151936,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


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
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        call = json.loads(arguments.measure)
        json.dump(MEASURES[call["measure"]](**call["arguments"]), sys.stdout)
        return 0
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


# In this process ----------------------------------------------------------------------------------


def measure(kind: str, *, libtpu_flags: str = "", **arguments: Any) -> dict[str, Any]:
    """Measure in a process of its own."""
    process = subprocess.run(
        [
            *(sys.executable, __file__, "--measure"),
            json.dumps({"measure": kind, "arguments": arguments}),
        ],
        env=compile_environment(libtpu_flags),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{kind} {arguments}: {process.stderr[-3000:]}")
    return json.loads(process.stdout)


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


def decode_step(*, num_seqs: int) -> Callable[[str], list[Figure]]:
    def case(name: str) -> list[Figure]:
        found = measure("step", num_seqs=num_seqs, num_chunk_tokens=0)
        roofline_s = found["read_bytes"] / chip_of(GENERATION).mem_bw_bytes_per_second
        two_all_reduces = 32 * 2 * num_seqs * QWEN_7B["hidden_size"] * 2
        return [
            at_least(
                f"{name}: weights' roofline ÷ cycles",
                100 * roofline_s * CLOCK_HZ / found["cycles"],
                "%",
                92,
            ),
            at_most(f"{name}: temporaries", found["temporary_bytes"] / 1e9, "GB", 0.1),
            at_least(
                f"{name}: updated in place ÷ cache",
                100 * found["alias_bytes"] / found["cache_bytes"],
                "%",
                100,
            ),
            at_most(
                f"{name}: exposed collectives ÷ two bfloat16 all-reduces a layer",
                found["collective_bytes"] / two_all_reduces,
                "",
                1,
            ),
            Figure(name=f"{name}: tracing and compiling", value=found["seconds"], unit="s"),
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
}


# In a process that compiles -----------------------------------------------------------------------


def measure_step(*, num_seqs: int, num_chunk_tokens: int) -> dict[str, Any]:
    """Memory, cycles and collectives of one of Qwen-7B's steps on v6e-4."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
        config = EngineConfig(
            model_path=folder,
            device="tpu",
            tp_size=4,
            dtype="bfloat16",
            chunked_prefill_size=8192,
            context_length=8192,
        )
        model_config = load_model_config(Path(folder))
    devices = topology_devices(GENERATION, "2x2")
    mesh = make_mesh(len(devices), devices)
    programs = EnginePrograms(config, model_config, mesh, chip=chip_of(GENERATION))
    (bucket,) = (
        bucket
        for bucket in programs.buckets
        if (bucket.num_seqs, bucket.num_chunk_tokens) == (num_seqs, num_chunk_tokens)
    )
    params = programs.param_shapes()
    program = programs.program(bucket, params, NUM_PAGES)
    started_s = time.monotonic()
    compiled = program.jitted.lower(*program.arguments).compile()
    seconds = time.monotonic() - started_s
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    cost = program_cost(text)
    return {
        "seconds": seconds,
        "cycles": cost.cycles,
        "collective_bytes": cost.collective_bytes,
        "collectives": cost.collectives,
        # Of the embedding table a step reads a few rows.
        "read_bytes": bytes_per_device(params) - bytes_per_device(params["embed_tokens"]),
        "cache_bytes": bytes_per_device(programs.cache_shapes(NUM_PAGES)),
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "step": measure_step,
}


if __name__ == "__main__":
    sys.exit(main())
