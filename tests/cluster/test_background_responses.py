"""Responses in the background: generated whoever reads them, and wherever their router goes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine, make_service, serve_on_loopback
from openai import AsyncOpenAI, AsyncStream
from openai.types.responses import Response, ResponseStreamEvent

from cluster.service import OpenAIService
from engine.errors import EngineDiedError

MODEL = "Tiny/Tiny-Chat"
ASKED: dict[str, Any] = {"model": MODEL, "input": "Hello", "background": True}
TIMEOUT_S = 20


@pytest.fixture
async def other(tmp_path: Path, engine: FakeEngine) -> AsyncGenerator[AsyncOpenAI, None]:
    """A client of another router over the same engine."""
    folder = tmp_path / "other"
    folder.mkdir()
    service, _ = make_service(folder)
    service.engine = engine
    async with serve_on_loopback(service) as url, client_of(url) as client:
        yield client


@asynccontextmanager
async def client_of(url: str) -> AsyncGenerator[AsyncOpenAI, None]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def let_run(engine: FakeEngine) -> None:
    """Let the engine take all its steps, the one that it waits with too."""
    steps, engine.steps = engine.steps, None
    assert steps is not None, "its steps were held"
    steps.release()


async def ended(client: AsyncOpenAI, response_id: str) -> Response:
    """Ask for a response until it has ended, as the SDK's users do."""
    async with asyncio.timeout(TIMEOUT_S):
        while (response := await client.responses.retrieve(response_id)).status in (
            "queued",
            "in_progress",
        ):
            await asyncio.sleep(0.01)
    return response


async def streamed(client: AsyncOpenAI) -> AsyncStream[ResponseStreamEvent]:
    return await client.responses.create(model=MODEL, input="Hello", background=True, stream=True)


async def events_of(client: AsyncOpenAI, response_id: str, **fields: Any) -> list[dict[str, Any]]:
    async with asyncio.timeout(TIMEOUT_S):
        stream = await client.responses.retrieve(response_id, stream=True, **fields)
        return [event.model_dump() async for event in stream]


async def test_a_response_is_answered_at_once_and_ends_by_itself(
    sdk: AsyncOpenAI, other: AsyncOpenAI, engine: FakeEngine, url: str
) -> None:
    engine.steps = asyncio.Semaphore(0)
    response = await sdk.responses.create(**ASKED)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    for client in (sdk, other):
        assert (await client.responses.retrieve(response.id)).status == "queued"
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.create(model=MODEL, input="Go on", previous_response_id=response.id)
    assert refused.value.param == "previous_response_id"
    # Where its events would be, if it had some.
    async with asyncio.timeout(TIMEOUT_S):
        async with httpx.AsyncClient(base_url=url) as plain:
            here = await plain.get(f"/v1/streams/{response.id}")
    assert here.json()["status"] == "queued"
    let_run(engine)
    response = await ended(other, response.id)
    assert (response.status, response.output_text) == ("completed", "Once upon a time")
    assert response.usage is not None
    assert response.usage.output_tokens > 0
    # By asking where its events would be it went on in another run.
    assert engine.closed_early == [response.id]
    follow = await other.responses.create(
        model=MODEL, input="Go on", previous_response_id=response.id
    )
    assert follow.status == "completed"


