"""Every metric: its name, what it says, and where its figure comes from. The one list of them.

Names that vLLM has mean here what they mean there, for the dashboards and schedulers that read
them; what others lack is under `qwen_on_ray:`. `cluster.exposition` shows the list at a router's
`/metrics`, `cluster.ray_metrics` gives it to Ray, with an underscore in the colon's place and
`ray_` before it. docs/monitoring.md has it as a table.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, Literal, TypeVar

from prometheus_client.utils import floatToGoString

from cluster.openai.engine_client import EngineInfo
from cluster.router_stats import RouterStats
from engine.errors import DEATH_CAUSES
from engine.stats import Histogram

Kind = Literal["counter", "gauge", "histogram", "info"]
Figure = float | Histogram | Mapping[str, float] | Mapping[str, str]

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(Generic[S]):
    """One metric.

    Attributes:
        name: Without the endings that its kind adds.
        kind: A counter's name ends in _total, a histogram's in _bucket, _sum and _count. An info
            is a gauge of 1 whose labels are what it says.
        help_text: One line.
        read: Gives a number, a histogram, numbers by `label`, or the labels of an info.
        label: Tells the numbers apart where `read` gives several.
        is_of_fleet: At a router, one number of all engines together, without the label `engine`:
            for readers that expect one.
    """

    name: str
    kind: Kind
    help_text: str
    read: Callable[[S], Figure]
    label: str = ""
    is_of_fleet: bool = False

    @property
    def series(self) -> tuple[str, ...]:
        """Names that Prometheus knows it by."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)

    def samples(self, source: S) -> Iterator[tuple[str, dict[str, str], float]]:
        """Each series of the metric: its name, the labels that are its own, its value."""
        figure = self.read(source)
        if isinstance(figure, Histogram):
            bucket, total, count = self.series
            bounds = [*map(floatToGoString, figure.bounds), "+Inf"]
            for bound, num_below in zip(bounds, accumulate(figure.counts), strict=True):
                yield bucket, {"le": bound}, num_below
            yield total, {}, figure.total
            yield count, {}, figure.num_figures
        elif not isinstance(figure, Mapping):
            yield self.series[0], {}, figure
        elif self.kind == "info":
            yield self.name, {label: str(value) for label, value in figure.items()}, 1.0
        else:
            for value, number in figure.items():
                yield self.series[0], {self.label: value}, float(number)


def ray_name(name: str) -> str:
    """The name under which Ray shows a series; Ray adds the first part by itself."""
    return f"ray_{name.replace(':', '_')}"


def _step_seconds(info: EngineInfo) -> dict[str, float]:
    stats = info.stats
    return {
        "host": stats.host_ms_total / 1e3,
        "device": stats.device_ms_total / 1e3,
        "wait": stats.wait_ms_total / 1e3,
    }


def _cache_config(info: EngineInfo) -> dict[str, str]:
    return {"block_size": str(info.page_size), "num_gpu_blocks": str(info.stats.num_pages)}


