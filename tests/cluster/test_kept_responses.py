"""Responses after their end: who may ask for them, what is kept of them, and how long."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from fake_engine import FakeEngine, make_service
from fake_handle import Method
from ray.serve.handle import DeploymentHandle

from cluster.engine_choice import Route
from cluster.response_link import ResponseLink
from cluster.response_shelf import KeptResponse, ResponseShelf
from cluster.service import OpenAIService
from engine.errors import EngineNotReadyError

MODEL = "Tiny/Tiny-Chat"
TIMEOUT_S = 20
ALICE, BOB = "alice", "bob"


@pytest.fixture
def service_and_engine(tmp_path: Path) -> tuple[OpenAIService, FakeEngine]:
    keys = tmp_path / "keys"
    lines = [hashlib.sha256(name.encode()).hexdigest() for name in (ALICE, BOB)]
    keys.write_text("\n".join(lines))
    return make_service(tmp_path, api_key_file=str(keys))


@asynccontextmanager
async def client_of(url: str, key: str) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def test_only_its_own_key_reaches_a_response(url: str, engine: FakeEngine) -> None:
    async with client_of(url, ALICE) as alice, client_of(url, BOB) as bob:
        answer = await alice.responses.create(model=MODEL, input="Hello")
        assert (await alice.responses.retrieve(answer.id)).output == answer.output
        for ask in (
            bob.responses.retrieve,
            bob.responses.delete,
            bob.responses.cancel,
            bob.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError) as raised:
                await cast("Any", ask)(answer.id)
            assert raised.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            await bob.responses.create(model=MODEL, input="Hi", previous_response_id=answer.id)
        assert refused.value.code == "previous_response_not_found"
        # And nobody without a key does.
        async with httpx.AsyncClient(base_url=url) as nobody:
            response = await nobody.get(f"/v1/responses/{answer.id}")
            assert response.status_code == 401
        assert (await alice.responses.retrieve(answer.id)).id == answer.id


async def test_a_response_that_was_deleted_or_never_kept_is_gone(url: str) -> None:
    async with client_of(url, ALICE) as alice:
        answer = await alice.responses.create(model=MODEL, input="Hello")
        await alice.responses.delete(answer.id)
        unkept = await alice.responses.create(model=MODEL, input="Hello", store=False)
        for response_id in (answer.id, unkept.id, "resp_x"):
            with pytest.raises(openai.NotFoundError):
                await alice.responses.retrieve(response_id)
            with pytest.raises(openai.NotFoundError):
                await alice.responses.delete(response_id)


async def test_the_input_is_listed_page_by_page(url: str) -> None:
    async with client_of(url, ALICE) as alice:
        first = await alice.responses.create(model=MODEL, input="Before")
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        items: list[Any] = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"type": "reasoning", "id": "rs_own", "summary": [], "content": []},
            {**call, "id": "fc_own"},
            {"type": "function_call_output", "call_id": "c", "output": "done"},
        ]
        second = await alice.responses.create(
            model=MODEL, input=items, previous_response_id=first.id
        )

        async def listed(**fields: Any) -> list[Any]:
            pages = alice.responses.input_items.list(second.id, **fields)
            return [item async for item in pages]

        ascending = await listed(order="asc")
        kinds = [item.type for item in ascending]
        assert kinds == ["message", "message", "reasoning", "function_call", "function_call_output"]
        assert [ascending[2].id, ascending[3].id] == ["rs_own", "fc_own"]
        assert len({item.id for item in ascending}) == len(items)
        assert ascending[0].content[0].text == "Hello"
        assert ascending[1].content[0].type == "output_text"
        assert await listed(limit=2) == await listed() == ascending[::-1]

        async with httpx.AsyncClient(base_url=url, headers={"Authorization": "Bearer alice"}) as c:
            for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "x"}):
                response = await c.get(f"/v1/responses/{second.id}/input_items", params=query)
                assert response.status_code == 400, query
                assert response.json()["error"]["param"] == next(iter(query))
            streamed = await c.get(f"/v1/responses/{second.id}", params={"stream": "true"})
            assert streamed.json()["error"]["param"] == "stream"


async def test_a_response_under_way_is_cancelled_with_what_has_come(
    url: str, engine: FakeEngine
) -> None:
    engine.steps = asyncio.Semaphore(2)
    async with client_of(url, ALICE) as alice:
        stream = await alice.responses.create(model=MODEL, input="Hello", stream=True)
        texts, response_id = [], ""
        async with asyncio.timeout(TIMEOUT_S):
            async for event in stream:
                if event.type == "response.created":
                    response_id = event.response.id
                if event.type == "response.output_text.delta":
                    texts.append(event.delta)
                if len(texts) == 2:
                    break
            with pytest.raises(openai.NotFoundError):
                await alice.responses.retrieve(response_id)
            cancelled = await alice.responses.cancel(response_id)
            assert (cancelled.status, cancelled.output_text) == ("cancelled", "".join(texts))
            # The stream's reader is told, and the engine has ended it.
            rest = [event async for event in stream]
        assert [event.type for event in rest] == ["error"]
        assert engine.closed_early == [response_id]
        assert (await alice.responses.retrieve(response_id)).status == "cancelled"
        assert (await alice.responses.cancel(response_id)).status == "cancelled"
        # A conversation may go on from there.
        engine.steps = None
        await alice.responses.create(model=MODEL, input="Go on", previous_response_id=response_id)
        chat = await alice.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}]
        )
        for ended in ("resp_x", chat.id):
            with pytest.raises(openai.NotFoundError):
                await alice.responses.cancel(ended)


async def test_a_response_that_has_ended_is_not_cancelled(url: str) -> None:
    async with client_of(url, ALICE) as alice:
        for store in (True, False):
            answer = await alice.responses.create(model=MODEL, input="Hello", store=store)
            cancelled = await alice.responses.cancel(answer.id)
            assert (cancelled.status, cancelled.output_text) == ("completed", answer.output_text)


async def test_an_answer_that_nobody_can_keep_says_so(url: str, engine: FakeEngine) -> None:
    async with client_of(url, ALICE) as alice:
        kept = await alice.responses.create(model=MODEL, input="Hello")
        engine.responses.is_there = False
        answer = await alice.responses.create(model=MODEL, input="Hello")
        assert answer.output_text == kept.output_text
        assert (cast("Any", kept).store, cast("Any", answer).store) == (True, False)
        # It may be there still, so it is not said to be gone.
        with pytest.raises(openai.InternalServerError) as raised:
            await alice.responses.retrieve(kept.id)
        assert raised.value.status_code == 503
        engine.responses.is_there = True
        assert (await alice.responses.retrieve(kept.id)).id == kept.id


def content_of(kept: KeptResponse | None) -> bytes | None:
    return kept.content if kept is not None else None


def test_a_full_shelf_forgets_what_its_greatest_user_used_longest_ago() -> None:
    shelf = ResponseShelf(max_responses=4)
    for name in ("a", "b", "c"):
        assert shelf.store(name, b"alice", b"x", is_ended=True)
    assert shelf.store("a", b"bob", b"y", is_ended=True)
    assert content_of(shelf.find("a", b"alice")) == b"x"
    assert shelf.store("b", b"bob", b"y", is_ended=True)
    # Alice had most; her oldest by use is gone, and nothing of Bob's.
    assert shelf.find("b", b"alice") is None
    assert [content_of(shelf.find(name, b"alice")) for name in ("a", "c")] == [b"x", b"x"]
    assert [content_of(shelf.find(name, b"bob")) for name in ("a", "b")] == [b"y", b"y"]
    assert (shelf.num_responses, shelf.num_bytes) == (4, 4)


def test_a_shelf_is_bounded_in_bytes_and_time() -> None:
    now_s = 100.0
    shelf = ResponseShelf(max_responses=100, max_bytes=100, keep_s=10, clock=lambda: now_s)
    assert not shelf.store("large", b"", b"x" * 11, is_ended=True)
    for number in range(20):
        assert shelf.store(str(number), b"", b"x" * 10, is_ended=True)
        assert shelf.num_bytes <= 100
    assert shelf.num_responses == 10
    now_s += 6
    assert shelf.find("19", b"") is not None
    now_s += 6
    # What was used since is there.
    assert shelf.find("18", b"") is None
    assert shelf.find("19", b"") is not None
    assert (shelf.num_responses, shelf.num_bytes) == (1, 10)
    assert shelf.store("19", b"", b"y", is_ended=True)
    assert (shelf.num_responses, shelf.num_bytes) == (1, 1)
    assert shelf.forget("19", b"")
    assert not shelf.forget("19", b"")
    assert (shelf.num_responses, shelf.num_bytes) == (0, 0)
    assert not ResponseShelf(max_responses=0).store("a", b"", b"x", is_ended=True)


def test_what_has_ended_stays_whoever_says_that_it_is_under_way() -> None:
    now_s = 100.0
    shelf = ResponseShelf(max_responses=100, clock=lambda: now_s)
    for content in (b"begun", b"later"):
        assert shelf.store("a", b"", content, is_ended=False)
        now_s += 3
        # Whether anybody asks does not make it younger.
        assert shelf.find("a", b"") == shelf.find("a", b"") == KeptResponse(content, False, 3)
    assert shelf.renew("a", b"")
    assert shelf.find("a", b"") == KeptResponse(b"later", False, 0)
    assert shelf.store("a", b"", b"whole", is_ended=True)
    assert shelf.store("a", b"", b"late", is_ended=False)
    assert shelf.find("a", b"") == KeptResponse(b"whole", True, 0)
    assert (shelf.num_responses, shelf.num_bytes) == (1, 5)
    # What was deleted meanwhile is not there again.
    assert shelf.forget("a", b"")
    assert not shelf.renew("a", b"")
    assert shelf.find("a", b"") is None


class Leaders:
    """A handle of several leaders, each with a shelf; a call goes where its route says.

    Attributes:
        shelves: By engine.
        silent: Engines that never answer.
        misrouted: Engines whose calls go to another one.
    """

    def __init__(self, *names: str) -> None:
        self.shelves = {name: ResponseShelf(100) for name in names}
        self.silent: set[str] = set()
        self.misrouted: dict[str, str] = {}
        self.shelve = Method(self._shelve)

    async def _shelve(self, payload: bytes, *, route: Route) -> bytes:
        [name] = route.order
        name = self.misrouted.get(name, name)
        if name in self.silent:
            await asyncio.Event().wait()
        return self.shelves[name].answer(payload, name)

    def link(self, running: set[str] | None = None) -> ResponseLink:
        return ResponseLink(
            cast("DeploymentHandle", self),
            list_engines=lambda: list(self.shelves),
            list_running=lambda: running,
            may_store=True,
        )

    def keepers(self, response_id: str) -> set[str]:
        return {
            name for name, shelf in self.shelves.items() if shelf.find(response_id, b"") is not None
        }


async def test_every_router_finds_what_another_has_had_kept() -> None:
    leaders = Leaders("one", "two", "three")
    running = {"one", "two", "three"}
    one, other = leaders.link(), leaders.link(running)
    names = [str(number) for number in range(20)]
    for name in names:
        assert await one.store(name, b"", name.encode(), is_ended=True)
        assert len(leaders.keepers(name)) == 2
        assert content_of(await other.find(name, b"")) == name.encode()
        assert await other.find(name, b"another") is None
    # Each leader has its part, and the end of one loses nothing.
    assert all(shelf.num_responses for shelf in leaders.shelves.values())
    del leaders.shelves["two"]
    running.discard("two")
    assert [content_of(await one.find(name, b"")) for name in names] == [
        name.encode() for name in names
    ]
    assert await other.forget(names[0], b"")
    assert not await other.forget(names[0], b"")
    assert await one.find(names[0], b"") is None


async def test_a_response_is_gone_only_if_all_who_may_keep_it_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.response_link.SHELF_TIMEOUT_S", 0.05)
    leaders = Leaders("one", "two", "three")
    link = leaders.link()
    assert await link.store("a", b"", b"x", is_ended=True)
    [without] = set(leaders.shelves) - leaders.keepers("a")
    leaders.silent = {without}
    assert content_of(await link.find("a", b"")) == b"x"
    with pytest.raises(EngineNotReadyError, match="1 of 3"):
        await link.find("b", b"")
    with pytest.raises(EngineNotReadyError):
        await link.forget("a", b"")
    # Serve may call another engine than it was told: that one's word counts for itself alone.
    leaders.silent = set()
    meant = next(name for name in leaders.shelves if name != without)
    leaders.misrouted = {meant: without}
    with pytest.raises(EngineNotReadyError):
        await link.forget("b", b"")


async def test_the_latest_word_of_all_leaders_counts() -> None:
    now_s = 100.0
    leaders = Leaders()
    one, two, three = (ResponseShelf(100, clock=lambda: now_s) for _ in range(3))
    leaders.shelves = {"one": one, "two": two, "three": three}
    one.store("a", b"", b"first", is_ended=False)
    now_s += 1
    two.store("a", b"", b"second", is_ended=False)
    link = leaders.link()
    assert content_of(await link.find("a", b"")) == b"second"
    three.store("a", b"", b"whole", is_ended=True)
    now_s += 1
    one.store("a", b"", b"third", is_ended=False)
    assert content_of(await link.find("a", b"")) == b"whole"


async def test_only_all_who_would_keep_a_response_renew_it() -> None:
    now_s = 100.0
    leaders = Leaders()
    leaders.shelves = {name: ResponseShelf(100, clock=lambda: now_s) for name in ("one", "two")}
    assert not await leaders.link().renew("a", b"")
    assert await leaders.link().store("a", b"", b"queued", is_ended=False)
    now_s += 1
    assert await leaders.link().renew("a", b"")
    assert await leaders.link().find("a", b"") == KeptResponse(b"queued", False, 0)
    # Another fleet: who keeps it no longer is not asked, who is to keep it does not have it.
    now_s += 1
    leaders.shelves["three"] = ResponseShelf(100, clock=lambda: now_s)
    assert not await leaders.link({"one", "three"}).renew("a", b"")
    assert leaders.shelves["one"].find("a", b"") == KeptResponse(b"queued", False, 0)
    assert leaders.shelves["two"].find("a", b"") == KeptResponse(b"queued", False, 1)
    assert not await leaders.link(set()).renew("a", b"")


async def test_nothing_is_asked_where_no_engine_runs_or_none_keeps_any() -> None:
    leaders = Leaders("one")
    asleep = leaders.link(set())
    assert not await asleep.store("a", b"", b"x", is_ended=True)
    assert await asleep.find("a", b"") is None
    off = ResponseLink(
        cast("DeploymentHandle", leaders),
        list_engines=lambda: ["one"],
        list_running=lambda: None,
        may_store=False,
    )
    assert not await off.store("a", b"", b"x", is_ended=True)
    assert leaders.shelves["one"].num_responses == 0