async def test_events_go_on_after_any_of_them_from_any_router(
    sdk: AsyncOpenAI, other: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(2)
    stream = await streamed(sdk)
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(TIMEOUT_S):
        async for event in stream:
            seen.append(event.model_dump())
            if event.type == "response.output_text.delta":
                break
    response_id = seen[0]["response"]["id"]
    kinds = ["response.created", "response.queued", "response.in_progress"]
    assert [event["type"] for event in seen[:3]] == kinds
    assert [event["response"]["status"] for event in seen[:3]] == ["queued"] * 2 + ["in_progress"]
    await stream.close()
    let_run(engine)
    response = await ended(sdk, response_id)
    assert engine.closed_early == []
    # Tokens that have come are told one by one, as when they came.
    whole = await events_of(other, response_id)
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    assert _told(whole[: len(seen)]) == _told(seen)
    assert whole[-1]["type"] == "response.completed"
    texts = [event["delta"] for event in whole if event["type"] == "response.output_text.delta"]
    assert len(texts) > 2
    assert "".join(texts) == response.output_text == "Once upon a time"
    for after in range(len(whole)):
        rest = await events_of(other, response_id, starting_after=after)
        assert _told(rest) == _told(whole[after + 1 :])


def _told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without the time at which the response has ended."""
    for event in events:
        if event.get("response"):
            event["response"]["completed_at"] = None
    return events


async def test_a_run_that_is_read_elsewhere_goes_on_there(
    sdk: AsyncOpenAI, other: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(2)
    async with asyncio.timeout(TIMEOUT_S):
        stream = await streamed(sdk)
        first = []
        async for event in stream:
            first.append(event)
            if len([each for each in first if each.type == "response.output_text.delta"]) == 2:
                break
        number = first[-1].sequence_number
        response_id = first[0].model_dump()["response"]["id"]
        reading = asyncio.create_task(events_of(other, response_id, starting_after=number))
        # Its end here leaves the rest to the other router.
        told = [event.type async for event in stream]
        let_run(engine)
        rest = await reading
    # Who reads it here is told that it goes on elsewhere.
    assert told == ["error"]
    assert [event["sequence_number"] for event in rest] == list(
        range(number + 1, number + 1 + len(rest))
    )
    response = await ended(sdk, response_id)
    texts = [event.delta for event in first if event.type == "response.output_text.delta"]
    texts += [event["delta"] for event in rest if event["type"] == "response.output_text.delta"]
    assert "".join(texts) == response.output_text == "Once upon a time"


async def test_another_router_goes_on_with_what_a_lost_one_ran(
    service: OpenAIService,
    other: AsyncOpenAI,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.steps = asyncio.Semaphore(2)
    async with serve_on_loopback(service) as url, client_of(url) as client:
        kept, lost = [await client.responses.create(**ASKED) for _ in range(2)]
        async with asyncio.timeout(TIMEOUT_S):
            while len(engine.records) < 2:
                await asyncio.sleep(0.01)
    engine.steps = None
    # So long as somebody may run them, they are left alone.
    assert (await other.responses.retrieve(kept.id)).status in ("queued", "in_progress")
    assert len(engine.requests) == 2
    monkeypatch.setattr("cluster.response_service.LEASE_S", 0)
    response = await ended(other, kept.id)
    assert (response.status, response.output_text) == ("completed", "Once upon a time")
    # Nobody knows the other one, of which nothing had come: it is begun anew.
    del engine.records[lost.id]
    response = await ended(other, lost.id)
    assert (response.status, response.output_text) == ("completed", "Once upon a time")


async def test_what_was_lost_with_all_that_had_come_of_it_has_failed(
    service: OpenAIService,
    other: AsyncOpenAI,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.background_runs.RENEW_S", 0.01)
    engine.steps = asyncio.Semaphore(2)
    async with serve_on_loopback(service) as url, client_of(url) as client:
        begun = await client.responses.create(**ASKED)
        async with asyncio.timeout(TIMEOUT_S):
            while (await client.responses.retrieve(begun.id)).status == "queued":
                await asyncio.sleep(0.01)
            unbegun = await client.responses.create(**ASKED)
            while unbegun.id not in engine.records:
                await asyncio.sleep(0.01)
    monkeypatch.setattr("cluster.response_service.LEASE_S", 0)
    engine.records.clear()
    response = await ended(other, begun.id)
    assert response.status == "failed"
    assert response.error is not None
    assert response.error.code == "server_error"
    assert (await other.responses.retrieve(begun.id)).status == "failed"
    # What is lost again is not begun a third time.
    engine.steps = asyncio.Semaphore(0)
    async with serve_on_loopback(service) as url, client_of(url) as client:
        async with asyncio.timeout(TIMEOUT_S):
            while unbegun.id not in engine.records:
                await client.responses.retrieve(unbegun.id)
    engine.records.clear()
    assert (await ended(other, unbegun.id)).status == "failed"


async def test_a_run_says_again_and_again_that_it_is_under_way(
    service: OpenAIService, sdk: AsyncOpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.background_runs.RENEW_S", 0.01)
    engine.steps = asyncio.Semaphore(1)
    response = await sdk.responses.create(**ASKED)
    async with asyncio.timeout(TIMEOUT_S):
        while (await sdk.responses.retrieve(response.id)).status != "in_progress":
            await asyncio.sleep(0.01)
        # Its status changes no more, and yet it is said.
        engine.responses.renewed.clear()
        while len(engine.responses.renewed) < 2:
            await asyncio.sleep(0.01)
    assert set(engine.responses.renewed) == {response.id}
    assert len(engine.requests) == 1
    let_run(engine)
    assert (await ended(sdk, response.id)).status == "completed"


async def test_what_runs_in_the_background_is_cancelled_or_deleted(
    sdk: AsyncOpenAI, other: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(2)
    one = await sdk.responses.create(**ASKED)
    async with asyncio.timeout(TIMEOUT_S):
        while not engine.steps.locked() or len(engine.records[one.id].past[0].token_ids) < 2:
            await asyncio.sleep(0.01)
        cancelled = await other.responses.cancel(one.id)
        assert cancelled.status == "cancelled"
        assert cancelled.output_text
        assert "Once upon a time".startswith(cancelled.output_text)
        await _closed(engine, one.id)
        for client in (sdk, other):
            assert (await client.responses.retrieve(one.id)).status == "cancelled"
        another = await sdk.responses.create(**ASKED)
        while another.id not in engine.records:
            await asyncio.sleep(0.01)
        await other.responses.delete(another.id)
        await _closed(engine, another.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(another.id)


async def _closed(engine: FakeEngine, response_id: str) -> None:
    while response_id not in engine.closed_early:
        await asyncio.sleep(0.01)


async def test_a_run_that_fails_is_kept_as_failed(sdk: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.failure = 2, EngineDiedError("The engine died.")
    response = await ended(sdk, (await sdk.responses.create(**ASKED)).id)
    assert response.status == "failed"
    assert response.error is not None
    assert "died" in response.error.message
    engine.failure = 0, EngineDiedError("The engine died.")
    events = [event.type async for event in await streamed(sdk)]
    assert events[-1] == "response.failed"


async def test_what_cannot_be_found_again_is_not_begun(
    sdk: AsyncOpenAI, engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.create(**ASKED, store=False)
    assert refused.value.param == "store"
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.responses.create(**{**ASKED, "input": "word " * 2000})
    assert refused.value.code == "context_length_exceeded"
    engine.responses.is_there = False
    with pytest.raises(openai.InternalServerError):
        await sdk.responses.create(**ASKED)
    assert engine.requests == []
    engine.responses.is_there = True
    plain = await sdk.responses.create(**ASKED)
    await ended(sdk, plain.id)
    for query in ({"stream": "true"}, {"starting_after": 2}, {"starting_after": -1}):
        response = await client.get(f"/v1/responses/{plain.id}", params=query)
        assert response.status_code == 400, query
        assert response.json()["error"]["param"] == next(iter(query))
    first, *_ = [event.model_dump() async for event in await streamed(sdk)]
    response_id = first["response"]["id"]
    engine.records.clear()
    response = await client.get(f"/v1/responses/{response_id}", params={"stream": "true"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")
    assert (await sdk.responses.retrieve(response_id)).status == "completed"


@pytest.mark.parametrize("service_fields", [{"max_stored_responses": 0}])
async def test_a_server_that_keeps_nothing_runs_nothing_in_the_background(
    sdk: AsyncOpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="max-stored-responses"):
        await sdk.responses.create(**ASKED)


async def test_a_router_that_stops_leaves_its_runs_to_others(
    service: OpenAIService, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(1)
    async with serve_on_loopback(service) as url, client_of(url) as client:
        response = await client.responses.create(**ASKED)
        async with asyncio.timeout(TIMEOUT_S):
            while response.id not in engine.records:
                await asyncio.sleep(0.01)
    assert engine.closed_early == [response.id]
    kept = await engine.responses.find(response.id, b"")
    assert kept is not None
    assert not kept.is_ended
