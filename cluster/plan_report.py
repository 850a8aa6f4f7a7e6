"""A serving plan for people: a page of text, a line in a comparison, a plot."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.planner import Bounds, ServingPlan

_GIB = 2**30
_BAR_WIDTH = 24


def describe_plan(plan: ServingPlan, config: EngineConfig) -> str:
    """A plan as a page of text."""
    free = plan.capacity_bytes - plan.weight_bytes - plan.kv_bytes
    free -= plan.temporary_bytes + plan.code_bytes
    parts = [
        ("weights", plan.weight_bytes, ""),
        (
            "KV pages",
            plan.kv_bytes,
            f"{plan.num_tokens:,} tokens in {plan.num_pages:,} pages of {plan.page_size}",
        ),
        ("scratch memory", plan.temporary_bytes, "of the largest program"),
        ("code", plan.code_bytes, f"of {len(plan.steps)} steps' programs and two more"),
        (
            "free",
            free,
            f"--mem-fraction-static={config.mem_fraction_static:g} bounds weights and pages",
        ),
    ]
    work = plan.workload
    chips = "1 chip" if plan.num_chips == 1 else f"{plan.num_chips} chips"
    lines = [
        "",
        f"{config.model_names[0]} on {plan.tpu}: {chips}, --tp-size={config.tp_size}",
        "",
        f"Memory of a device{'GiB':>14}",
    ]
    for name, num_bytes, note in parts:
        bar = "█" * round(_BAR_WIDTH * max(0, num_bytes) / plan.capacity_bytes)
        lines.append(f"  {name:<18}{num_bytes / _GIB:>12.2f}  {bar:<{_BAR_WIDTH}}  {note}".rstrip())
    lines += [
        f"  {'all':<18}{plan.capacity_bytes / _GIB:>12.2f}",
        "",
        f"Longest request: {plan.longest_context:,} tokens. Requests of {work.input_len:,} + "
        f"{work.output_len:,} tokens at once: {plan.most_sequences}.",
        "",
        f"{'Step':<34}{'ms':>13}{'floor':>8}  {'bound by':<10}{'cycles':>12}{'collectives':>13}"
        f"{'compiled':>10}",
    ]
    lines += [
        f"  {step.shape.name:<32}{_range(step.time_s, 1e3):>13}{step.floor_s * 1e3:>8.2f}  "
        f"{step.bound:<10}{step.facts.cycles:>12,}{sum(step.facts.collectives.values()):>13}"
        f"{step.facts.seconds:>8.0f} s"
        for step in plan.steps
    ]
    lines += [
        "",
        f"{work.input_len:,} → {work.output_len:,} tokens, {work.concurrency} at a time:",
        f"  time to first token     {_range(plan.ttft_s, 1e3)} ms",
        f"  time per output token   {_range(plan.tpot_s, 1e3)} ms",
        f"  throughput              {_range(plan.output_tokens_per_s, 1)} output tokens/s",
        "",
        "Memory is the compiler's own account. Times are estimates, from the hardware's best to",
        "what kernels, collectives and the host would take if nothing overlapped; none was",
        "measured on a TPU, and queueing, tokenizing and HTTP are not in them.",
    ]
    return "\n".join(lines)


def compare_plans(plans: Sequence[ServingPlan], faults: Mapping[str, str]) -> str:
    """Plans side by side, a line each."""
    lines = [
        "",
        f"{'Slice':<14}{'chips':>6}{'weights':>9}{'KV tokens':>11}{'at once':>9}{'TTFT ms':>14}"
        f"{'TPOT ms':>13}{'tokens/s':>16}{'a chip':>14}",
    ]
    for plan in plans:
        a_chip = plan.output_tokens_per_s.times(1 / plan.num_chips)
        lines.append(
            f"{plan.tpu:<14}{plan.num_chips:>6}{plan.weight_bytes / _GIB:>7.1f} G"
            f"{plan.num_tokens:>11,}{plan.most_sequences:>9}{_range(plan.ttft_s, 1e3):>14}"
            f"{_range(plan.tpot_s, 1e3):>13}{_range(plan.output_tokens_per_s, 1):>16}"
            f"{_range(a_chip, 1):>14}"
        )
    lines += [f"{tpu:<14}{error}" for tpu, error in faults.items()]
    return "\n".join(lines)


def plot_plans(plans: Sequence[ServingPlan], path: Path) -> None:
    """Draw memory by what takes it, and the steps' times between their bounds."""
    pyplot = import_pyplot()
    figure, (memory, times) = pyplot.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=[1, 1.6], layout="constrained"
    )
    bottom = [0.0] * len(plans)
    names = [plan.tpu for plan in plans]
    for label, field in (
        ("weights", "weight_bytes"),
        ("KV pages", "kv_bytes"),
        ("scratch memory", "temporary_bytes"),
        ("code", "code_bytes"),
    ):
        sizes = [getattr(plan, field) / _GIB for plan in plans]
        memory.bar(names, sizes, bottom=bottom, label=label, width=0.6)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    capacity = [plan.capacity_bytes / _GIB for plan in plans]
    places = range(len(plans))
    memory.hlines(
        capacity,
        [place - 0.4 for place in places],
        [place + 0.4 for place in places],
        colors="black",
        label="what there is",
    )
    memory.set_ylabel("GiB of a device")
    memory.set_ylim(0, max(capacity) * 1.4)
    memory.legend(loc="upper center", ncols=2, fontsize=8)
    for plan in plans:
        steps = sorted(plan.steps, key=lambda step: step.shape.num_chunk_tokens)
        tokens = [step.shape.num_chunk_tokens for step in steps]
        best = [step.time_s.best * 1e3 for step in steps]
        worst = [step.time_s.worst * 1e3 for step in steps]
        drawn = times.fill_between(tokens, best, worst, alpha=0.3, label=plan.tpu)
        times.plot(
            tokens,
            [step.floor_s * 1e3 for step in steps],
            "--",
            color=drawn.get_facecolor()[0][:3],
            label=f"{plan.tpu}, hardware's floor",
        )
    times.set_xscale("symlog", base=2, linthresh=64)
    times.set_yscale("log")
    for axis in (times.xaxis, times.yaxis):
        axis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter("{x:g}")
    times.set_xlabel("prompt tokens in a step")
    times.set_ylabel("ms of a step, estimated")
    times.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def import_pyplot() -> Any:
    """Matplotlib, drawing to files.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("--plot draws with matplotlib: pip install matplotlib.") from error
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


def _range(bounds: Bounds, factor: float) -> str:
    low, high = sorted((bounds.best * factor, bounds.worst * factor))
    digits = 0 if high >= 100 else 1 if high >= 10 else 2
    return f"{low:,.{digits}f}–{high:,.{digits}f}"
