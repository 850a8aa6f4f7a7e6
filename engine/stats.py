"""What an engine has done and is doing, in numbers. Knows nothing of where they are shown."""

from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from typing import Any

LATENCY_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BOUNDS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(slots=True)
class Histogram:
    """How often figures lay between bounds; small enough to be sent every second.

    Attributes:
        bounds: Upper ends of the buckets, inclusive and rising; what lies above has a last one.
        counts: Figures per bucket, one more than there are bounds.
        total: Sum of all figures.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> "Histogram":
        """Make an empty one."""
        return cls(bounds, [0] * (len(bounds) + 1))

    @property
    def num_figures(self) -> int:
        return sum(self.counts)

    def observe(self, figure: float, times: int = 1) -> None:
        """Count a figure that came so many times."""
        self.counts[bisect_left(self.bounds, figure)] += times
        self.total += figure * times

    def __add__(self, other: "Histogram") -> "Histogram":
        counts = [own + others for own, others in zip(self.counts, other.counts, strict=True)]
        return Histogram(self.bounds, counts, self.total + other.total)


def latencies() -> Histogram:
    """An empty histogram of seconds."""
    return Histogram.of(LATENCY_BOUNDS_S)


def _tokens() -> Histogram:
    return Histogram.of(TOKEN_BOUNDS)


@dataclass(slots=True)
class EngineStats:
    """Counters since start (`*_total`, and the histograms), and the state after the last step.

    Attributes:
        scheduled_tokens_total: Token rows of the steps that somebody wanted.
        padding_tokens_total: Token rows that compiled programs computed and nobody wanted.
        compiles_total: Programs compiled while serving; anything but 0 is a fault.
        host_ms_total: Time in planning and in taking results in.
        wait_ms_total: Time in which the leader waited for a result.
        device_ms_total: From dispatch to result, as rank 0 measured it.
        moved_total: Requests that another attempt has left.
        served_total: Requests that have ended after they had a slot, in whichever way.
        service_s_total: Seconds from those requests' first slot to their end.
        finished_total: Requests that ended, by how: stop, length or abort.
        restarts_total: Epochs that ended, by what ended them.
        queue_time_s: From a request's arrival to its slot.
        time_to_first_token_s: From arrival to the first token; of requests that begin here.
        prefill_time_s: From the slot to the first token.
        decode_time_s: From the first token to the last.
        latency_s: From arrival to the last token.
        inter_token_latency_s: Between a request's tokens.
        time_per_output_token_s: The mean of those, per request.
        prompt_len: Tokens of a request's prompt.
        output_len: Tokens that a request got.
        step_tokens: Tokens that a step computed and somebody wanted.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages_used: int = 0
    num_pages: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    scheduled_tokens_total: int = 0
    padding_tokens_total: int = 0
    preemptions_total: int = 0
    requests_total: int = 0
    moved_total: int = 0
    served_total: int = 0
    service_s_total: float = 0.0
    compiles_total: int = 0
    host_ms_total: float = 0.0
    wait_ms_total: float = 0.0
    device_ms_total: float = 0.0
    finished_total: dict[str, int] = field(default_factory=dict)
    restarts_total: dict[str, int] = field(default_factory=dict)
    queue_time_s: Histogram = field(default_factory=latencies)
    time_to_first_token_s: Histogram = field(default_factory=latencies)
    prefill_time_s: Histogram = field(default_factory=latencies)
    decode_time_s: Histogram = field(default_factory=latencies)
    latency_s: Histogram = field(default_factory=latencies)
    inter_token_latency_s: Histogram = field(default_factory=latencies)
    time_per_output_token_s: Histogram = field(default_factory=latencies)
    prompt_len: Histogram = field(default_factory=_tokens)
    output_len: Histogram = field(default_factory=_tokens)
    step_tokens: Histogram = field(default_factory=_tokens)

    def counters(self) -> "EngineStats":
        """What stays true of an engine that is gone: its counters, without its state."""
        return replace(self, num_running=0, num_waiting=0, num_pages_used=0, num_pages=0)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Both engines' figures as one's."""
        return EngineStats(
            **{
                one.name: _sum(getattr(self, one.name), getattr(other, one.name))
                for one in fields(self)
            }
        )

    @property
    def page_use(self) -> float:
        """Share of the pages that running requests hold, 0 to 1."""
        return self.num_pages_used / self.num_pages if self.num_pages else 0.0


def count(counts: dict[str, int], name: str) -> None:
    """Count one more of that name."""
    counts[name] = counts.get(name, 0) + 1


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}
    return one + other
