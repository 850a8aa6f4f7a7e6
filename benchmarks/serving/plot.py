"""Draws a benchmark's latencies and its throughput over time, where matplotlib is installed."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.results import RequestResult


def check_can_plot() -> None:
    """Raise BenchmarkError before anything is measured if `draw` would fail after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("--plot needs matplotlib: pip install matplotlib.")


def throughput_over_time(results: Sequence[RequestResult]) -> np.ndarray:
    """Count output tokens in each second since the first request was sent."""
    done = [result for result in results if result.error is None]
    if not done:
        return np.zeros(0)
    first_s = min(result.start_s for result in done)
    last_s = max(result.start_s + result.latency_s for result in done)
    counts = np.zeros(int(last_s - first_s) + 1)
    for result in done:
        begin_s = result.start_s - first_s
        if not result.arrivals:
            counts[int(begin_s + result.latency_s)] += result.output_len
        for arrival in result.arrivals:
            counts[int(begin_s + arrival.at_s)] += arrival.num_tokens
    return counts


def draw(results: Sequence[RequestResult], path: Path) -> None:
    """Write a PNG: the share of samples below each latency, and tokens per second over time."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    done = [result for result in results if result.error is None]
    samples_s = {
        "E2E": [result.latency_s for result in done],
        "TTFT": [result.ttft_s for result in done if result.ttft_s is not None],
        "TPOT": [result.tpot_s for result in done if result.tpot_s is not None],
        "ITL": [sample for result in done for sample in result.itls_s],
    }
    figure, axes = pyplot.subplots(1, len(samples_s) + 1, figsize=(20, 4), layout="constrained")
    for axis, (name, values_s) in zip(axes, samples_s.items(), strict=False):
        values_ms = np.sort(values_s) * 1e3
        axis.plot(values_ms, np.arange(1, len(values_ms) + 1) / max(1, len(values_ms)))
        axis.set(title=name, xlabel="ms", ylabel="share of samples", ylim=(0, 1), xlim=(0, None))
    counts = throughput_over_time(results)
    axes[-1].step(np.arange(len(counts)), counts, where="post")
    axes[-1].set(title="Throughput", xlabel="s", ylabel="output tokens / s", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
