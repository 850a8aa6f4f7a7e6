"""What a request's updates mean for the waiting room, for the metrics and for its timeline."""

import asyncio
import time
from types import TracebackType
from typing import Self

from cluster.admission import Ticket
from cluster.api_keys import KeyUse
from cluster.openai.engine_client import GenerateRequest
from cluster.openai.generation import ChoiceUpdate
from cluster.router_stats import CLIENT_LEFT, RouterStats
from cluster.timeline import Timeline
from engine.stats import count


class RequestWatch:
    """Counts one request from its arrival to its end, whichever way it ends.

    Args:
        request: Whose choices are counted one by one.
        ticket: Gives its place in the waiting room back as choices begin.
        key_use: Of the key that sent it, for the tokens of the answer.
        stats: The router's.
        arrival_s: By the monotonic clock.
    """

    def __init__(
        self,
        request: GenerateRequest,
        ticket: Ticket,
        key_use: KeyUse,
        stats: RouterStats,
        arrival_s: float,
    ) -> None:
        self._choices = request.choices
        self._ticket = ticket
        self._key_use = key_use
        self._stats = stats
        self._arrival_s = arrival_s
        self._timeline = Timeline(request, arrival_s)
        self._last_token_s: dict[int, float] = {}
        self._unfinished = set(range(len(request.choices)))

    def __enter__(self) -> Self:
        return self

    def take(self, update: ChoiceUpdate) -> None:
        """Count one update."""
        stats = self._stats
        index = update.index
        now_s = time.monotonic()
        before_s = self._last_token_s.get(index)
        if before_s is None:
            self._ticket.started(len(self._choices[index].prompt_token_ids))
            stats.num_running += 1
            stats.time_to_first_token_s.observe(now_s - self._arrival_s)
        elif update.num_tokens:
            latency_s = (now_s - before_s) / update.num_tokens
            stats.inter_token_latency_s.observe(latency_s)
        self._last_token_s[index] = now_s
        self._key_use.take_tokens(update.num_tokens)
        self._timeline.take(update, now_s)
        if update.finish_reason is not None:
            self._unfinished.discard(index)
            stats.num_running -= 1
            count(stats.finished_total, update.finish_reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stats = self._stats
        if error is None:
            stats.latency_s.observe(time.monotonic() - self._arrival_s)
            stats.count_request(200)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            stats.count_request(CLIENT_LEFT)
        for index in self._unfinished:
            count(stats.finished_total, "abort")
            if index in self._last_token_s:
                stats.num_running -= 1
        stats.moved_total += self._timeline.num_moves
        self._timeline.end(error)
