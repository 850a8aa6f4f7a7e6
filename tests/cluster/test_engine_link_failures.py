"""Requests whose engine dies, over the real token socket; the engines do as a test says."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import ray.exceptions
from fake_handle import READY, Method, open_link

from cluster.calls import CallTable
from cluster.engine_choice import Route
from cluster.engine_link import EngineLink
from cluster.openai.engine_client import ChoiceRequest, EngineInfo, GenerateRequest
from cluster.token_socket import CallError, GenerateCall, GenerateEnd
from engine.errors import EngineDiedError, RequestGivenUpError
from engine.request import RequestOutput, SamplingParams

TIMEOUT_S = 20
NUM_TOKENS = 12


def token(prompt: list[int], index: int) -> int:
    """What every engine says in that place."""
    return (31 * sum(prompt) + 7 * index) % 1000


class Engines:
    """A Serve handle before two engines.

    Attributes:
        ends: What becomes of each call, in order: (tokens that it gives, "died", "killed",
            "frozen" or "rebuilding"); calls beyond these go to their ends.
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

    async def _describe(self, *, route: Route) -> bytes:
        return msgspec.msgpack.encode(EngineInfo(is_ready=True, engine_id=route.order[0]))

    async def _generate(self, payload: bytes, *, route: Route) -> bytes:
        name = route.order[0]
        call = msgspec.msgpack.decode(payload, type=GenerateCall)
        num_tokens, end = self.ends.pop(0) if self.ends else (NUM_TOKENS, "whole")
        self.calls.append((name, call))
        table = self.tables[name]
        running = table.open(call)
        for choice in call.choices:
            first = len(choice.output_token_ids)
            for index in range(first, min(first + num_tokens, NUM_TOKENS)):
                output = RequestOutput(
                    request_id=running.request_ids[choice.index],
                    first_index=index,
                    token_ids=(token(choice.prompt_token_ids, index),),
                    finish_reason="length" if index == NUM_TOKENS - 1 else None,
                )
                table.deliver([output])
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
    link = open_link(
        engines,
        lambda: {"one": READY, "two": READY},
        silence_timeout_s=1.0,
        hold_timeout_s=TIMEOUT_S,
    )
    await link.wait_until_ready(TIMEOUT_S)
    yield link
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
    got: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
    async with asyncio.timeout(TIMEOUT_S):
        async for index, delta in link.generate(GenerateRequest(request_id="r", choices=choices)):
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
    assert [call.output_token_ids for call in after.choices] == [
        [token(call.prompt_token_ids, index) for index in range(5)] for call in after.choices
    ]
    seeds = [[call.sampling.seed for call in each.choices] for each in (before, after)]
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
