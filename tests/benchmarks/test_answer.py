"""Streams as servers send them, cut anywhere: how many tokens came when."""

import json

import pytest

from benchmarks.serving.answer import Answer
from benchmarks.serving.results import Arrival


def event(text: str | None = None, *, usage: dict | None = None, **fields: object) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    value = {"choices": choices, "usage": usage, **fields}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def usage(num_tokens: int) -> dict:
    return {"prompt_tokens": 3, "completion_tokens": num_tokens}


def arrivals(*parts: bytes) -> tuple[Arrival, ...]:
    """Feed the parts a second apart."""
    answer = Answer()
    for at_s, part in enumerate(parts, start=1):
        answer.feed(part, float(at_s))
    return answer.arrivals()


def test_one_token_an_event():
    expected = (Arrival(1.0, 1), Arrival(2.0, 1))
    assert arrivals(event("a"), event("bcd"), event(usage=usage(2))) == expected


def test_events_that_come_together_arrived_together():
    expected = (Arrival(1.0, 1), Arrival(2.0, 2))
    assert arrivals(event("a"), event("b") + event("c"), event(usage=usage(3))) == expected


def test_tokens_beyond_one_an_event_go_by_length_of_text():
    expected = (Arrival(1.0, 1), Arrival(2.0, 5))
    assert arrivals(event("a"), event("bcdefghij"), event(usage=usage(6))) == expected


def test_usage_with_every_event_counts_exactly():
    parts = event("abcdefgh", usage=usage(1)), event("i", usage=usage(6)), event(usage=usage(6))
    assert arrivals(*parts) == (Arrival(1.0, 1), Arrival(2.0, 5))


def test_events_without_text_hold_no_tokens():
    parts = event(""), event("a"), event("b"), event(""), event(usage=usage(2))
    assert arrivals(*parts) == (Arrival(2.0, 1), Arrival(3.0, 1))


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning"])
def test_chat_deltas_count_once_they_have_content(key):
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    content = b'data: {"choices": [{"delta": {"%s": "a"}}]}\n\n' % key.encode()
    assert arrivals(role, content, event(usage=usage(1))) == (Arrival(2.0, 1),)


def test_a_stream_may_be_cut_anywhere_and_use_any_line_ends():
    stream = b": comment\r\n\r\n" + event("ä") + event("b").replace(b"\n", b"\r\n")
    stream += event(usage=usage(2)) + b"data: [DONE]\n\n"
    for size in (1, 2, 7, len(stream)):
        answer = Answer(keeps_text=True)
        for start in range(0, len(stream), size):
            answer.feed(stream[start : start + size], float(start))
        assert answer.text == "äb"
        assert answer.is_done
        assert sum(arrival.num_tokens for arrival in answer.arrivals()) == 2


@pytest.mark.parametrize("error", ["it died", {"message": "it died", "code": 500}])
def test_an_error_amid_the_stream_is_kept(error):
    answer = Answer()
    answer.feed(event("a") + b"data: " + json.dumps({"error": error}).encode() + b"\n\n", 1.0)
    assert answer.error == "it died"
