"""Answers whose connection broke, gone on with after any of their events; the engine is a fake."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine

from cluster.openai.engine_client import ChoiceRequest
from cluster.openai.event_id import Position, Sent, parse_event_id
from cluster.service import OpenAIService
from engine.errors import RequestError

MODEL = "Tiny/Tiny-Chat"
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
# Characters of several tokens, and a stop string that begins twice before it is whole.
ANSWERS = ("Once upon a 日本 time 👍 there", "The end, the en, the end of it.")


@dataclass(slots=True)
class Read:
    """A stream as a client reads it.

    Attributes:
        ids: Each event's own, or the last one before it.
        events: The objects, in order.
        is_whole: [DONE] came.
    """

    ids: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    is_whole: bool = False


def read(body: str) -> Read:
    got, event_id = Read(), ""
    for line in body.splitlines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            got.is_whole = True
        elif line.startswith("data: "):
            got.ids.append(event_id)
            got.events.append(json.loads(line.removeprefix("data: ")))
    return got


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client has that read these events; two streams may cut it at different places."""
    found: dict[str, Any] = {"usage": None, "heading": set(), "choices": {}}
    for event in events:
        found["usage"] = event.get("usage") or found["usage"]
        found["heading"].add((event["id"], event["created"], event["system_fingerprint"]))
        for choice in event["choices"]:
            kept = found["choices"].setdefault(
                choice["index"], {"roles": 0, "text": "", "logprobs": [], "ends": []}
            )
            delta = choice.get("delta", {})
            kept["roles"] += "role" in delta
            kept["text"] += delta.get("content") or choice.get("text") or ""
            logprobs = choice.get("logprobs") or {}
            kept["logprobs"] += logprobs.get("content") or list(
                zip(*(logprobs[name] for name in sorted(logprobs)), strict=True)
            )
            if choice["finish_reason"] is not None:
                kept["ends"].append((choice["finish_reason"], choice.get("stop_reason")))
    return found


@pytest.fixture
def engine(service_and_engine: tuple[OpenAIService, FakeEngine]) -> FakeEngine:
    engine = service_and_engine[1]

    def answer(choice: ChoiceRequest) -> str:
        return ANSWERS[choice.sample_index]

    engine.answer = answer
    return engine


async def go_on(client: httpx.AsyncClient, name: str, last_id: str) -> httpx.Response:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    return await client.get(f"/v1/streams/{name}", headers=headers)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", CHAT),
        ("chat/completions", CHAT | {"n": 2, "stream_options": {"include_usage": True}}),
        ("chat/completions", CHAT | {"n": 2, "stop": ["the end"], "logprobs": True}),
        ("chat/completions", CHAT | {"n": 2, "max_tokens": 7}),
        ("completions", {"prompt": ["Hello", "Goodbye"], "n": 2, "echo": True, "logprobs": 2}),
        ("completions", {"prompt": "Hello", "n": 2, "echo": True, "stop": "end"}),
    ],
)
async def test_a_stream_goes_on_after_any_of_its_events(
    path: str, fields: Mapping[str, Any], client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    request = {"model": MODEL, "stream": True, **fields}
    whole = read((await client.post(f"/v1/{path}", json=request)).text)
    assert whole.is_whole
    expected = summary(whole.events)
    assert expected["choices"]
    name = whole.events[0]["id"]
    engine.aborted_choices.clear()
    for index, last_id in enumerate(["", *whole.ids]):
        if last_id == "" and index > 0:
            continue  # Who has no event with an id begins anew.
        if index < len(whole.ids) and whole.ids[index] == last_id:
            continue  # Of events with the same id the last one is what a client has.
        response = await go_on(client, name, last_id)
        rest = read(response.text)
        assert rest.is_whole, response.text
        had = whole.events[:index] if last_id else []
        events = [*had, *rest.events]
        if last_id == whole.ids[-1]:
            assert not any(event["choices"] for event in rest.events)
        assert summary(events) == expected


async def test_an_engine_goes_on_where_the_record_ends(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    request = {"model": MODEL, "stream": True, **CHAT}
    whole = read((await client.post("/v1/chat/completions", json=request)).text)
    engine.failure = 5, ConnectionResetError()
    broken = read((await client.post("/v1/chat/completions", json=request)).text)
    assert not broken.is_whole
    engine.failure = None
    events = [event for event in broken.events if "error" not in event]
    last_id = broken.ids[len(events) - 1]
    rest = read((await go_on(client, events[0]["id"], last_id)).text)
    assert rest.is_whole
    texts = [
        "".join(event["choices"][0]["delta"].get("content", "") for event in each)
        for each in (whole.events, [*events, *rest.events])
    ]
    assert texts[0] == texts[1] == ANSWERS[0]
    assert len(engine.requests) == 3, "what had not come was asked of the engine"


async def test_a_whole_answer_may_be_fetched_again(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={"model": MODEL, **CHAT})
    again = await go_on(client, answer.json()["id"], "")
    assert again.json() == answer.json()


async def test_a_stream_that_nobody_knows_is_gone(client: httpx.AsyncClient) -> None:
    response = await go_on(client, "chatcmpl-0", "one:3")
    assert response.status_code == 410
    assert response.json()["error"]["code"] == "stream_gone"


@pytest.mark.parametrize("last_id", ["12", "one:", "one:x", "one:1,2", "one:-1", "one:9999", ":٣"])
async def test_an_id_of_no_event_of_the_stream_is_refused(
    last_id: str, client: httpx.AsyncClient
) -> None:
    request = {"model": MODEL, "stream": True, **CHAT}
    whole = read((await client.post("/v1/chat/completions", json=request)).text)
    name = whole.events[0]["id"]
    response = await client.get(
        f"/v1/streams/{name}", headers=[(b"Last-Event-ID", last_id.encode())]
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "Last-Event-ID")


def test_an_events_id_tells_how_much_was_sent() -> None:
    position = parse_event_id("3f9x2k1a:12,7.,-")
    assert position == Position(
        "3f9x2k1a", (Sent(12, is_ended=False), Sent(7, is_ended=True), None)
    )
    with pytest.raises(RequestError, match="Last-Event-ID"):
        parse_event_id("1" * 40)
