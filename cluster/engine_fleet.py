"""The engines behind a Serve handle: which there are, how they are, and when one can be used.

Each is asked once a second, over Serve, in a task of its own, so that one that does not answer
delays none of the others. Engines that start cannot answer yet: of these `cluster.status` tells.
Where no engine runs, a call makes Serve start one, so one is made if somebody waits, and none else.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle

from cluster.engine_call import CALL_FAILURES, answer_within
from cluster.engine_choice import EngineChooser, Route
from cluster.fleet_events import FleetEvents
from cluster.openai.engine_client import EngineInfo, Fleet, RankStatus
from cluster.status import describe_progress
from engine.errors import EngineNotReadyError
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

INFO_PERIOD_S = 1.0
_INFO_TIMEOUT_S = 3.0


class EngineFleet:
    """What a router knows of all engines. Belongs to one event loop.

    Args:
        engine: Handle of the `Engine` deployment.
        chooser: Told of each engine's state.
        read_statuses: What `cluster.status.read_all` gives for this application; may block.
        list_running: Ids of the engines that Serve would call, or None if that is not known.
        may_sleep: Whether none runs while nobody asks.

    Attributes:
        info: Of all engines together.
    """

    def __init__(
        self,
        engine: DeploymentHandle,
        chooser: EngineChooser,
        read_statuses: Callable[[], Mapping[str, Mapping[str, Any]]],
        list_running: Callable[[], Collection[str] | None],
        may_sleep: bool,
    ) -> None:
        self.info = EngineInfo(is_ready=False, status="waiting for the engine to be placed")
        self._engine = engine
        self._chooser = chooser
        self._read_statuses = read_statuses
        self._list_running = list_running
        self._may_sleep = may_sleep
        self._statuses: Mapping[str, Mapping[str, Any]] = {}
        self._engines: dict[str, EngineInfo] = {}
        # Of engines that are gone: counters that fell would count twice.
        self._departed: dict[str, EngineStats] = {}
        self._events = FleetEvents()
        self._changed = asyncio.Event()
        self._num_waiting = 0
        self._waking: asyncio.Task[None] | None = None

    @property
    def engines(self) -> list[EngineInfo]:
        """Each engine that has been asked, by its id."""
        return [self._engines[name] for name in sorted(self._engines)]

    def view(self) -> Fleet:
        """Each engine, those that start as well, and what happened to them lately."""
        engines = self._all_engines()
        return Fleet(
            engines=tuple(engines[name] for name in sorted(engines)), events=self._events.latest
        )

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        """Wait for an engine that can take requests, and have one started if none runs.

        Raises:
            EngineNotReadyError: There was none in time.
        """
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                while not self._chooser.ready:
                    if self._waking is None or self._waking.done():
                        self._waking = asyncio.create_task(self._wake())
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise EngineNotReadyError(
                f"No engine was ready within --hold-timeout-s={timeout_s:g}: {self.info.status}. "
                "It goes on starting: ask again later, or raise --hold-timeout-s."
            ) from None
        finally:
            self._num_waiting -= 1
            if self._waking is not None and (self._num_waiting == 0 or self._chooser.ready):
                self._waking.cancel()
                self._waking = None
        return self.info

    async def _wake(self) -> None:
        """Keep a call pending while no engine runs: Serve starts one for it, and for it alone."""
        while True:
            if not self._list_running():
                response = self._engine.describe.remote(route=Route())
                try:
                    await response
                except CALL_FAILURES as error:
                    logger.debug("no engine could be woken: %r", error)
                finally:
                    response.cancel()
            await asyncio.sleep(INFO_PERIOD_S)

    async def watch(self) -> None:
        """Keep `info` and the chooser up to date; runs for ever."""
        watches: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for watch in watches.values():
                    if watch.done():
                        watch.result()  # Its fault ends this task, too, and is heard of.
                self._statuses = await asyncio.to_thread(self._read_statuses)
                living = set(self._statuses)
                if (running := self._list_running()) is not None:
                    # One that Serve does not call any longer is about to end.
                    living.intersection_update(running)
                serving = {name for name in living if self._statuses[name]["phase"] == "ready"}
                for name in serving - watches.keys():
                    watches[name] = asyncio.create_task(self._watch_engine(name))
                for name in watches.keys() - living:
                    await _end(watches.pop(name))
                    self._forget(name)
                self._publish()
                await asyncio.sleep(INFO_PERIOD_S)
        finally:
            for watch in watches.values():
                await _end(watch)

    async def _watch_engine(self, name: str) -> None:
        while True:
            info = await self._ask(name)
            self._engines[name] = info
            self._departed.pop(name, None)
            self._chooser.update(name, info)
            self._publish()
            await asyncio.sleep(INFO_PERIOD_S)

    async def _ask(self, name: str) -> EngineInfo:
        """What an engine tells of itself, or what is known if it does not."""
        running = self._list_running()
        if running is not None and name not in running:
            return self._silent(name)
        response = self._engine.describe.remote(route=Route((name,)))
        payload = await answer_within(_INFO_TIMEOUT_S, response)
        if payload is not None:
            info = msgspec.msgpack.decode(payload, type=EngineInfo)
            if info.engine_id == name:
                return info
            logger.debug("engine %s answered in the place of %s", info.engine_id, name)
        return self._silent(name)

    def _silent(self, name: str) -> EngineInfo:
        # It is about to be called for the first time, or has just died.
        status = "waiting for the engine's leader to answer"
        known = self._engines.get(name, EngineInfo(is_ready=False, engine_id=name))
        return replace(known, is_ready=False, status=status, ranks=())

    def _forget(self, name: str) -> None:
        self._chooser.forget(name)
        info = self._engines.pop(name, None)
        if info is not None:
            self._departed[name] = info.stats.counters()

    def _publish(self) -> None:
        infos = self.engines
        ready = [info for info in infos if info.is_ready]
        starting = [
            status
            for name, status in self._statuses.items()
            if name not in self._engines and status["phase"] != "ready"
        ]
        departed = self._departed.values()
        stats = reduce(add, (info.stats for info in infos), reduce(add, departed, EngineStats()))
        ranks = tuple(rank for info in infos for rank in info.ranks)
        ranks += tuple(_rank_of(rank) for status in starting for rank in status["ranks"])
        # Facts of the model are every engine's, and outlive it.
        model = next(iter(ready or infos), self.info)
        self.info = replace(
            model,
            is_ready=bool(ready),
            status=self._describe(infos, starting),
            ranks=ranks,
            stats=stats,
        )
        self._events.take(self._all_engines())
        self._changed.set()

    def _all_engines(self) -> dict[str, EngineInfo]:
        starting = {
            name: EngineInfo(
                is_ready=False,
                engine_id=name,
                status=describe_progress(status),
                ranks=tuple(map(_rank_of, status["ranks"])),
            )
            for name, status in self._statuses.items()
        }
        return starting | {
            name: self._with_progress(name, info) for name, info in self._engines.items()
        }

    def _with_progress(self, name: str, info: EngineInfo) -> EngineInfo:
        """Say of an engine that is rebuilt how far that has come."""
        status = self._statuses.get(name)
        if info.is_ready or status is None or status["phase"] == "ready":
            return info
        return replace(info, status=f"{info.status}: {describe_progress(status)}")

    def _describe(self, infos: list[EngineInfo], starting: list[Mapping[str, Any]]) -> str:
        lines = [info.status for info in infos if not info.is_ready]
        lines += [
            describe_progress(status)
            for status in sorted(starting, key=lambda status: status["time"])
        ]
        num_ready = len(infos) - sum(not info.is_ready for info in infos)
        if not lines:
            if infos:
                return "ready"
            if self._may_sleep and not self._num_waiting:
                return "no engine runs until a request comes"
            return "waiting for a place for the engine's leader"
        if num_ready == 0:
            return lines[-1]
        return f"{num_ready} of {num_ready + len(lines)} engines ready; {lines[-1]}"


def _rank_of(rank: Mapping[str, Any]) -> RankStatus:
    return RankStatus(rank=rank["rank"], state=rank["phase"], note=describe_progress(rank))


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
