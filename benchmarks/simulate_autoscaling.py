"""Simulates the autoscaling policy: how many engines it asks for as load comes and goes.

    python benchmarks/simulate_autoscaling.py --plot autoscaling.png
    python benchmarks/simulate_autoscaling.py --trace AzureLLMInferenceTrace_conv.csv --scale 20

The policy is the very code that Serve's controller runs (cluster/engine_demand.py); engines are a
model with a start delay and a number of slots and KV pages, and share one queue. Without --trace,
the load is synthetic: steps, a ramp, bursts, a day, and a day that goes to nothing, for a fleet of
--peak engines; a file of Azure's form (TIMESTAMP, ContextTokens, GeneratedTokens) takes their
place. For each trace the table has how often the number of engines turned from growing to shrinking
or back, how long requests waited, and engine-hours beside those of an oracle that knows the future,
needs no headroom and starts each engine in time.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.scaling import traces
from benchmarks.scaling.fleet import EngineModel, Run, simulate
from benchmarks.scaling.traces import Trace
from cluster.engine_demand import ScalingRules
from engine.config import EngineConfig

HOUR_S = 3_600.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    model = EngineModel(
        num_slots=arguments.slots,
        num_tokens=arguments.kv_tokens,
        decode_s=arguments.decode_ms / 1e3,
        start_s=arguments.start_s,
    )
    rules = ScalingRules(
        min_engines=arguments.min_engines,
        max_engines=arguments.max_engines,
        num_slots=arguments.slots,
        target_load=arguments.target_load,
        target_queue_delay_s=arguments.target_queue_delay_s,
        upscale_delay_s=arguments.upscale_delay_s,
        downscale_delay_s=arguments.downscale_delay_s,
    )
    try:
        found = list(recorded(arguments) if arguments.trace else synthetic(arguments, model))
    except (OSError, ValueError) as error:
        print(f"simulate_autoscaling: {error}", file=sys.stderr)
        return 2
    if arguments.write_trace:
        traces.write_csv(found[-1], arguments.write_trace)
    runs = [simulate(trace, model, rules, num_first=arguments.first_engines) for trace in found]
    print(format_runs(runs))
    if arguments.output:
        arguments.output.write_text(json.dumps([row(run) for run in runs], indent=1) + "\n")
    if arguments.plot:
        draw(runs, model, arguments.plot)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model, fields = EngineModel(), EngineConfig.model_fields
    parser.add_argument("--peak", type=float, default=40, help="engines' worth of load at its most")
    parser.add_argument("--hours", type=float, default=3, help="of each synthetic trace but days")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="some of the synthetic traces")
    parser.add_argument("--trace", type=Path, metavar="FILE.csv", help="of Azure's form")
    parser.add_argument(
        "--scale", type=int, default=1, help="send each request of --trace so many times"
    )
    parser.add_argument(
        "--write-trace", type=Path, metavar="FILE.csv", help="write the last trace in Azure's form"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=model.num_slots, help="of an engine")
    parser.add_argument("--kv-tokens", type=int, default=model.num_tokens, help="of an engine")
    parser.add_argument("--decode-ms", type=float, default=model.decode_s * 1e3, help="per token")
    parser.add_argument("--start-s", type=int, default=model.start_s, help="of an engine")
    parser.add_argument("--first-engines", type=int, default=1, help="that serve at the beginning")
    parser.add_argument("--min-engines", type=int, default=1)
    parser.add_argument("--max-engines", type=int, default=10_000)
    for name in ("target_load", "target_queue_delay_s", "upscale_delay_s", "downscale_delay_s"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=fields[name].default, help="as in the config")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the numbers over time")
    return parser.parse_args(argv)


def synthetic(arguments: argparse.Namespace, model: EngineModel) -> Iterator[Trace]:
    """Loads of `--peak` engines at their most."""
    peak = arguments.peak / seconds_of_engine(model)
    end_s = arguments.hours * HOUR_S
    day_s = traces.DAY_S
    shapes = {
        "steps": (traces.steps(np.array([0.2, 1, 0.4, 0.8, 0.1]) * peak, end_s / 5), end_s),
        "ramp": (traces.ramp(0.05 * peak, peak, end_s), end_s),
        "bursts": (traces.bursts(0.2 * peak, peak, 1_800, 120), end_s),
        "day": (traces.diurnal(0.1 * peak, peak), day_s),
        "day and night": (
            lambda seconds: np.maximum(0, traces.diurnal(-0.4 * peak, peak)(seconds)),
            day_s,
        ),
    }
    for name, (shape, length_s) in shapes.items():
        if not arguments.only or name in arguments.only:
            yield traces.make_trace(name, shape, length_s, np.random.default_rng(arguments.seed))


def seconds_of_engine(model: EngineModel) -> float:
    """Slots that a request a second keeps in use, in engines."""
    rng = np.random.default_rng(0)
    sample = traces.make_trace("sample", traces.steps([10.0], 1_000), 1_000, rng)
    slots = float(model.service_s(sample).mean()) / model.num_slots
    tokens = sample.context + sample.generated // 2
    pages = float((model.service_s(sample) * tokens).mean()) / model.num_tokens
    return max(slots, pages)


def recorded(arguments: argparse.Namespace) -> Iterator[Trace]:
    trace = traces.read_csv(arguments.trace)
    times = arguments.scale
    # Copies at the same moment would arrive as one.
    rng = np.random.default_rng(arguments.seed)
    arrival_s = np.repeat(trace.arrival_s, times)
    if times > 1:
        arrival_s = np.minimum(arrival_s + rng.random(len(arrival_s)), trace.end_s - 1e-6)
    order = np.argsort(arrival_s, kind="stable")
    yield replace(
        trace,
        arrival_s=arrival_s[order],
        context=np.repeat(trace.context, times)[order],
        generated=np.repeat(trace.generated, times)[order],
    )


def row(run: Run) -> dict[str, float | int | str]:
    """A run's figures."""
    delays_s = np.percentile(run.delay_s, (50, 99)) if len(run.delay_s) else (0.0, 0.0)
    return {
        "trace": run.trace.name,
        "requests": len(run.delay_s),
        "most_engines": int(run.ready.max()),
        "changes": len(run.changes),
        "turns_per_hour": round(run.turns_per_hour, 2),
        "delay_p50_s": round(float(delays_s[0]), 2),
        "delay_p99_s": round(float(delays_s[1]), 2),
        "engine_hours": round(run.engine_hours, 1),
        "oracle_hours": round(run.oracle_hours, 1),
    }


