"""The figures of a benchmark: as a dict (names as SGLang writes them), a table and a line of JSON.

TPOT is (E2E latency - TTFT) / (output tokens - 1), per request; ITL has one sample per token, over
all requests (`RequestResult.itls_s`).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.results import RequestResult

WIDTH = 50
MAX_ERRORS_SHOWN = 3
LATENCIES = {
    "e2e_latency": ("End-to-End Latency", "E2E Latency"),
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-Token Latency", "ITL"),
}

Summary = dict[str, int | float | None]


def summarise(results: Sequence[RequestResult], duration_s: float) -> Summary:
    """Compute the figures of the requests that succeeded; milliseconds, tokens and seconds."""
    done = [result for result in results if result.error is None]
    total_input = sum(result.prompt_len for result in done)
    total_output = sum(result.output_len for result in done)
    summary: Summary = {
        "completed": len(done),
        "failed": len(results) - len(done),
        "duration": duration_s,
        "total_input_tokens": total_input,
        "total_cached_tokens": sum(result.num_cached_tokens for result in done),
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration_s,
        "input_throughput": total_input / duration_s,
        "output_throughput": total_output / duration_s,
        "total_throughput": (total_input + total_output) / duration_s,
        "concurrency": sum(result.latency_s for result in done) / duration_s,
    }
    samples = {
        "e2e_latency": [result.latency_s for result in done],
        "ttft": [result.ttft_s for result in done if result.ttft_s is not None],
        "tpot": [result.tpot_s for result in done if result.tpot_s is not None],
        "itl": [sample for result in done for sample in result.itls_s],
    }
    for name, values_s in samples.items():
        values_ms = np.array(values_s) * 1e3
        for statistic, compute in {
            "mean": np.mean,
            "median": np.median,
            "std": np.std,
            "p90": lambda values: np.percentile(values, 90),
            "p99": lambda values: np.percentile(values, 99),
        }.items():
            key = f"{statistic}_{name}_ms"
            summary[key] = float(compute(values_ms)) if len(values_ms) else None
    return summary


def format_table(summary: Summary, headings: Mapping[str, object]) -> str:
    """Lay the figures out as the field's benchmarks do.

    Args:
        headings: Lines that come first: what was measured.
    """
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [format_line(f"{name}:", value) for name, value in headings.items()]
    lines += [
        format_line("Successful requests:", summary["completed"]),
        format_line("Failed requests:", summary["failed"]),
        format_line("Benchmark duration (s):", summary["duration"]),
        format_line("Total input tokens:", summary["total_input_tokens"]),
        format_line("Total cached tokens:", summary["total_cached_tokens"]),
        format_line("Total generated tokens:", summary["total_output_tokens"]),
        format_line("Request throughput (req/s):", summary["request_throughput"]),
        format_line("Input token throughput (tok/s):", summary["input_throughput"]),
        format_line("Output token throughput (tok/s):", summary["output_throughput"]),
        format_line("Total token throughput (tok/s):", summary["total_throughput"]),
        format_line("Concurrency:", summary["concurrency"]),
    ]
    for name, (title, short) in LATENCIES.items():
        lines.append(f"{title:-^{WIDTH}}")
        for statistic in ("mean", "median", "p99"):
            label = f"{statistic.capitalize()} {short} (ms):"
            lines.append(format_line(label, summary[f"{statistic}_{name}_ms"]))
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def format_line(label: str, value: object) -> str:
    """One line of a table of figures; None is shown as n/a."""
    if value is None:
        shown = "n/a"
    else:
        shown = f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return f"{label:<40} {shown:<10}".rstrip()


def find_faults(
    results: Sequence[RequestResult], *, has_exact_output: bool, has_exact_input: bool
) -> list[str]:
    """Say in warning lines what makes the figures mean something else than was asked for.

    Args:
        has_exact_output: End tokens are ignored, so outputs have the lengths asked for.
        has_exact_input: Prompts are sent as they are, without a chat template.
    """
    warnings = describe_failures(results)
    done = [result for result in results if result.error is None]
    pairs = []
    if has_exact_input:
        pairs.append(("prompt", [(r.request.prompt_len, r.prompt_len) for r in done]))
    if has_exact_output:
        pairs.append(("output", [(r.request.output_len, r.output_len) for r in done]))
    for kind, lens in pairs:
        wrong = [(asked, got) for asked, got in lens if asked is not None and asked != got]
        if wrong:
            asked, got = wrong[0]
            warnings.append(
                f"the server's usage differs from what was asked for: {len(wrong)} of {len(done)} "
                f"requests have another {kind} length, the first {got} tokens for {asked}."
            )
    return warnings


def describe_failures(results: Sequence[RequestResult]) -> list[str]:
    """Say in warning lines how many requests failed, and why."""
    errors = Counter(result.error for result in results if result.error is not None)
    if not errors:
        return []
    lines = [f"{errors.total()} of {len(results)} requests failed:"]
    lines += [f"  {count} x {error}" for error, count in errors.most_common(MAX_ERRORS_SHOWN)]
    if len(errors) > MAX_ERRORS_SHOWN:
        lines.append(f"  and {len(errors) - MAX_ERRORS_SHOWN} other messages")
    return lines


def append_json(
    path: Path, summary: Summary, arguments: Mapping[str, Any], details: Mapping[str, Any]
) -> None:
    """Append arguments and figures to a file as one line of JSON."""
    line = {**arguments, **summary, **details}
    text = json.dumps({key: _finite(value) for key, value in line.items()})
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def request_details(results: Sequence[RequestResult]) -> dict[str, list[Any]]:
    """List every request's figures, in the order in which requests were sent; seconds."""
    ordered = sorted(results, key=lambda result: result.start_s)
    first_s = ordered[0].start_s if ordered else 0.0
    return {
        "start_times": [result.start_s - first_s for result in ordered],
        "input_lens": [result.prompt_len for result in ordered],
        "output_lens": [result.output_len for result in ordered],
        "e2e_latencies": [result.latency_s for result in ordered],
        "ttfts": [result.ttft_s for result in ordered],
        "itls": [result.itls_s for result in ordered],
        "generated_texts": [result.thoughts + result.text for result in ordered],
        "errors": [result.error or "" for result in ordered],
    }


def _finite(value: Any) -> Any:
    # JSON knows no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
