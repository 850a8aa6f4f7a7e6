"""Measures what the host does per step, with a model that computes nothing.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --running 1 8 64 256 1024 --plot step.png

Every running request decodes one token a step. Columns, in milliseconds of one core, medians:

    plan      the scheduler lays out the step, and later takes its tokens in
    wire      the plan is encoded by the leader and decoded by a host
    batch     the plan becomes padded arrays
    dispatch  the compiled program is called: 28 layers of 11 weights, a donated cache and state
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from engine.request import Request, SamplingParams
from engine.runner.batch import BatchBuilder, IntColumn, StepInputs, padding_plan
from engine.runner.slot_state import init_slot_state
from engine.scheduling.scheduler import Scheduler
from engine.step import Bucket, EngineLimits, StepResult, decode_plan, encode

PARTS = ("plan", "wire", "batch", "dispatch")
PAGE_SIZE = 16
PROMPT_LEN = 32
VOCAB_SIZE = 151936
NUM_LAYERS = 28
WEIGHTS_PER_LAYER = 11


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200, help="timed steps per row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    arguments = parser.parse_args()
    print(f"{'running':>8}" + "".join(f"{part:>10}" for part in (*PARTS, "sum")) + "   ms per step")
    rows = {}
    for num_running in arguments.running:
        rows[num_running] = measure(num_running, arguments.context_length, arguments.steps)
        figures = [*rows[num_running].values(), sum(rows[num_running].values())]
        print(f"{num_running:>8}" + "".join(f"{ms:>10.3f}" for ms in figures), flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


def measure(num_running: int, context_length: int, num_steps: int) -> dict[str, float]:
    """Median milliseconds of each part."""
    num_chunks = 8
    decode = Bucket(num_seqs=max(2, num_running))
    prefill = Bucket(
        num_seqs=max(2, num_running), num_chunk_tokens=PROMPT_LEN * 8, num_chunks=num_chunks
    )
    pages_per_seq = context_length // PAGE_SIZE
    # The first to come decode while the last are still being prefilled.
    longest = PROMPT_LEN + num_steps + num_running // num_chunks + 1
    limits = EngineLimits(
        num_pages=1 + num_running * (longest // PAGE_SIZE + 2),
        page_size=PAGE_SIZE,
        context_length=context_length,
        max_running_requests=num_running,
        buckets=(decode, prefill),
        vocab_size=VOCAB_SIZE,
        model_fingerprint="none",
    )
    scheduler = Scheduler(
        limits, max_chunk_tokens=prefill.num_chunk_tokens, enable_prefix_caching=True
    )
    sampling = SamplingParams(max_tokens=2 * longest, ignore_eos=True)
    numbers = np.random.default_rng(0)
    for index in range(num_running):
        prompt = numbers.integers(0, VOCAB_SIZE, PROMPT_LEN).tolist()
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    batch = BatchBuilder(num_slots=num_running, pages_per_seq=pages_per_seq, vocab_size=VOCAB_SIZE)
    call = _null_program(batch.build(padding_plan(decode)), num_running)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    while len(times["plan"]) < num_steps:
        marks = [time.perf_counter()]
        step = scheduler.plan()
        assert step is not None, "requests last longer than the steps that are timed"
        marks.append(time.perf_counter())
        plan = decode_plan(encode(step.plan))
        marks.append(time.perf_counter())
        inputs = batch.build(plan)
        marks.append(time.perf_counter())
        is_decode = plan.bucket == decode
        if is_decode:
            call(inputs)
        marks.append(time.perf_counter())
        scheduler.apply(step, _result(plan.step, len(step.rows)))
        took_in_s = time.perf_counter() - marks[-1]
        if is_decode and len(plan.decode_slots) == num_running:
            seconds = np.diff(marks)
            seconds[0] += took_in_s
            for part, part_s in zip(PARTS, seconds, strict=True):
                times[part].append(part_s * 1e3)
    return {part: statistics.median(milliseconds) for part, milliseconds in times.items()}


def _result(step: int, num_rows: int) -> StepResult:
    return StepResult(step=step, token_ids=np.full(num_rows, 7, np.int32))


def _null_program(example: StepInputs, num_slots: int) -> Any:
    """A program with a real step's arguments that only passes them on; keeps its own arrays."""
    layer = {f"weight_{index}": jnp.ones(8) for index in range(WEIGHTS_PER_LAYER)}
    params = {"layers": [dict(layer) for _ in range(NUM_LAYERS)]}
    held: list[Any] = [
        tuple(jnp.zeros((NUM_LAYERS, 8, 8, PAGE_SIZE, 128), jnp.uint16) for _ in range(2)),
        init_slot_state(num_slots, VOCAB_SIZE),
    ]

    def step(params: Any, cache: Any, state: Any, inputs: StepInputs) -> Any:
        return inputs.row_ints[:, IntColumn.KV_LEN], cache, state

    program = jax.jit(step, donate_argnums=(1, 2)).lower(params, *held, example).compile()

    def call(inputs: StepInputs) -> None:
        _, *held[:] = program(params, *held, inputs)

    return call


def plot(rows: dict[int, dict[str, float]], path: Path) -> None:
    """Draw milliseconds per step of each part and of all, against running requests."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for part in PARTS:
        axes.plot(list(rows), [row[part] for row in rows.values()], ".-", label=part)
    sums = [sum(row[part] for part in PARTS) for row in rows.values()]
    axes.plot(list(rows), sums, "k.-", linewidth=2, label="sum")
    axes.set(xscale="log", yscale="log", title="Host work per step, one core")
    axes.set(xlabel="running requests", ylabel="ms")
    axes.set_xticks(list(rows), [str(running) for running in rows], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
