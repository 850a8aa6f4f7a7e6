"""How many engines there should be: what they tell in, a number out.

Knows neither Ray nor what an engine is made of, so that a simulation decides as a cluster does.
"""

import math
from dataclasses import dataclass

KEEP_LOAD = 0.75
"""An engine is stopped only if those that stay would then have this share of the target load."""

ARRIVALS_SHARE = 0.75
"""Arrivals are counted over this share of `upscale_delay_s`: what came all at once, such as the
requests of an engine that died, is forgotten again before it can start engines."""

_SERVICE_MEMORY_S = 180.0
_QUEUE_WATCH_S = 30.0
_STEP_SHARE = 4
_SETTLED_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """What never changes while a deployment lives; the names are those of `EngineConfig`.

    Attributes:
        num_slots: Requests that decode together in one engine.
    """

    min_engines: int
    max_engines: int
    num_slots: int
    target_load: float
    target_queue_delay_s: float
    upscale_delay_s: float
    downscale_delay_s: float

    @property
    def arrivals_s(self) -> float:
        """Over how long arrivals are counted."""
        return ARRIVALS_SHARE * self.upscale_delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetLoad:
    """What all engines together are doing, as far as it is known.

    Attributes:
        time_s: Of this knowledge, by any clock that does not go back.
        num_asked: Engines that were asked for last.
        num_ready: Those of them that serve; the others are starting.
        num_running: Requests that have a slot.
        num_waiting: Requests that wait for one, in engines and before them.
        queue_delay_s: How long the first request in an engine's queue has waited, on average.
        pages_used: Sum over engines of the share of their KV pages that running requests hold.
        arrivals_per_s: Requests that came, over the last `arrivals_s` of the rules.
        service_s: Mean time in their slots of the requests that ended in that time; None if none
            did.
        num_possible: Engines that the cluster's hosts can hold, those included that its own
            autoscaler may still start.
    """

    time_s: float
    num_asked: int
    num_ready: int
    num_running: float = 0.0
    num_waiting: float = 0.0
    queue_delay_s: float = 0.0
    pages_used: float = 0.0
    arrivals_per_s: float = 0.0
    service_s: float | None = None
    num_possible: int = 2**31


class EngineDemand:
    """Decides how many engines there should be, again and again.

    The load is counted in requests that want a slot at the same time: those that have one, or where
    others wait, by Little's law, arrivals per second times the time that a request holds its slot.
    How long the queue is does not count: while engines start, which takes minutes, it grows with
    every second, and the engines that it then seems to need would be idle soon after.

    ```
    load  0 ──────────────── 0.6 ──────────── 0.8 ──────────── 0.9 ──────────── 1
           fewer, if n - 1 would be here        target          more, up to the target
           for all of downscale_delay_s                         after upscale_delay_s
    ```

    Invariant: `_lows` holds (time, engines enough then) since fewer than were asked for have been
    enough without a break, or is empty.
    """

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._service_s: float | None = None
        self._time_s: float | None = None
        self._over_since_s: float | None = None
        self._queue_before: tuple[float, float] | None = None
        self._lows: list[tuple[float, int]] = []
        self._num_asked = -1

    def decide(self, load: FleetLoad) -> int:
        """How many engines to ask for, from here on; to be called every second or so."""
        self._remember(load)
        lowest = self._rules.min_engines
        if load.num_running or load.num_waiting or load.arrivals_per_s:
            lowest = max(lowest, 1)
        # What is asked for already may be more than is possible, if a host has died.
        highest = min(self._rules.max_engines, max(load.num_possible, load.num_asked))
        wanted = self._more(load)
        if wanted <= load.num_asked:
            wanted = min(load.num_asked, self._fewer(load))
        return max(lowest, min(highest, wanted))

    def _remember(self, load: FleetLoad) -> None:
        if load.num_asked != self._num_asked:
            self._num_asked = load.num_asked
            self._over_since_s = self._queue_before = None
            self._lows.clear()
        passed_s = 0.0 if self._time_s is None else load.time_s - self._time_s
        self._time_s = load.time_s
        if load.service_s is None:
            return
        if self._service_s is None:
            self._service_s = load.service_s
        weight = 1 - math.exp(-passed_s / _SERVICE_MEMORY_S)
        self._service_s += weight * (load.service_s - self._service_s)

    def _offered(self, load: FleetLoad) -> float:
        """Requests that would have a slot, if there were one for each."""
        if self._service_s is None:
            return load.num_running + load.num_waiting
        arriving = load.arrivals_per_s * self._service_s
        # Once a long queue is gone, what runs is for a while more than what comes.
        return arriving if load.num_waiting else min(load.num_running, arriving)

    def _full_engines(self, load: FleetLoad, num_requests: float) -> float:
        """Engines of which so many requests would use every slot, or every page."""
        pages = load.pages_used / load.num_running if load.num_running else 0.0
        return num_requests * max(1 / self._rules.num_slots, pages)

    def _more(self, load: FleetLoad) -> int:
        """Engines that are needed, once the load has been too much for long enough."""
        rules = self._rules
        full = self._full_engines(load, self._offered(load))
        has_room = full <= load.num_asked * (1 + rules.target_load) / 2
        needed = load.num_asked if has_room else _ceil(full / rules.target_load)
        is_late = load.queue_delay_s > rules.target_queue_delay_s
        queue_persists = self._queue_persists(load, is_late)
        if needed <= load.num_asked and not is_late:
            self._over_since_s = None
            return 0
        if self._over_since_s is None:
            self._over_since_s = load.time_s
        if load.time_s - self._over_since_s < rules.upscale_delay_s:
            return 0
        if needed <= load.num_asked and queue_persists:
            # Slots are not what is short; the queue alone says that something is.
            return load.num_asked + max(1, load.num_asked // _STEP_SHARE)
        return needed

    def _queue_persists(self, load: FleetLoad, is_late: bool) -> bool:
        """Whether all engines have worked on a queue for a while, and it is no shorter."""
        if not is_late or load.num_ready < load.num_asked:
            self._queue_before = None
            return False
        if self._queue_before is None:
            self._queue_before = (load.time_s, load.num_waiting)
        since_s, num_before = self._queue_before
        # What an engine that has just started has taken must have time to end.
        if load.time_s - since_s < _QUEUE_WATCH_S + (self._service_s or 0.0):
            return False
        self._queue_before = (load.time_s, load.num_waiting)
        return load.num_waiting >= num_before

    def _fewer(self, load: FleetLoad) -> int:
        """Engines that would have been enough for all of `downscale_delay_s`."""
        if load.num_ready == 0 and load.num_asked:
            # Nothing can be known of the load before the first engine runs.
            self._lows.clear()
            return load.num_asked
        full = self._full_engines(load, max(load.num_running, self._offered(load)))
        enough = _ceil(full / (self._rules.target_load * KEEP_LOAD))
        is_late = load.queue_delay_s > self._rules.target_queue_delay_s
        if enough >= load.num_asked or is_late:
            self._lows.clear()
            return load.num_asked
        self._lows.append((load.time_s, enough))
        delay_s = self._rules.downscale_delay_s
        if load.time_s - self._lows[0][0] < delay_s:
            return load.num_asked

        def most_within(seconds: float) -> int:
            return max(low for time_s, low in self._lows if load.time_s - time_s <= seconds)

        # Not what was enough while the load still fell; but none only after a whole delay of none.
        settled = most_within(_SETTLED_SHARE * delay_s)
        return settled or (load.num_asked if most_within(delay_s) else 0)


def _ceil(engines: float) -> int:
    # Not one engine more for what rounding adds.
    return math.ceil(engines - 1e-9)
