"""Engines that serve a trace, second by second, as many as a policy asks for.

A model of engines, not engines: each has slots and KV pages, a request holds a slot for a time that
its lengths give, requests are admitted in order of arrival, and an engine that is asked for runs
some minutes later. All engines share one queue. The policy is the one of `cluster.engine_demand`,
and knows what it would know in a cluster: figures that are some seconds old.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from benchmarks.scaling.traces import Trace
from cluster.engine_demand import EngineDemand, FleetLoad, ScalingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What an engine can do.

    Attributes:
        num_tokens: That its KV pages hold.
        prefill_s: Seconds per prompt token.
        decode_s: Seconds per output token, whatever else runs beside it.
        start_s: From the moment that an engine is asked for until it serves.
        report_age_s: How old the figures are that the policy sees.
    """

    num_slots: int = 64
    num_tokens: int = 200_000
    prefill_s: float = 1 / 8_000
    decode_s: float = 0.04
    start_s: int = 180
    report_age_s: int = 3

    def service_s(self, trace: Trace) -> np.ndarray:
        """How long each request holds a slot, in whole seconds."""
        seconds = trace.context * self.prefill_s + trace.generated * self.decode_s
        return np.maximum(1, np.rint(seconds)).astype(int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What happened, per second unless it says otherwise.

    Attributes:
        asked: Engines that the policy asked for.
        ready: Engines that served.
        running: Requests that held a slot.
        oracle: Engines that somebody would have asked for who knows what will come.
        delay_s: How long each request waited for its slot.
        engine_hours: In which hosts were taken: starting, serving or finishing what they had.
        oracle_hours: The same for the oracle.
    """

    trace: Trace
    asked: np.ndarray
    ready: np.ndarray
    running: np.ndarray
    oracle: np.ndarray
    delay_s: np.ndarray
    engine_hours: float
    oracle_hours: float

    @property
    def changes(self) -> np.ndarray:
        """By how much the number of engines changed, each time that it did."""
        changes = np.diff(self.asked)
        return changes[changes != 0]

    @property
    def turns_per_hour(self) -> float:
        """How often an hour the number turned from growing to shrinking or back."""
        turns = np.count_nonzero(np.diff(np.sign(self.changes)))
        return turns / (len(self.asked) / 3600)


class _Requests:
    """The requests of a trace under way.

    Invariant: requests below `head` have had a slot, those from `tail` on have not arrived.
    """

    def __init__(self, trace: Trace, model: EngineModel, num_seconds: int) -> None:
        self._model = model
        self._service_s = model.service_s(trace)
        # Half of its output is what a request has on average.
        self._tokens = trace.context + trace.generated // 2
        self._tokens_before = np.concatenate(([0], np.cumsum(self._tokens)))
        self._tails = np.searchsorted(trace.arrival_s, np.arange(1, num_seconds + 1))
        last = num_seconds + int(self._service_s.max(initial=1)) + 1
        self._ending = np.zeros(last, int)
        self._ending_tokens = np.zeros(last, int)
        self._ending_service_s = np.zeros(last, int)
        self.admitted_s = np.full(len(trace.arrival_s), float(num_seconds))
        self.arrival_s = trace.arrival_s
        self.head = self.tail = 0
        self.running = 0
        self.tokens = 0
        self.served = 0
        self.service_s = 0

    def advance(self, second: int, num_engines: int) -> None:
        """Let what ends end and what may begin begin."""
        self.running -= self._ending[second]
        self.tokens -= self._ending_tokens[second]
        self.served += self._ending[second]
        self.service_s += self._ending_service_s[second]
        self.tail = int(self._tails[second])
        free = num_engines * self._model.num_slots - self.running
        free_tokens = num_engines * self._model.num_tokens - self.tokens
        if free <= 0 or free_tokens <= 0:
            return
        fits = np.searchsorted(
            self._tokens_before, self._tokens_before[self.head] + free_tokens, side="right"
        )
        end = max(self.head, min(self.tail, self.head + free, int(fits) - 1))
        begun = slice(self.head, end)
        ends = second + self._service_s[begun]
        np.add.at(self._ending, ends, 1)
        np.add.at(self._ending_tokens, ends, self._tokens[begun])
        np.add.at(self._ending_service_s, ends, self._service_s[begun])
        self.admitted_s[begun] = np.maximum(second, self.arrival_s[begun])
        self.running += end - self.head
        self.tokens += int(self._tokens_before[end] - self._tokens_before[self.head])
        self.head = end

    def queue_delay_s(self, second: int) -> float:
        if self.head >= self.tail:
            return 0.0
        return max(0.0, second - float(self.arrival_s[self.head]))


@dataclass(frozen=True, slots=True)
class _Report:
    running: int
    waiting: int
    delay_s: float
    pages_used: float
    arrived: int
    served: int
    service_s: int


def simulate(
    trace: Trace,
    model: EngineModel,
    rules: ScalingRules,
    *,
    num_first: int = 1,
    num_possible: int = 2**31,
    idle_s: int = 0,
) -> Run:
    """Serve a trace with as many engines as the policy asks for.

    Args:
        num_first: Engines that serve from the beginning.
        num_possible: Engines that the cluster can hold.
        idle_s: How long to go on after the trace's end.
    """
    num_seconds = int(trace.end_s) + idle_s
    requests = _Requests(trace, model, num_seconds)
    demand = EngineDemand(rules)
    reports: list[_Report] = []
    starting: deque[int] = deque()  # When each will serve.
    num_ready = num_first
    asked, ready, running, taken = (np.zeros(num_seconds, int) for _ in range(4))
    for second in range(num_seconds):
        while starting and starting[0] <= second:
            starting.popleft()
            num_ready += 1
        requests.advance(second, num_ready)
        reports.append(
            _Report(
                requests.running,
                requests.tail - requests.head,
                requests.queue_delay_s(second),
                requests.tokens / model.num_tokens,
                requests.tail,
                requests.served,
                requests.service_s,
            )
        )
        num_asked = num_ready + len(starting)
        load = _load(reports, second, model, rules, num_asked, num_ready, num_possible)
        wanted = demand.decide(load)
        starting.extend([second + model.start_s] * (wanted - num_asked))
        for _ in range(num_asked - wanted):
            # Those that do not serve yet go first, as in Serve.
            if starting:
                starting.pop()
            else:
                num_ready -= 1
        asked[second], ready[second] = wanted, num_ready
        running[second] = requests.running
        taken[second] = max(wanted, math.ceil(requests.running / model.num_slots))
    oracle = _oracle(trace, model, rules, num_seconds)
    return Run(
        trace=trace,
        asked=asked,
        ready=ready,
        running=running,
        oracle=oracle,
        delay_s=requests.admitted_s - trace.arrival_s,
        engine_hours=float(taken.sum()) / 3600,
        oracle_hours=float(oracle.sum()) / 3600,
    )


def _load(
    reports: list[_Report],
    second: int,
    model: EngineModel,
    rules: ScalingRules,
    num_asked: int,
    num_ready: int,
    num_possible: int,
) -> FleetLoad:
    """What the policy knows in this second."""
    last = max(0, second - model.report_age_s)
    first = max(0, last - round(rules.arrivals_s))
    now, before = reports[last], reports[first]
    passed_s = max(1, last - first)
    num_served = now.served - before.served
    return FleetLoad(
        time_s=float(second),
        num_asked=num_asked,
        num_ready=num_ready,
        num_running=now.running,
        # Serve tells of calls that wait for a first engine at once.
        num_waiting=now.waiting if num_ready else reports[second].waiting,
        queue_delay_s=now.delay_s,
        pages_used=now.pages_used,
        arrivals_per_s=(now.arrived - before.arrived) / passed_s,
        service_s=(now.service_s - before.service_s) / num_served if num_served else None,
        num_possible=num_possible,
    )


def _oracle(trace: Trace, model: EngineModel, rules: ScalingRules, num_seconds: int) -> np.ndarray:
    """Engines, so that no request ever waits and none is taken in vain, start included."""
    begins = np.floor(trace.arrival_s).astype(int)
    ends = np.minimum(begins + model.service_s(trace), num_seconds)
    slots = np.zeros(num_seconds + 1, int)
    tokens = np.zeros(num_seconds + 1, int)
    each = trace.context + trace.generated // 2
    np.add.at(slots, begins, 1)
    np.add.at(slots, ends, -1)
    np.add.at(tokens, begins, each)
    np.add.at(tokens, ends, -each)
    full = np.maximum(
        np.cumsum(slots)[:-1] / model.num_slots, np.cumsum(tokens)[:-1] / model.num_tokens
    )
    needed = np.maximum(np.ceil(full - 1e-9).astype(int), rules.min_engines)
    ahead = np.concatenate((needed, np.full(model.start_s, needed[-1])))
    windows = np.lib.stride_tricks.sliding_window_view(ahead, model.start_s + 1)
    return windows.max(axis=1)[:num_seconds]
