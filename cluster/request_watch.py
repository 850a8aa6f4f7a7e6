"""What a request's updates mean for the waiting room and for the metrics."""

import time
from types import TracebackType
from typing import Self

from cluster.admission import Ticket
from cluster.metrics import RouterMetrics
from cluster.openai.engine_client import GenerateRequest
from cluster.openai.generation import ChoiceUpdate


class RequestWatch:
    """Counts one request from its arrival to its end, whichever way it ends.

    Args:
        request: Whose choices are counted one by one.
        ticket: Gives its place in the waiting room back as choices begin.
        metrics: The router's.
        arrival_s: By the monotonic clock.
    """

    def __init__(
        self, request: GenerateRequest, ticket: Ticket, metrics: RouterMetrics, arrival_s: float
    ) -> None:
        self._choices = request.choices
        self._ticket = ticket
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._last_token_s: dict[int, float] = {}
        self._unfinished = set(range(len(request.choices)))

    def __enter__(self) -> Self:
        return self

    def take(self, update: ChoiceUpdate) -> None:
        """Count one update."""
        metrics = self._metrics
        index = update.index
        now_s = time.monotonic()
        before_s = self._last_token_s.get(index)
        if before_s is None:
            self._ticket.started(len(self._choices[index].prompt_token_ids))
            metrics.num_requests_running.inc()
            metrics.time_to_first_token_s.observe(now_s - self._arrival_s)
        elif update.num_tokens:
            metrics.observe_inter_token_latency(now_s - before_s, update.num_tokens)
        self._last_token_s[index] = now_s
        metrics.num_generated_tokens += update.num_tokens
        if update.finish_reason is not None:
            self._unfinished.discard(index)
            metrics.num_requests_running.dec()
            metrics.count_finished(update.finish_reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._metrics.request_latency_s.observe(time.monotonic() - self._arrival_s)
        for index in self._unfinished:
            self._metrics.count_finished("abort")
            if index in self._last_token_s:
                self._metrics.num_requests_running.dec()
