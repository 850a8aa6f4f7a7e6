"""The leader over hosts that do as a test says: what it tells of itself and leaves behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import null_program
import pytest
from ray import serve

from cluster import replica, user_config
from cluster.engine_choice import Route
from cluster.gang import HostStatus
from cluster.openai.engine_client import EngineInfo
from cluster.replica import Engine
from cluster.status import read_all, read_refusals
from engine.errors import ConfigError, EngineDiedError, EngineNotReadyError, QwenOnRayError
from engine.step import (
    Bucket,
    EngineLimits,
    ProgressCallback,
    StepMasks,
    StepPlan,
    StepResult,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("local_ray"),
]

MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen2"
TIMEOUT_S = 60
LIMITS = msgspec.structs.replace(
    null_program.LIMITS, buckets=(Bucket(num_seqs=4, num_chunk_tokens=16, num_chunks=1),)
)


class Hosts:
    """In the place of a `HostGroup`; every step fails.

    Attributes:
        may_start: Cleared, a start waits.
        failure: Set, the epoch is over.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.hosts: tuple[HostStatus, ...] = ()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.is_starting = asyncio.Event()
        self.failure: asyncio.Future[QwenOnRayError] = asyncio.get_running_loop().create_future()

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        self.epoch += 1
        self.is_starting.set()
        await self.may_start.wait()
        return LIMITS

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        result: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        result.set_exception(EngineDiedError("the device caught fire"))
        return result

    def mask(self, masks: StepMasks) -> None:
        pass

    async def failed(self) -> QwenOnRayError:
        return await asyncio.shield(self.failure)

    async def stop(self) -> None:
        pass


@pytest.fixture
async def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    hosts = Hosts()
    context = SimpleNamespace(app_name="app", replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica, "HostGroup", lambda config, name: hosts)
    monkeypatch.setattr(user_config, "log_into_serve", lambda level: None)
    return hosts


class Leader(Engine):
    def __del__(self) -> None:  # type: ignore[override]
        """Nothing: Python would call the coroutine function, and nobody would await it."""


@asynccontextmanager
async def leader(**fields: object) -> AsyncIterator[Engine]:
    """What Serve does with a replica: it is made, and its end is told even if that failed."""
    engine = Leader.__new__(Leader)
    try:
        await engine.__init__({"model_path": str(MODEL), **fields})
        yield engine
    finally:
        await Engine.__del__(engine)


async def describe(engine: Engine) -> EngineInfo:
    return msgspec.msgpack.decode(await engine.describe(route=Route()), type=EngineInfo)


async def test_the_reason_of_a_warm_up_that_failed_stays_to_be_read(hosts: Hosts) -> None:
    with pytest.raises(EngineDiedError, match="caught fire"):
        async with leader():
            pass
    status = read_all("app")["one"]
    assert status["phase"] == "failed"
    assert "the device caught fire" in status["note"]


async def test_a_replica_that_served_leaves_no_status(hosts: Hosts) -> None:
    async with leader(skip_server_warmup=True):
        assert read_all("app")["one"]["phase"] == "ready"
    assert read_all("app") == {}


async def test_counters_go_on_when_the_hosts_are_rebuilt(hosts: Hosts) -> None:
    async with leader(skip_server_warmup=True) as engine, asyncio.timeout(TIMEOUT_S):
        assert engine._core is not None
        engine._core.stats.steps_total, engine._core.stats.num_running = 7, 3
        hosts.may_start.clear()
        hosts.is_starting.clear()
        hosts.failure.set_result(EngineDiedError("a host died"))
        await hosts.is_starting.wait()
        stats = (await describe(engine)).stats
        assert (stats.steps_total, stats.num_running, stats.num_pages) == (7, 0, 0)


async def test_the_context_is_known_while_the_hosts_are_rebuilt(hosts: Hosts) -> None:
    async with leader(skip_server_warmup=True) as engine, asyncio.timeout(TIMEOUT_S):
        assert (await describe(engine)).context_length == LIMITS.context_length
        hosts.may_start.clear()
        hosts.is_starting.clear()
        hosts.failure.set_result(EngineDiedError("a host died"))
        await hosts.is_starting.wait()
        info = await describe(engine)
        assert not info.is_ready
        assert info.context_length == LIMITS.context_length


async def stay_healthy(engine: Engine) -> None:
    """Ask as Serve does, only more often, until it raises."""
    while True:
        await engine.check_health()
        await asyncio.sleep(0.01)


async def test_an_engine_that_stays_without_hosts_is_told_to_serve(hosts: Hosts) -> None:
    fields = {"skip_server_warmup": True, "hold_timeout_s": 0.2}
    async with leader(**fields) as engine, asyncio.timeout(TIMEOUT_S):
        await engine.check_health()
        hosts.may_start.clear()
        hosts.is_starting.clear()
        hosts.failure.set_result(EngineDiedError("a host died"))
        await hosts.is_starting.wait()
        await engine.check_health()  # That may happen to anybody.
        with pytest.raises(EngineNotReadyError, match=r"without hosts for \d+ s \(epoch 2\)"):
            await stay_healthy(engine)
        hosts.failure = asyncio.get_running_loop().create_future()
        hosts.may_start.set()
        while not (await describe(engine)).is_ready:
            await asyncio.sleep(0.01)
        await engine.check_health()


async def test_a_user_config_at_fault_stops_no_engine_that_serves(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str | None] = []
    monkeypatch.setattr(user_config, "log_into_serve", levels.append)
    async with leader(skip_server_warmup=True) as engine:
        with pytest.raises(ConfigError, match="--log-level='loud'"):
            await engine.reconfigure({"log_level": "loud"})
        await engine.check_health()
        await engine.reconfigure({"log_level": "loud"})
        assert "--log-level='loud'" in read_refusals("app")["one"]
        await engine.reconfigure({"log_level": "debug"})
        assert read_refusals("app") == {}
        assert levels == [None, "debug"]
