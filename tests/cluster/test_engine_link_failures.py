"""Requests whose engine dies, over the real token socket; the engines do as a test says."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import ray.exceptions
from fake_handle import READY, Method, open_link

from cluster.calls import CallTable
from cluster.engine_choice import Route
from cluster.engine_link import EngineLink
from cluster.journal import GenerateCall, Journal
from cluster.openai.engine_client import ChoiceRequest, EngineInfo, GenerateRequest
from cluster.token_socket import CallError, GenerateEnd
from engine.errors import (
    EngineDiedError,
    QwenOnRayError,
    RequestGivenUpError,
    StreamGoneError,
    StreamResumedError,
)
from engine.request import RequestOutput, SamplingParams

TIMEOUT_S = 20
NUM_TOKENS = 12


def token(prompt: Sequence[int], index: int) -> int:
    """What every engine says in that place."""
    return (31 * sum(prompt) + 7 * index) % 1000


class Engines:
    """A Serve handle before two engines.

    Attributes:
        ends: What becomes of each call, in order: (tokens that it gives, "died", "killed",
            "frozen", "waits" or "rebuilding"); calls beyond these go to their ends.
        calls: (engine, call) of each.
    """

    def __init__(self) -> None:
        self.ends: list[tuple[int, str]] = []
        self.calls: list[tuple[str, GenerateCall]] = []
        self.was_computed = True
        self.received = asyncio.Event()
        self.tables = {
            name: CallTable(
                engine_id=name, on_abort=lambda request_id: None, silence_timeout_s=TIMEOUT_S
            )
            for name in ("one", "two")
        }
        self.describe = Method(self._describe)
        self.generate = Method(self._generate)
        self.recall = Method(self._recall)

    async def _recall(self, request_id: str, tenant: bytes, *, route: Route) -> bytes:
        record = self.tables[route.order[0]].recall(request_id, tenant)
        return b"" if record is None else msgspec.msgpack.encode(record)

    async def _describe(self, *, route: Route) -> bytes:
        return msgspec.msgpack.encode(EngineInfo(is_ready=True, engine_id=route.order[0]))

    async def _generate(self, payload: bytes, *, route: Route) -> bytes:
        name = route.order[0]
        call = msgspec.msgpack.decode(payload, type=GenerateCall)
        num_tokens, end = self.ends.pop(0) if self.ends else (NUM_TOKENS, "whole")
        self.calls.append((name, call))
        table = self.tables[name]
        running = table.open(call)
        for choice in running.journal.rest():
            first = len(choice.output_token_ids)
            for index in range(first, min(first + num_tokens, NUM_TOKENS)):
                output = RequestOutput(
                    request_id=running.request_ids[choice.index],
                    first_index=index,
                    token_ids=(token(choice.prompt_token_ids, index),),
                    finish_reason="length" if index == NUM_TOKENS - 1 else None,
                )
                table.deliver([output])
        try:
            if end == "waits":
                await running.ended
        except QwenOnRayError as error:
            failure = CallError(type(error).__name__, str(error))
            return msgspec.msgpack.encode(GenerateEnd(running.num_tokens, failure))
        finally:
            table.close(running)
        if end in ("killed", "frozen"):
            # What such a leader sent may or may not arrive; here it does.
            await self.received.wait()
        if end == "killed":
            raise ray.exceptions.ActorDiedError()
        if end == "frozen":
            table.disconnect()
            await asyncio.get_running_loop().create_future()
        errors = {
            "died": CallError("EngineDiedError", "a host died"),
            "rebuilding": CallError("EngineNotReadyError", "its hosts were not back in time"),
        }
        error = errors.get(end)
        ended = GenerateEnd(running.num_tokens, error, self.was_computed)
        return msgspec.msgpack.encode(ended)


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    engines = Engines()
    yield engines
    for table in engines.tables.values():
        table.disconnect()


@pytest.fixture
async def link(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineLink]:
    monkeypatch.setattr("cluster.engine_fleet.INFO_PERIOD_S", 0.01)
    async with a_router(engines) as link:
        yield link


@asynccontextmanager
async def a_router(engines: Engines) -> AsyncIterator[EngineLink]:
    """A router's link to the engines."""
    link = open_link(
        engines,
        lambda: {"one": READY, "two": READY},
        silence_timeout_s=1.0,
        hold_timeout_s=TIMEOUT_S,
    )
    try:
        await link.wait_until_ready(TIMEOUT_S)
        yield link
    finally:
        await link.close()


async def generate(
    link: EngineLink,
    *prompts: list[int],
    num_wanted: int = 0,
    received: asyncio.Event | None = None,
) -> dict[int, list[int]]:
    """Each choice's tokens, as they come.

    Args:
        received: Set when each choice has `num_wanted` tokens.
    """
    received = received or asyncio.Event()
    choices = tuple(
        ChoiceRequest(prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=99))
        for prompt in prompts
    )
    request = GenerateRequest(request_id="r", choices=choices, tenant=b"ours")
    got: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
    async with asyncio.timeout(TIMEOUT_S):
        async for index, delta in link.generate(request):
            got[index].extend(delta.token_ids)
            if all(len(token_ids) >= num_wanted for token_ids in got.values()):
                received.set()
    return got


