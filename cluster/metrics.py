"""What a router counts and its engine tells, under the names that dashboards for vLLM read.

Each router has its own registry and shows it at `/metrics`.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.stats import EngineStats

_LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


_ENGINE_COUNTERS = {
    "vllm:num_preemptions": ("preemptions_total", "Requests whose pages were taken from them."),
    "vllm:prefix_cache_queries": ("prompt_tokens_total", "Prompt tokens that were looked up."),
    "vllm:prefix_cache_hits": ("cached_tokens_total", "Prompt tokens that needed no computing."),
    "qwen_on_ray:engine_steps": ("steps_total", "Steps that the engine planned."),
    "qwen_on_ray:engine_padding_tokens": (
        "padding_tokens_total",
        "Token rows that compiled programs computed and nobody wanted.",
    ),
    "qwen_on_ray:engine_compiles": (
        "compiles_total",
        "Programs compiled while serving; anything but 0 is a fault.",
    ),
    "qwen_on_ray:engine_host_ms": ("host_ms_total", "Leader's time in planning and taking in."),
    "qwen_on_ray:engine_wait_ms": ("wait_ms_total", "Leader's time in waiting for results."),
    "qwen_on_ray:engine_device_ms": ("device_ms_total", "From dispatch to result, on rank 0."),
}
_ENGINE_GAUGES = {
    "vllm:kv_cache_usage_perc": ("page_use", "Share of KV pages that requests hold, 0 to 1."),
    "qwen_on_ray:engine_requests_running": ("num_running", "Requests that have a slot."),
    "qwen_on_ray:engine_requests_waiting": ("num_waiting", "Requests that wait for one."),
}


class RouterMetrics(Collector):
    """A router's counters; belongs to one event loop.

    Args:
        model_name: The label that every series carries.

    Attributes:
        engine_stats: The engine's figures, to be set before they are shown.
        num_generated_tokens: Tokens of all requests so far. Like the histogram of times between
            tokens, without prometheus_client's locks: they would cost more than a token's text.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.engine_stats = EngineStats()
        self.num_generated_tokens = 0
        self._inter_token_counts = [0] * (len(_LATENCY_BUCKETS_S) + 1)
        self._inter_token_sum_s = 0.0

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, ["model_name", *labels], registry=self.registry)

        def gauge(name: str, help_text: str) -> Gauge:
            metric = Gauge(name, help_text, ["model_name"], registry=self.registry)
            return metric.labels(model_name)

        def histogram(name: str, help_text: str) -> Histogram:
            metric = Histogram(
                name,
                help_text,
                ["model_name"],
                registry=self.registry,
                buckets=_LATENCY_BUCKETS_S,
            )
            return metric.labels(model_name)

        self._model_name = model_name
        self.registry.register(self)
        self.prompt_tokens = counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that began."
        ).labels(model_name)
        self._finished = counter(
            "vllm:request_success", "Choices that ended, by how.", "finished_reason"
        )
        self._errors = counter(
            "qwen_on_ray:request_errors", "Requests that ended in an error, by status.", "status"
        )
        self.special_tokens_in_messages = counter(
            "qwen_on_ray:special_tokens_in_messages",
            "Chat requests whose messages spell out a control token, which the model reads as one.",
        ).labels(model_name)
        self.num_requests_waiting = gauge(
            "vllm:num_requests_waiting", "Sequences in this router without a token so far."
        )
        self.num_requests_running = gauge(
            "vllm:num_requests_running", "Sequences in this router that have begun."
        )
        self.time_to_first_token_s = histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to a choice's first token.",
        )
        self.request_latency_s = histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end."
        )

    def observe_inter_token_latency(self, latency_s: float, num_tokens: int) -> None:
        """Count tokens that came together, so long after the ones before them."""
        self._inter_token_counts[bisect_left(_LATENCY_BUCKETS_S, latency_s / num_tokens)] += 1
        self._inter_token_sum_s += latency_s / num_tokens

    def count_finished(self, finish_reason: str) -> None:
        """Count a choice that ended by stop, length or abort (the client left)."""
        self._finished.labels(self._model_name, finish_reason).inc()

    def count_error(self, status: int) -> None:
        """Count a request that ended in an error."""
        self._errors.labels(self._model_name, str(status)).inc()

    def collect(self) -> Iterable[Metric]:
        """The engine's figures and those that are counted here, for the registry."""
        tokens = CounterMetricFamily(
            "vllm:generation_tokens", "Tokens that were generated.", labels=["model_name"]
        )
        tokens.add_metric([self._model_name], self.num_generated_tokens)
        yield tokens
        latency = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Between tokens of a choice.",
            labels=["model_name"],
        )
        bounds = [*map(floatToGoString, _LATENCY_BUCKETS_S), "+Inf"]
        latency.add_metric(
            [self._model_name],
            list(zip(bounds, accumulate(self._inter_token_counts), strict=True)),
            self._inter_token_sum_s,
        )
        yield latency
        for families, figures in (
            (CounterMetricFamily, _ENGINE_COUNTERS),
            (GaugeMetricFamily, _ENGINE_GAUGES),
        ):
            for name, (attribute, help_text) in figures.items():
                family = families(name, help_text, labels=["model_name"])
                family.add_metric([self._model_name], getattr(self.engine_stats, attribute))
                yield family

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