def format_runs(runs: Sequence[Run]) -> str:
    lines = [
        "| trace | requests | most engines | changes | turns an hour | queue delay p50 | p99 "
        "| engine-hours | oracle's | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        found = row(run)
        ratio = run.engine_hours / max(run.oracle_hours, 1e-9)
        lines.append(
            f"| {found['trace']} | {found['requests']:,} | {found['most_engines']:,} | "
            f"{found['changes']} | {found['turns_per_hour']:.2f} | {found['delay_p50_s']:.1f} s | "
            f"{found['delay_p99_s']:.1f} s | {found['engine_hours']:,.1f} | "
            f"{found['oracle_hours']:,.1f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Run], model: EngineModel, path: Path) -> None:
    """Draw each run's engines over time, beside the oracle's."""
    figure = Figure(figsize=(10, 2.2 * len(runs)), layout="constrained")
    places = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, run in zip(places, runs, strict=True):
        hours = np.arange(len(run.asked)) / HOUR_S
        axes.fill_between(
            hours, run.running / model.num_slots, color="0.85", label="slots in use, in engines"
        )
        axes.step(hours, run.asked, where="post", color="C0", label="asked for")
        axes.step(hours, run.ready, where="post", color="C2", linewidth=0.9, label="serving")
        axes.step(
            hours,
            run.oracle,
            where="post",
            color="C1",
            linestyle=":",
            label="oracle, start included",
        )
        axes.set_title(run.trace.name, loc="left", fontsize=10)
        axes.set_ylabel("engines")
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
    places[-1].set_xlabel("hours")
    figure.legend(*places[-1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
