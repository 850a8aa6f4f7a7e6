"""Disconnects, the waiting room, keys, health, metrics and what importing the router costs."""

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, make_service, serve_on_loopback
from ray.serve._private.http_util import RequestIdMiddleware

from cluster.admission import (
    DRAIN_WINDOW_S,
    MAX_WAIT_S,
    UNKNOWN_WAIT_S,
    Admission,
)
from cluster.router import create_app
from cluster.service import OpenAIService
from engine.errors import EngineBusyError

CHAT = "/v1/chat/completions"
MODEL = "Tiny/Tiny-Chat"
DEADLINE_S = 10


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}


@pytest.fixture
def service_fields() -> dict[str, Any]:
    return {"max_queued_requests": 2}


@pytest.fixture
async def client(url: str) -> AsyncGenerator[httpx.AsyncClient, None]:
    # Leaving it is seen on a connection only.
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_aborts_its_request(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.steps = asyncio.Semaphore(0)
    asking = asyncio.create_task(client.post(CHAT, json=chat_body(stream=stream)))
    async with asyncio.timeout(DEADLINE_S):
        await engine.has_started.wait()
        asking.cancel()
        await engine.has_closed.wait()
    assert engine.closed_early == [engine.requests[0].request_id]


async def test_a_client_that_leaves_amid_a_stream_aborts_its_request(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(3)
    async with asyncio.timeout(DEADLINE_S):
        async with client.stream("POST", CHAT, json=chat_body(stream=True)) as response:
            await anext(response.aiter_lines())
        await engine.has_closed.wait()
    assert engine.closed_early == [engine.requests[0].request_id]
    shown = series((await client.get("/metrics")).text)
    label = f'model_name="{MODEL}",router="router-1"'
    assert shown[f'qwen_on_ray:router_requests_total{{{label},status="499"}}'] == 1
    assert shown[f'qwen_on_ray:router_requests_total{{{label},status="200"}}'] == 0


async def test_a_request_is_held_until_the_engine_is_ready(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.info = replace(engine.info, is_ready=False, status="compile 7 of 12")
    async with asyncio.timeout(DEADLINE_S):
        asking = asyncio.create_task(client.post(CHAT, json=chat_body()))
        await engine.is_awaited.wait()
        assert (await client.get("/health")).json()["status"] == "starting"
        assert (await client.get("/health/ready")).status_code == 503
        assert engine.requests == []
        engine.becomes_ready.set()
        assert (await asking).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200


async def test_a_held_stream_hears_that_it_waits_and_then_its_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.openai.sse.COMMENT_PERIOD_S", 0.01)
    engine.info = replace(engine.info, is_ready=False)
    async with (
        asyncio.timeout(DEADLINE_S),
        client.stream("POST", CHAT, json=chat_body(stream=True)) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == [": waiting for an engine"] * 3
        monkeypatch.setattr("cluster.openai.sse.COMMENT_PERIOD_S", DEADLINE_S)
        engine.becomes_ready.set()
        events = [line async for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    contents = [delta["choices"][0]["delta"].get("content") or "" for delta in deltas]
    assert "".join(contents) == "Once upon a time"


async def test_a_stream_that_was_held_in_vain_ends_with_the_error_as_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.openai.sse.COMMENT_PERIOD_S", 0.01)
    service, engine = make_service(tmp_path, hold_timeout_s=0.1)
    engine.info = replace(engine.info, is_ready=False, status="compile 7 of 12")
    async with (
        serve_on_loopback(service) as url,
        httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client,
    ):
        streamed = await client.post(CHAT, json=chat_body(stream=True))
        whole = await client.post(CHAT, json=chat_body())
    assert streamed.status_code == 200
    [event] = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
    error = json.loads(event.removeprefix("data: "))["error"]
    assert "compile 7 of 12" in error["message"]
    # What is not streamed is held without a byte, and so keeps its status.
    assert whole.status_code == 503
    assert whole.json()["error"]["message"] == error["message"]


async def test_one_request_more_than_may_wait_is_refused_until_there_is_room(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(0)
    async with asyncio.timeout(DEADLINE_S):
        waiting = asyncio.create_task(client.post(CHAT, json=chat_body(n=2)))
        await engine.has_started.wait()
        response = await client.post(CHAT, json=chat_body())
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert "--max-queued-requests" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
        # Refusing must be cheap: what it asks for is not looked at.
        assert (await client.post(CHAT, content=b"{")).status_code == 429
        assert (await client.get("/v1/models")).status_code == 200
        for _ in range(1000):
            engine.steps.release()
        assert (await waiting).status_code == 200
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
        assert (await client.post(CHAT, content=b"{")).status_code == 400


async def test_a_request_that_begins_makes_room_for_the_next(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(2)
    async with (
        asyncio.timeout(DEADLINE_S),
        client.stream("POST", CHAT, json=chat_body(n=2, stream=True)) as first,
    ):
        lines = first.aiter_lines()
        # Both choices have their first token, and neither has ended.
        begun: set[str] = set()
        while begun != {"0", "1"}:
            begun.update((await anext(lines)).partition('"index":')[2][:1])
        second = asyncio.create_task(client.post(CHAT, json=chat_body()))
        for _ in range(1000):
            engine.steps.release()
        assert (await second).status_code == 200


def test_the_waiting_room_is_empty_when_all_tickets_are_closed() -> None:
    admission = Admission(max_waiting=4, max_waiting_tokens=100)
    with admission.admit(2) as first:
        first.add_tokens(60)
        with admission.admit(2) as second:
            with pytest.raises(EngineBusyError, match="--max-queued-tokens"):
                second.add_tokens(41)
            second.add_tokens(40)
            with pytest.raises(EngineBusyError, match="--max-queued-requests"):
                admission.admit(1)
            first.started(30)
            assert (admission.num_waiting, admission.num_waiting_tokens) == (3, 70)
    assert (admission.num_waiting, admission.num_waiting_tokens) == (0, 0)


def test_a_lowered_bound_holds_for_who_comes_and_leaves_alone_who_waits() -> None:
    admission = Admission(max_waiting=4, max_waiting_tokens=100)
    with admission.admit(3) as ticket:
        admission.limit(max_waiting=1, max_waiting_tokens=10)
        ticket.add_tokens(60)
        with pytest.raises(EngineBusyError, match="3 requests wait, and 1 may"):
            admission.admit(1)
        ticket.started(20)
        ticket.started(20)
        ticket.started(20)
        with admission.admit(1) as next_one:
            next_one.add_tokens(5)
            with pytest.raises(EngineBusyError, match="and 10 may"):
                next_one.add_tokens(6)
    assert (admission.num_waiting, admission.num_waiting_tokens) == (0, 0)


def test_a_request_longer_than_all_may_wait_comes_in_alone() -> None:
    admission = Admission(max_waiting=4, max_waiting_tokens=100)
    with admission.admit(1) as ticket:
        ticket.add_tokens(1000)
        assert admission.num_waiting_tokens == 1000


def test_who_is_refused_is_told_when_there_will_be_room() -> None:
    now_s = 100.0
    admission = Admission(max_waiting=10, max_waiting_tokens=1000, clock=lambda: now_s)

    def retry_after_s(num_requests: int) -> float:
        with pytest.raises(EngineBusyError) as raised:
            admission.add(num_requests=num_requests)
        assert raised.value.retry_after_s is not None
        return raised.value.retry_after_s

    admission.add(num_requests=10)
    assert retry_after_s(1) == UNKNOWN_WAIT_S, "none has left so far"
    for _ in range(5):
        admission.remove(num_requests=1, num_tokens=0)
        admission.add(num_requests=1)
        now_s += 2.0
    # One leaves each two seconds.
    assert retry_after_s(1) == pytest.approx(2.0)
    assert retry_after_s(8) == pytest.approx(16.0)
    assert retry_after_s(2000) == MAX_WAIT_S
    now_s += DRAIN_WINDOW_S
    assert retry_after_s(1) == UNKNOWN_WAIT_S, "it is too long ago to say anything"


def test_waiting_for_tokens_counts_tokens() -> None:
    now_s = 100.0
    admission = Admission(max_waiting=10, max_waiting_tokens=1000, clock=lambda: now_s)
    admission.add(num_requests=2, num_tokens=1000)
    admission.remove(num_requests=1, num_tokens=100)
    now_s += 10.0
    with pytest.raises(EngineBusyError) as raised:
        admission.add(num_tokens=300)
    # 200 too many, and 100 left in ten seconds.
    assert raised.value.retry_after_s == pytest.approx(20.0)


def key_file(directory: Path, *keys: str) -> Path:
    path = directory / "keys"
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    path.write_text("# keys of the team\n\n" + "\n".join(f"{h}  # one" for h in hashes))
    return path


async def test_everything_but_health_needs_a_key_if_keys_are_set(tmp_path: Path) -> None:
    service, _ = make_service(tmp_path, api_key_file=str(key_file(tmp_path, "alpha", "beta")))
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            response = await client.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/ready"):
            assert (await client.get(path)).status_code == 200
        for key in ("gamma", "alph", "alphaa", ""):
            response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 401
        for key in ("alpha", "beta"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            assert (await client.post(CHAT, json=chat_body(), headers=headers)).status_code == 200


async def test_what_a_key_has_cached_is_no_other_keys(tmp_path: Path) -> None:
    service, engine = make_service(tmp_path, api_key_file=str(key_file(tmp_path, "alpha", "beta")))
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for key in ("alpha", "alpha", "beta"):
            for salt in ({}, {"cache_salt": "mine"}):
                headers = {"Authorization": f"Bearer {key}"}
                response = await client.post(CHAT, json=chat_body(**salt), headers=headers)
                assert response.status_code == 200
    salts = [request.cache_salt for request in engine.requests]
    assert salts[:2] == salts[2:4]
    assert len(set(salts)) == 4
    assert b"" not in salts


async def test_a_key_past_its_limits_waits_and_others_do_not(tmp_path: Path) -> None:
    path = key_file(tmp_path, "alpha", "beta")
    path.write_text(path.read_text().replace("  # one", " requests-per-minute=2", 1))
    service, engine = make_service(tmp_path, api_key_file=str(path))
    transport = httpx.ASGITransport(create_app(service))

    async def ask(client: httpx.AsyncClient, key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return await client.post(CHAT, json=chat_body(), headers=headers)

    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        assert [(await ask(client, "alpha")).status_code for _ in range(2)] == [200, 200]
        refused = await ask(client, "alpha")
        assert refused.status_code == 429
        assert "requests-per-minute=2" in refused.json()["error"]["message"]
        assert 0 < int(refused.headers["retry-after"]) <= 30
        assert (await ask(client, "beta")).status_code == 200
    assert len(engine.requests) == 3


async def test_profiling_needs_an_admins_key_where_keys_are_set(tmp_path: Path) -> None:
    path = key_file(tmp_path, "alpha", "beta")
    path.write_text(path.read_text().replace("  # one", " admin", 1))
    service, engine = make_service(tmp_path, api_key_file=str(path), profile_dir="/traces")
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for key, status in (("beta", 403), ("gamma", 401), ("alpha", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.post("/start_profile", headers=headers)).status_code == status
        assert (
            await client.post("/stop_profile", headers={"Authorization": "Bearer beta"})
        ).is_error
    assert engine.profiled == [100]


def series(text: str) -> dict[str, float]:
    """An exposition's values by name and labels."""
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


async def test_metrics_count_what_clients_of_this_router_saw(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body(max_tokens=1))
    await client.post(CHAT, json=chat_body(temperature=9))
    content = [{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}]
    await client.post(CHAT, json=chat_body(messages=content, max_tokens=1))
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    shown = series(response.text)
    label = f'model_name="{MODEL}",router="router-1"'
    router = "qwen_on_ray:router_"
    assert shown[f'{router}choices_total{{finished_reason="stop",{label}}}'] == 1
    assert shown[f'{router}choices_total{{finished_reason="length",{label}}}'] == 2
    assert shown[f'{router}requests_total{{{label},status="200"}}'] == 3
    assert shown[f'{router}requests_total{{{label},status="400"}}'] == 1
    assert shown[f"{router}time_to_first_token_seconds_count{{{label}}}"] == 3
    assert shown[f"{router}request_latency_seconds_count{{{label}}}"] == 3
    assert shown[f"{router}choices_waiting{{{label}}}"] == 0
    assert shown[f"{router}choices_running{{{label}}}"] == 0
    assert shown[f"{router}special_tokens_in_messages_total{{{label}}}"] == 1


async def test_profiling_is_asked_of_the_engine_only_where_it_was_allowed(tmp_path: Path) -> None:
    service, engine = make_service(tmp_path, profile_dir="/traces")
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        started = await client.post("/start_profile", json={"num_steps": 7})
        by_default = await client.post("/start_profile")
        too_many = await client.post("/start_profile", json={"num_steps": 10**6})
        stopped = await client.post("/stop_profile")
    assert started.json() == {"num_steps": 7, "directory": "/traces"}
    assert (by_default.status_code, stopped.status_code) == (200, 200)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "num_steps")
    assert engine.profiled == [7, 100, 0]

    service, engine = make_service(tmp_path)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        refused = await client.post("/start_profile")
    assert refused.status_code == 400
    assert "--profile-dir" in refused.json()["error"]["message"]
    assert engine.profiled == []


async def test_a_fault_of_ours_is_told_without_its_inside(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = (0, ZeroDivisionError("inside"))
    response = await client.post(CHAT, json=chat_body())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "inside" not in response.text
    assert "ZeroDivisionError: inside" in caplog.text


async def test_a_fault_of_ours_amid_a_stream_ends_it_with_an_error_event(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = (2, ZeroDivisionError("inside"))
    response = await client.post(CHAT, json=chat_body(stream=True))
    assert '"code":"internal_error"' in response.text.splitlines()[-2]
    assert "inside" not in response.text
    assert "[DONE]" not in response.text
    assert "ZeroDivisionError: inside" in caplog.text


async def test_the_openapi_page_describes_requests_and_answers(client: httpx.AsyncClient) -> None:
    assert (await client.get("/docs")).status_code == 200
    description = (await client.get("/openapi.json")).json()
    schemas = description["components"]["schemas"]
    body = description["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert "chat_template_kwargs" in schemas["ChatCompletionRequest"]["properties"]
    assert {"CompletionRequest", "ChatCompletion", "Completion", "ErrorResponse"} <= set(schemas)


async def test_answers_carry_their_id_in_a_header(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat_body())
    assert response.headers["x-request-id"] == response.json()["id"]
    response = await client.post(CHAT, json=chat_body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] in response.text
    assert response.text.endswith("data: [DONE]\n\n")


async def test_a_request_that_serve_has_named_gets_no_second_id(service: OpenAIService) -> None:
    app = RequestIdMiddleware(create_app(service))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for headers in ({}, {"x-request-id": "mine"}):
            response = await client.post(CHAT, json=chat_body(), headers=headers)
            (request_id,) = response.headers.get_list("x-request-id")
            assert request_id == headers.get("x-request-id", request_id)
            assert response.status_code == 200


def test_the_router_imports_neither_jax_nor_transformers() -> None:
    code = (
        "import sys, cluster.router, engine.text.tokenizer; "
        "print([name for name in ('jax', 'flax', 'transformers', 'torch') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"
