"""What became of one request and when: a line in the log at its end, and spans of a trace.

The line is the logger's name and one JSON object. The spans lie under the span that Serve has made
for the HTTP request; where Serve traces nothing, or this request is not in its sample, making them
costs a microsecond and leaves nothing. Knows token counts and times, no text.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

from opentelemetry import trace

from cluster.openai.engine_client import EngineVisit, GenerateRequest
from cluster.openai.generation import ChoiceUpdate

logger = logging.getLogger(__name__)

_tracer = trace.get_tracer("qwen_on_ray")


@dataclass(slots=True)
class _Visit:
    """An attempt at an engine, and when its first token came, by the monotonic clock."""

    began_s: float
    latest: EngineVisit


@dataclass(slots=True)
class _Choice:
    num_prompt_tokens: int
    num_tokens: int = 0
    visits: list[_Visit] = field(default_factory=list)
    finish_reason: str | None = None
    ended_s: float | None = None


class Timeline:
    """One request from its arrival to its end.

    Args:
        arrival_s: By the monotonic clock; before it was parsed into tokens or held.
    """

    def __init__(self, request: GenerateRequest, arrival_s: float) -> None:
        self._request_id = request.request_id
        self._arrival_s = arrival_s
        self._submitted_s = time.monotonic()
        self._choices = [_Choice(len(each.prompt_token_ids)) for each in request.choices]

    @property
    def num_moves(self) -> int:
        """How often choices went on in another attempt, as far as tokens have come of it."""
        latest = [choice.visits[-1].latest for choice in self._choices if choice.visits]
        return sum(visit.attempt for visit in latest)

    def take(self, update: ChoiceUpdate, now_s: float) -> None:
        """Take in an update that begins a visit or ends a choice; others tell it nothing."""
        choice = self._choices[update.index]
        choice.num_tokens += update.num_tokens
        visit = update.visit
        if visit is not None:
            if choice.visits and choice.visits[-1].latest.attempt == visit.attempt:
                choice.visits[-1].latest = visit
            else:
                choice.visits.append(_Visit(now_s, visit))
        if update.finish_reason is not None:
            choice.finish_reason = update.finish_reason
            choice.ended_s = now_s

    def end(self, error: BaseException | None) -> None:
        """Write the line, and the spans where they are wanted.

        Args:
            error: What ended the request early: its own failure, or its client's leave.
        """
        ended_s = time.monotonic()
        if logger.isEnabledFor(logging.INFO):
            logger.info("timeline %s", json.dumps(self._record(ended_s, error)))
        self._trace(ended_s, error)

    def _record(self, ended_s: float, error: BaseException | None) -> dict[str, Any]:
        arrived = datetime.fromtimestamp(self._wall_s(self._arrival_s), UTC)
        return {
            "request_id": self._request_id,
            "arrived": arrived.isoformat(timespec="milliseconds"),
            "submitted_ms": self._ms(self._submitted_s),
            "ended_ms": self._ms(ended_s),
            "error": type(error).__name__ if error is not None else None,
            "choices": [self._describe(choice) for choice in self._choices],
        }

    def _describe(self, choice: _Choice) -> dict[str, Any]:
        return {
            "prompt_tokens": choice.num_prompt_tokens,
            "tokens": choice.num_tokens,
            "finish_reason": choice.finish_reason,
            "ended_ms": None if choice.ended_s is None else self._ms(choice.ended_s),
            "visits": [
                {
                    "engine": visit.latest.engine_id,
                    "epoch": visit.latest.epoch,
                    "attempt": visit.latest.attempt,
                    "cached_tokens": visit.latest.num_cached_tokens,
                    "queued_ms": round(visit.latest.timing.queue_s * 1e3, 1),
                    "prefill_ms": round(visit.latest.timing.prefill_s * 1e3, 1),
                    "first_token_ms": self._ms(visit.began_s),
                    "preemptions": visit.latest.timing.num_preemptions,
                }
                for visit in choice.visits
            ],
        }

    def _trace(self, ended_s: float, error: BaseException | None) -> None:
        request = _tracer.start_span("request", start_time=self._wall_ns(self._arrival_s))
        if not request.is_recording():
            return
        request.set_attribute("gen_ai.response.id", self._request_id)
        if error is not None:
            request.set_status(trace.StatusCode.ERROR, type(error).__name__)
        under = trace.set_span_in_context(request)
        for index, choice in enumerate(self._choices):
            for visit, following in zip_longest(choice.visits, choice.visits[1:]):
                if visit.latest.attempt:
                    request.add_event("moved", {"choice": index}, self._wall_ns(visit.began_s))
                until_s = following.began_s if following else choice.ended_s or ended_s
                for name, start_s, end_s in _phases(visit, until_s):
                    span = _tracer.start_span(
                        name,
                        context=under,
                        start_time=self._wall_ns(start_s),
                        attributes={
                            "choice": index,
                            "engine": visit.latest.engine_id,
                            "epoch": visit.latest.epoch,
                            "preemptions": visit.latest.timing.num_preemptions,
                            "gen_ai.usage.input_tokens": choice.num_prompt_tokens,
                            "gen_ai.usage.output_tokens": choice.num_tokens,
                            "gen_ai.usage.cached_tokens": visit.latest.num_cached_tokens,
                        },
                    )
                    span.end(self._wall_ns(end_s))
        request.end(self._wall_ns(ended_s))

    def _ms(self, at_s: float) -> float:
        return round((at_s - self._arrival_s) * 1e3, 1)

    def _wall_s(self, at_s: float) -> float:
        return time.time() - (time.monotonic() - at_s)

    def _wall_ns(self, at_s: float) -> int:
        return round(self._wall_s(at_s) * 1e9)


def _phases(visit: _Visit, until_s: float) -> Sequence[tuple[str, float, float]]:
    """Names, beginnings and ends of what an engine did for a choice."""
    timing = visit.latest.timing
    admitted_s = visit.began_s - timing.prefill_s
    return (
        ("queued", admitted_s - timing.queue_s, admitted_s),
        ("prefill", admitted_s, visit.began_s),
        ("decode", visit.began_s, until_s),
    )