ENGINE_METRICS: tuple[Metric[EngineInfo], ...] = (
    Metric(
        name="vllm:num_requests_running",
        kind="gauge",
        help_text="Sequences that have a slot.",
        read=lambda info: info.stats.num_running,
        is_of_fleet=True,
    ),
    Metric(
        name="vllm:num_requests_waiting",
        kind="gauge",
        help_text="Sequences that wait for a slot.",
        read=lambda info: info.stats.num_waiting,
        is_of_fleet=True,
    ),
    Metric(
        name="vllm:kv_cache_usage_perc",
        kind="gauge",
        help_text="Share of the KV pages that sequences hold, 0 to 1.",
        read=lambda info: info.stats.page_use,
        is_of_fleet=True,
    ),
    Metric(
        name="vllm:gpu_cache_usage_perc",
        kind="gauge",
        help_text="The same by its older name, which some schedulers read.",
        read=lambda info: info.stats.page_use,
        is_of_fleet=True,
    ),
    Metric(
        name="vllm:cache_config_info",
        kind="info",
        help_text="Tokens in a KV page, and how many pages an engine has.",
        read=_cache_config,
    ),
    Metric(
        name="vllm:prompt_tokens",
        kind="counter",
        help_text="Prompt tokens of sequences that were queued.",
        read=lambda info: info.stats.prompt_tokens_total,
    ),
    Metric(
        name="vllm:generation_tokens",
        kind="counter",
        help_text="Tokens that were generated.",
        read=lambda info: info.stats.generated_tokens_total,
    ),
    Metric(
        name="vllm:request_success",
        kind="counter",
        help_text="Sequences that ended: stop, length, or abort where the client left.",
        read=lambda info: {"stop": 0, "length": 0, "abort": 0} | info.stats.finished_total,
        label="finished_reason",
    ),
    Metric(
        name="vllm:num_preemptions",
        kind="counter",
        help_text="Sequences whose pages were taken from them.",
        read=lambda info: info.stats.preemptions_total,
    ),
    Metric(
        name="vllm:prefix_cache_queries",
        kind="counter",
        help_text="Prompt tokens that were looked up in the prefix cache.",
        read=lambda info: info.stats.prompt_tokens_total,
    ),
    Metric(
        name="vllm:prefix_cache_hits",
        kind="counter",
        help_text="Prompt tokens that were found there and needed no computing.",
        read=lambda info: info.stats.cached_tokens_total,
    ),
    Metric(
        name="vllm:time_to_first_token_seconds",
        kind="histogram",
        help_text="From a sequence's arrival at its engine to its first token.",
        read=lambda info: info.stats.time_to_first_token_s,
    ),
    Metric(
        name="vllm:inter_token_latency_seconds",
        kind="histogram",
        help_text="Between a sequence's tokens.",
        read=lambda info: info.stats.inter_token_latency_s,
    ),
    Metric(
        name="vllm:time_per_output_token_seconds",
        kind="histogram",
        help_text="The same by its older name, which some schedulers read.",
        read=lambda info: info.stats.inter_token_latency_s,
    ),
    Metric(
        name="vllm:request_time_per_output_token_seconds",
        kind="histogram",
        help_text="Mean time between tokens, per sequence.",
        read=lambda info: info.stats.time_per_output_token_s,
    ),
    Metric(
        name="vllm:e2e_request_latency_seconds",
        kind="histogram",
        help_text="From a sequence's arrival at its engine to its last token.",
        read=lambda info: info.stats.latency_s,
    ),
    Metric(
        name="vllm:request_queue_time_seconds",
        kind="histogram",
        help_text="From arrival to a slot.",
        read=lambda info: info.stats.queue_time_s,
    ),
    Metric(
        name="vllm:request_prefill_time_seconds",
        kind="histogram",
        help_text="From the slot to the first token.",
        read=lambda info: info.stats.prefill_time_s,
    ),
    Metric(
        name="vllm:request_decode_time_seconds",
        kind="histogram",
        help_text="From the first token to the last.",
        read=lambda info: info.stats.decode_time_s,
    ),
    Metric(
        name="vllm:request_prompt_tokens",
        kind="histogram",
        help_text="Tokens of a prompt.",
        read=lambda info: info.stats.prompt_len,
    ),
    Metric(
        name="vllm:request_generation_tokens",
        kind="histogram",
        help_text="Tokens that a sequence got.",
        read=lambda info: info.stats.output_len,
    ),
    Metric(
        name="vllm:iteration_tokens_total",
        kind="histogram",
        help_text="Tokens that a step computed and somebody wanted.",
        read=lambda info: info.stats.step_tokens,
    ),
    Metric(
        name="qwen_on_ray:engine_up",
        kind="gauge",
        help_text="1 while every host of the engine answers and it takes requests, else 0.",
        read=lambda info: float(info.is_ready),
    ),
    Metric(
        name="qwen_on_ray:engine_epoch",
        kind="gauge",
        help_text="How often the engine's hosts were started.",
        read=lambda info: info.epoch,
    ),
    Metric(
        name="qwen_on_ray:engine_restarts",
        kind="counter",
        help_text="Epochs that ended, by cause: a host died, was silent (frozen, or its link cut), "
        "failed with an error, or the leader's own loop failed.",
        read=lambda info: dict.fromkeys(DEATH_CAUSES, 0) | info.stats.restarts_total,
        label="cause",
    ),
    Metric(
        name="qwen_on_ray:engine_requests_running",
        kind="gauge",
        help_text="Sequences that have a slot, per engine.",
        read=lambda info: info.stats.num_running,
    ),
    Metric(
        name="qwen_on_ray:engine_requests_waiting",
        kind="gauge",
        help_text="Sequences that wait for a slot, per engine.",
        read=lambda info: info.stats.num_waiting,
    ),
    Metric(
        name="qwen_on_ray:engine_requests_moved",
        kind="counter",
        help_text="Requests that came here because the engine that had them died.",
        read=lambda info: info.stats.moved_total,
    ),
    Metric(
        name="qwen_on_ray:engine_pages",
        kind="gauge",
        help_text="KV pages that the engine has.",
        read=lambda info: info.stats.num_pages,
    ),
    Metric(
        name="qwen_on_ray:engine_pages_used",
        kind="gauge",
        help_text="KV pages that sequences hold; others may be cached prefixes.",
        read=lambda info: info.stats.num_pages_used,
    ),
    Metric(
        name="qwen_on_ray:engine_steps",
        kind="counter",
        help_text="Steps that were planned.",
        read=lambda info: info.stats.steps_total,
    ),
    Metric(
        name="qwen_on_ray:engine_step_seconds",
        kind="counter",
        help_text="Time of steps by part: host (the leader plans and takes in), device (from "
        "dispatch to result, on rank 0), wait (the leader has nothing else to do).",
        read=_step_seconds,
        label="part",
    ),
    Metric(
        name="qwen_on_ray:engine_scheduled_tokens",
        kind="counter",
        help_text="Token rows that programs computed and somebody wanted.",
        read=lambda info: info.stats.scheduled_tokens_total,
    ),
    Metric(
        name="qwen_on_ray:engine_padding_tokens",
        kind="counter",
        help_text="Token rows that programs computed and nobody wanted.",
        read=lambda info: info.stats.padding_tokens_total,
    ),
    Metric(
        name="qwen_on_ray:engine_compiles",
        kind="counter",
        help_text="Programs compiled while serving; anything but 0 is a fault.",
        read=lambda info: info.stats.compiles_total,
    ),
)

