"""What a router has done and is doing, in numbers; the counterpart of `engine.stats`.

Plain numbers: the locks of a metrics library would cost more than a token's text.
"""

from dataclasses import dataclass, field

from engine.stats import Histogram, count, latencies

CLIENT_LEFT = 499
"""In the place of an HTTP status, for requests whose client did not wait for their end."""


@dataclass(slots=True)
class RouterStats:
    """A router's counters and state; belongs to one event loop.

    Attributes:
        num_running: Choices that have begun and not ended.
        num_waiting: Choices without a token so far, whether an engine has them or not.
        requests_total: Requests that were answered or refused, by HTTP status. A stream that
            breaks counts under the status that its error would have had, one whose client left
            under `CLIENT_LEFT`.
        finished_total: Choices that ended, by how: stop, length or abort (the client left).
        moved_total: Choices that went on in another attempt, because their engine had died.
        special_tokens_in_messages_total: Chat requests whose messages spell out a control token.
        time_to_first_token_s: From a request's arrival here to a choice's first token.
        latency_s: From a request's arrival here to its end.
        inter_token_latency_s: Between a choice's tokens, as they reach this router.
    """

    num_running: int = 0
    num_waiting: int = 0
    moved_total: int = 0
    special_tokens_in_messages_total: int = 0
    requests_total: dict[str, int] = field(default_factory=dict)
    finished_total: dict[str, int] = field(default_factory=dict)
    time_to_first_token_s: Histogram = field(default_factory=latencies)
    latency_s: Histogram = field(default_factory=latencies)
    inter_token_latency_s: Histogram = field(default_factory=latencies)

    def count_request(self, status: int) -> None:
        """Count a request that has its answer."""
        count(self.requests_total, str(status))
