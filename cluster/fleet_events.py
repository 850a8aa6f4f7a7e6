"""What happened to the engines lately, told from how they are now and how they were before.

Knows neither Ray nor HTTP. Each router sees for itself, once a second: what comes and goes between
two looks is told only by the epoch that it leaves behind.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from cluster.openai.engine_client import EngineInfo, FleetEvent, FleetEventKind, RankStatus

MAX_EVENTS = 100


class FleetEvents:
    """The latest events, at most `MAX_EVENTS`. Belongs to one event loop.

    Args:
        clock: Seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._known: dict[str, EngineInfo] = {}
        # In which each engine was ready last.
        self._served_epochs: dict[str, int] = {}
        self._events: deque[FleetEvent] = deque(maxlen=MAX_EVENTS)

    @property
    def latest(self) -> tuple[FleetEvent, ...]:
        """The oldest first."""
        return tuple(self._events)

    def take(self, engines: Mapping[str, EngineInfo]) -> None:
        """Take in how all engines are, those that start as well, by id."""
        for engine_id in sorted(self._known.keys() - engines.keys()):
            self._add(engine_id, "gone", "gone")
            self._served_epochs.pop(engine_id, None)
        for engine_id, info in sorted(engines.items()):
            self._compare(engine_id, self._known.get(engine_id), info)
        self._known = dict(engines)

    def _compare(self, engine_id: str, before: EngineInfo | None, after: EngineInfo) -> None:
        if before is None and not after.is_ready:
            self._add(engine_id, "came", f"came: {after.status}")
        was_ready = before is not None and before.is_ready
        if before is not None:
            for rank in _gone_silent(before.ranks, after.ranks):
                host = f" on {rank.note}" if rank.note else ""
                self._add(engine_id, "lost", f"rank {rank.rank}{host} is silent")
        if was_ready and not after.is_ready:
            self._add(engine_id, "lost", after.status)
        if after.is_ready:
            served_epoch = self._served_epochs.get(engine_id)
            self._served_epochs[engine_id] = after.epoch
            if served_epoch is not None and served_epoch != after.epoch:
                self._add(engine_id, "rebuilt", f"rebuilt, epoch {after.epoch}")
            elif not was_ready:
                self._add(engine_id, "ready", f"ready, epoch {after.epoch}")

    def _add(self, engine_id: str, kind: FleetEventKind, what: str) -> None:
        self._events.append(
            FleetEvent(time_s=self._clock(), engine_id=engine_id, kind=kind, what=what)
        )


def _gone_silent(before: tuple[RankStatus, ...], after: tuple[RankStatus, ...]) -> list[RankStatus]:
    silent = {rank.rank for rank in before if rank.state == "silent"}
    return [rank for rank in after if rank.state == "silent" and rank.rank not in silent]