ROUTER_METRICS: tuple[Metric[RouterStats], ...] = (
    Metric(
        name="qwen_on_ray:router_requests",
        kind="counter",
        help_text="Requests that ended, by HTTP status; 499 where the client left before.",
        read=lambda stats: {"200": 0} | stats.requests_total,
        label="status",
    ),
    Metric(
        name="qwen_on_ray:router_choices",
        kind="counter",
        help_text="Choices that ended, as clients saw it: stop, length or abort (the client left).",
        read=lambda stats: {"stop": 0, "length": 0, "abort": 0} | stats.finished_total,
        label="finished_reason",
    ),
    Metric(
        name="qwen_on_ray:router_choices_moved",
        kind="counter",
        help_text="Choices that went on in another attempt, because their engine had died.",
        read=lambda stats: stats.moved_total,
    ),
    Metric(
        name="qwen_on_ray:router_choices_running",
        kind="gauge",
        help_text="Choices of this router that have begun.",
        read=lambda stats: stats.num_running,
    ),
    Metric(
        name="qwen_on_ray:router_choices_waiting",
        kind="gauge",
        help_text="Choices of this router without a token, whether an engine has them or not.",
        read=lambda stats: stats.num_waiting,
    ),
    Metric(
        name="qwen_on_ray:router_special_tokens_in_messages",
        kind="counter",
        help_text="Chat requests whose messages spell out a control token, which the model reads "
        "as one.",
        read=lambda stats: stats.special_tokens_in_messages_total,
    ),
    Metric(
        name="qwen_on_ray:router_time_to_first_token_seconds",
        kind="histogram",
        help_text="From a request's arrival at its router to a choice's first token.",
        read=lambda stats: stats.time_to_first_token_s,
    ),
    Metric(
        name="qwen_on_ray:router_request_latency_seconds",
        kind="histogram",
        help_text="From a request's arrival at its router to its end.",
        read=lambda stats: stats.latency_s,
    ),
    Metric(
        name="qwen_on_ray:router_inter_token_latency_seconds",
        kind="histogram",
        help_text="Between a choice's tokens as its router gets them, pauses of dead engines too.",
        read=lambda stats: stats.inter_token_latency_s,
    ),
)
