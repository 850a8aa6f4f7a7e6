"""What a request leaves behind at its end: a line in the log, and spans where they are wanted."""

import json
import logging
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from cluster import timeline
from cluster.openai.engine_client import ChoiceRequest, EngineVisit, GenerateRequest
from cluster.openai.generation import ChoiceUpdate
from cluster.timeline import Timeline
from engine.errors import EngineDiedError
from engine.request import RequestTiming, SamplingParams

REQUEST = GenerateRequest(
    request_id="chatcmpl-1",
    choices=(ChoiceRequest(prompt_token_ids=(1, 2, 3), sampling=SamplingParams()),),
)


def visit(engine_id: str, attempt: int, *, num_preemptions: int = 0) -> EngineVisit:
    timing = RequestTiming(
        queue_s=0.25, prefill_s=0.5, decode_s=0.0, num_preemptions=num_preemptions
    )
    return EngineVisit(
        engine_id=engine_id, epoch=4, attempt=attempt, num_cached_tokens=2, timing=timing
    )


def moved_request(arrival_s: float) -> Timeline:
    """One that got two tokens of an engine and, two seconds later, two more of another."""
    line = Timeline(REQUEST, arrival_s)
    first, second = visit("one", 0), visit("other", 1)
    last = visit("other", 1, num_preemptions=3)
    line.take(ChoiceUpdate(index=0, num_tokens=1, visit=first), arrival_s + 1)
    line.take(ChoiceUpdate(index=0, num_tokens=1), arrival_s + 1.5)
    line.take(ChoiceUpdate(index=0, num_tokens=1, visit=second), arrival_s + 3.5)
    line.take(
        ChoiceUpdate(index=0, num_tokens=1, finish_reason="length", visit=last), arrival_s + 4
    )
    return line


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(timeline, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def test_a_request_that_moved_is_one_line_with_both_engines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = moved_request(time.monotonic())
    with caplog.at_level(logging.INFO, timeline.__name__):
        line.end(None)
    (message,) = caplog.messages
    record = json.loads(message.removeprefix("timeline "))
    assert record["request_id"] == "chatcmpl-1"
    assert record["error"] is None
    (choice,) = record["choices"]
    assert (choice["prompt_tokens"], choice["tokens"]) == (3, 4)
    assert (choice["finish_reason"], choice["ended_ms"]) == ("length", 4000.0)
    assert [each["engine"] for each in choice["visits"]] == ["one", "other"]
    assert choice["visits"][1] == {
        "engine": "other",
        "epoch": 4,
        "attempt": 1,
        "cached_tokens": 2,
        "queued_ms": 250.0,
        "prefill_ms": 500.0,
        "first_token_ms": 3500.0,
        "preemptions": 3,
    }
    assert line.num_moves == 1


def test_a_request_that_failed_before_its_first_token_says_with_what(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, timeline.__name__):
        Timeline(REQUEST, time.monotonic()).end(EngineDiedError("gone"))
    record = json.loads(caplog.messages[0].removeprefix("timeline "))
    assert record["error"] == "EngineDiedError"
    assert record["choices"][0]["visits"] == []


def test_spans_lie_in_their_requests_span_one_after_the_other(spans: InMemorySpanExporter) -> None:
    moved_request(time.monotonic() - 4).end(None)
    *phases, request = spans.get_finished_spans()
    assert [span.name for span in phases] == ["queued", "prefill", "decode"] * 2
    assert request.name == "request"
    assert dict(request.attributes or {}) == {"gen_ai.response.id": "chatcmpl-1"}
    (moved,) = request.events
    assert moved.name == "moved"
    assert {span.parent.span_id for span in phases if span.parent} == {
        request.context.span_id if request.context else None
    }
    times_s = [[(at or 0) / 1e9 for at in (span.start_time, span.end_time)] for span in phases]
    assert [end_s - start_s for start_s, end_s in times_s] == pytest.approx(
        [0.25, 0.5, 2.5, 0.25, 0.5, 0.5], abs=0.001
    )
    begins_s = [start_s - (request.start_time or 0) / 1e9 for start_s, _ in times_s]
    assert begins_s == pytest.approx([0.25, 0.5, 1.0, 2.75, 3.0, 3.5], abs=0.001)


@pytest.mark.parametrize("error", [None, EngineDiedError("gone")])
def test_what_no_engine_computed_here_is_a_span_by_itself(
    spans: InMemorySpanExporter, error: Exception | None
) -> None:
    # It failed before its first token, or its tokens were another router's.
    line = Timeline(REQUEST, time.monotonic())
    if error is None:
        update = ChoiceUpdate(index=0, num_tokens=3, finish_reason="stop")
        line.take(update, time.monotonic())
    line.end(error)
    (span,) = spans.get_finished_spans()
    assert (span.name, span.status.is_ok) == ("request", error is None)


def test_a_request_outside_of_the_sample_leaves_no_span(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(timeline, "_tracer", provider.get_tracer("test"))
    moved_request(time.monotonic()).end(None)
    assert exporter.get_finished_spans() == ()
    provider.shutdown()
