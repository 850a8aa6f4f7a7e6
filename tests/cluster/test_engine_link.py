"""The router's link to an engine whose Serve deployment fails in the ways that Serve has."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from fake_handle import READY, Method, open_link
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from cluster.engine_link import EngineLink
from cluster.openai.engine_client import ChoiceRequest, EngineInfo, GenerateRequest
from engine.errors import EngineNotReadyError
from engine.request import SamplingParams
from engine.stats import EngineStats

TIMEOUT_S = 20

NAME = "one"
UNAVAILABLE = DeploymentUnavailableError(DeploymentID(name="Engine", app_name="qwen"))
REPLACED = ReplicaUnavailableError("Engine#1")


class Engine:
    """A handle of the engine's deployment.

    Attributes:
        answer: What every call gets.
        num_calls: Of `describe`, so far.
        statuses: What replicas that start have written.
    """

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.num_calls = asyncio.Semaphore(0)
        self.statuses: dict[str, dict[str, Any]] = {NAME: READY}
        self.describe = Method(self._describe)
        self.generate = Method(self._generate)

    async def _describe(self, **_: object) -> bytes:
        self.num_calls.release()
        return await self._generate()

    async def _generate(self, *_: object, **__: object) -> bytes:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def engine() -> Engine:
    return Engine(UNAVAILABLE)


@pytest.fixture
async def link(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineLink]:
    monkeypatch.setattr("cluster.engine_fleet.INFO_PERIOD_S", 0.001)
    link = open_link(
        engine,
        lambda: engine.statuses,
        silence_timeout_s=TIMEOUT_S,
        hold_timeout_s=TIMEOUT_S,
    )
    yield link
    await link.close()


async def calls(engine: Engine, count: int) -> None:
    """Wait until the engine was asked `count` times from here on."""
    engine.num_calls = asyncio.Semaphore(0)
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(count):
            await engine.num_calls.acquire()


@pytest.mark.parametrize("failure", [UNAVAILABLE, REPLACED])
async def test_the_watch_outlives_a_deployment_that_is_unavailable(
    failure: Exception, engine: Engine, link: EngineLink
) -> None:
    engine.answer = failure
    await calls(engine, 5)
    link.check()
    info = await link.engine_info()
    assert not info.is_ready
    assert info.status == "waiting for the engine's leader to answer"


@pytest.mark.parametrize("failure", [UNAVAILABLE, REPLACED])
async def test_a_request_to_an_unavailable_deployment_ends_in_an_error_of_ours(
    failure: DeploymentUnavailableError | ReplicaUnavailableError, engine: Engine, link: EngineLink
) -> None:
    engine.answer = failure
    choice = ChoiceRequest(prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1))
    with pytest.raises(EngineNotReadyError, match=re.escape(failure.message)):
        async for _ in link.generate(GenerateRequest(request_id="r", choices=(choice,))):
            pass


async def test_a_leader_that_said_ready_and_does_not_answer_is_what_is_waited_for(
    engine: Engine, link: EngineLink
) -> None:
    await calls(engine, 3)
    with pytest.raises(EngineNotReadyError, match=r"leader to answer\."):
        await link.wait_until_ready(0.0)


async def test_the_fleet_has_engines_that_start_and_how_far_they_are(
    engine: Engine, link: EngineLink
) -> None:
    progress = {"phase": "weights", "done": 40, "total": 100, "note": "layer 3"}
    engine.statuses["two"] = {**READY, **progress, "ranks": [{"rank": 0, **progress}]}
    engine.answer = msgspec.msgpack.encode(EngineInfo(is_ready=True, engine_id=NAME, epoch=3))
    await link.wait_until_ready(TIMEOUT_S)
    await calls(engine, 3)
    fleet = await link.fleet()
    assert [(info.engine_id, info.is_ready) for info in fleet.engines] == [
        (NAME, True),
        ("two", False),
    ]
    assert fleet.engines[1].status == "weights 40 of 100: layer 3"
    assert [rank.state for rank in fleet.engines[1].ranks] == ["weights"]
    told = {(event.engine_id, event.what) for event in fleet.events}
    assert (NAME, "ready, epoch 3") in told
    assert ("two", "came: weights 40 of 100: layer 3") in told


@pytest.mark.parametrize("failure", [TimeoutError(), UNAVAILABLE])
async def test_what_is_known_of_an_engine_outlives_a_call_that_fails(
    failure: Exception, engine: Engine, link: EngineLink
) -> None:
    known = EngineInfo(
        is_ready=True, engine_id=NAME, context_length=512, stats=EngineStats(steps_total=7)
    )
    engine.answer = msgspec.msgpack.encode(known)
    assert (await link.wait_until_ready(TIMEOUT_S)).stats.steps_total == 7
    engine.answer = failure
    await calls(engine, 3)
    info = await link.engine_info()
    assert not info.is_ready
    assert info.stats.steps_total == 7
    assert info.context_length == 512


class SleepingDeployment(Engine):
    """A handle of a deployment without an engine, until a call has made Serve start one.

    Attributes:
        running: Ids of the engines that Serve would call.
        num_held: Calls that wait for an engine.
        num_looks: How often `running` was looked at.
    """

    def __init__(self) -> None:
        super().__init__(msgspec.msgpack.encode(EngineInfo(is_ready=True, engine_id=NAME)))
        self.statuses = {}
        self.running: set[str] = set()
        self.num_held = 0
        self.num_looks = asyncio.Semaphore(0)
        self.is_called = asyncio.Event()
        self.has_started = asyncio.Event()

    async def _describe(self, **_: object) -> bytes:
        if not self.running:
            self.num_held += 1
            self.is_called.set()
            try:
                await self.has_started.wait()
            finally:
                self.num_held -= 1
        return await super()._describe()

    def list_running(self) -> set[str]:
        self.num_looks.release()
        return self.running

    def start(self) -> None:
        self.statuses[NAME] = READY
        self.running.add(NAME)
        self.has_started.set()


@pytest.fixture
async def sleeping(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[SleepingDeployment, EngineLink]]:
    monkeypatch.setattr("cluster.engine_fleet.INFO_PERIOD_S", 0.001)
    deployment = SleepingDeployment()
    link = open_link(
        deployment,
        lambda: deployment.statuses,
        silence_timeout_s=TIMEOUT_S,
        hold_timeout_s=TIMEOUT_S,
        list_running=deployment.list_running,
    )
    yield deployment, link
    await link.close()


async def test_who_waits_while_no_engine_runs_has_one_call_pending_for_all(
    sleeping: tuple[SleepingDeployment, EngineLink],
) -> None:
    deployment, link = sleeping
    async with asyncio.timeout(TIMEOUT_S):
        while (await link.engine_info()).status != "no engine runs until a request comes":
            await asyncio.sleep(0)
    waiting = [asyncio.create_task(link.wait_until_ready(TIMEOUT_S)) for _ in range(5)]
    async with asyncio.timeout(TIMEOUT_S):
        await deployment.is_called.wait()
        assert deployment.num_held == 1
        deployment.start()
        infos = await asyncio.gather(*waiting)
    assert {info.is_ready for info in infos} == {True}
    assert deployment.num_held == 0


async def test_a_call_that_nobody_waits_for_any_longer_keeps_no_engine_awake(
    sleeping: tuple[SleepingDeployment, EngineLink],
) -> None:
    deployment, link = sleeping
    waiting = asyncio.create_task(link.wait_until_ready(TIMEOUT_S))
    async with asyncio.timeout(TIMEOUT_S):
        await deployment.is_called.wait()
        waiting.cancel()
        while deployment.num_held:
            await asyncio.sleep(0)


async def test_a_wait_that_is_too_long_ends_with_the_flag_that_bounds_it(
    sleeping: tuple[SleepingDeployment, EngineLink],
) -> None:
    _, link = sleeping
    with pytest.raises(EngineNotReadyError, match=r"--hold-timeout-s=0\.05: .* or raise"):
        await link.wait_until_ready(0.05)


async def test_an_engine_that_serve_lets_go_is_asked_no_more_and_wakes_none(
    sleeping: tuple[SleepingDeployment, EngineLink],
) -> None:
    deployment, link = sleeping
    deployment.start()
    assert (await link.wait_until_ready(TIMEOUT_S)).is_ready
    # It finishes what it has, and its status says until its end that it serves.
    deployment.running.clear()
    deployment.has_started.clear()
    async with asyncio.timeout(TIMEOUT_S):
        while (await link.engine_info()).is_ready:
            await asyncio.sleep(0)
        deployment.num_looks = asyncio.Semaphore(0)
        for _ in range(5):
            await deployment.num_looks.acquire()
    assert deployment.num_held == 0