def whole(*prompts: list[int]) -> dict[int, list[int]]:
    return {
        choice: [token(prompt, index) for index in range(NUM_TOKENS)]
        for choice, prompt in enumerate(prompts)
    }


@pytest.mark.parametrize("end", ["died", "killed", "frozen", "rebuilding"])
async def test_a_request_goes_on_with_another_engine(
    end: str, engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(5, end)]
    got = await generate(link, [1, 2], [3], num_wanted=5, received=engines.received)
    assert got == whole([1, 2], [3])
    (first, before), (second, after) = engines.calls
    assert first != second
    choices = Journal(after.record).rest()
    assert [choice.output_token_ids for choice in choices] == [
        [token(choice.prompt_token_ids, index) for index in range(5)] for choice in choices
    ]
    seeds = [
        [choice.sampling.seed for choice in call.record.request.choices] for call in (before, after)
    ]
    assert seeds[0] == seeds[1]
    assert None not in seeds[0]


async def test_choices_that_have_ended_are_not_generated_again(
    engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(5, "died"), (NUM_TOKENS, "died")]
    assert await generate(link, [1], [2]) == whole([1], [2])
    assert len(engines.calls) == 2, "all tokens were there when the second one died"


async def test_a_request_outlives_many_deaths_between_which_it_got_on(
    engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(1, "died")] * (NUM_TOKENS - 1)
    assert await generate(link, [4, 4]) == whole([4, 4])
    assert len(engines.calls) == NUM_TOKENS


async def test_a_request_that_kills_its_engines_is_given_up(
    engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(3, "died"), *[(0, "died")] * 9]
    with pytest.raises(RequestGivenUpError, match=r"died 2 times .* not tried again"):
        await generate(link, [5])
    assert len(engines.calls) == 2


async def test_a_request_that_only_waited_is_not_to_blame(
    engines: Engines, link: EngineLink
) -> None:
    engines.was_computed = False
    engines.ends = [(0, "died")] * 4
    assert await generate(link, [6]) == whole([6])


async def test_a_request_is_not_tried_for_ever(engines: Engines, link: EngineLink) -> None:
    engines.was_computed = False
    engines.received.set()
    engines.ends = [(0, "killed")] * 50
    with pytest.raises(EngineDiedError, match=r"brought no token"):
        await generate(link, [7])


async def go_on(link: EngineLink, engine_id: str | None) -> dict[int, list[int]]:
    """Tokens of the request that `generate` makes, for a client whose connection broke."""
    async with asyncio.timeout(TIMEOUT_S):
        record = await link.recall("r", engine_id=engine_id, tenant=b"ours")
        got = {index: list(past.token_ids) for index, past in enumerate(record.past)}
        async for index, delta in link.resume(record):
            got[index].extend(delta.token_ids)
    return got


@pytest.mark.parametrize("knows_engine", [True, False])
async def test_another_router_goes_on_with_a_dead_ones_request(
    knows_engine: bool, engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(5, "waits")]
    async with a_router(engines) as doomed:
        reading = asyncio.create_task(
            generate(doomed, [1, 2], [3], num_wanted=5, received=engines.received)
        )
        await engines.received.wait()
        name, before = engines.calls[0]
        got = await go_on(link, name if knows_engine else None)
        with pytest.raises(StreamResumedError):
            await reading
    assert got == whole([1, 2], [3])
    after = engines.calls[1][1]
    assert [len(choice.output_token_ids) for choice in Journal(after.record).rest()] == [5, 5]
    assert after.record.attempt == before.record.attempt + 1
    seeds = [
        [choice.sampling.seed for choice in call.record.request.choices] for call in (before, after)
    ]
    assert seeds[0] == seeds[1]


async def test_a_router_goes_on_with_its_own_request_whose_engine_is_gone(
    engines: Engines, link: EngineLink
) -> None:
    engines.ends = [(5, "waits")]
    reading = asyncio.create_task(generate(link, [1, 2], num_wanted=5, received=engines.received))
    await engines.received.wait()
    name = engines.calls[0][0]
    engines.tables[name].disconnect()
    engines.tables[name] = CallTable(
        engine_id=name, on_abort=lambda request_id: None, silence_timeout_s=TIMEOUT_S
    )
    assert await go_on(link, name) == whole([1, 2])
    with pytest.raises(StreamResumedError):
        await reading


async def test_a_request_that_has_ended_is_known_for_a_while(
    engines: Engines, link: EngineLink
) -> None:
    assert await generate(link, [1], [2]) == whole([1], [2])
    async with a_router(engines) as other:
        assert await go_on(other, engines.calls[0][0]) == whole([1], [2])
    assert len(engines.calls) == 1, "nothing of it was left to be generated"


async def test_a_request_is_nobody_elses(engines: Engines, link: EngineLink) -> None:
    engines.ends = [(5, "waits")]
    reading = asyncio.create_task(generate(link, [1], num_wanted=5, received=engines.received))
    await engines.received.wait()
    with pytest.raises(StreamGoneError, match="another key"):
        await link.recall("r", engine_id=engines.calls[0][0], tenant=b"theirs")
    with pytest.raises(StreamGoneError):
        await link.recall("unheard", engine_id=None, tenant=b"ours")
    assert not reading.done(), "it is read on"
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
