"""How Serve is told to scale engines and routers: the policies, and what they are told.

Serve's controller runs the engines' policy, and may be unable to import this project: what it runs
is pickled by value, from the modules named here.
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from ray import cloudpickle
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster import engine_demand, needs, nodes, slices
from cluster.engine_demand import EngineDemand, FleetLoad, ScalingRules
from cluster.needs import Need
from cluster.nodes import read_cluster
from cluster.slices import count_gangs
from engine import errors, tpu_slice
from engine.config import EngineConfig
from engine.tpu_slice import Slice

logger = logging.getLogger("ray.serve")

REQUESTS_PER_ROUTER = 256
"""Requests in flight that each router should have, where their number is not fixed."""

_ROUTER_UPSCALE_DELAY_S = 10.0
_ROUTER_DOWNSCALE_DELAY_S = 300.0
_REPORT_PERIOD_S = 2.0
_DECISION_PERIOD_S = 1.0
_CLUSTER_PERIOD_S = 10.0
# Serve keeps a point of each figure this often, as a share of how long it keeps them.
_POINTS_SHARE = 0.2


class Point(Protocol):
    """One of Serve's samples of a figure."""

    @property
    def timestamp(self) -> float: ...

    @property
    def value(self) -> float: ...


class EnginePolicy:
    """Serve's autoscaling policy for engines; made and called by its controller.

    Serve calls ten times a second; decisions are made once a second.

    Args:
        rules: Of `ScalingRules`, by name.
        need: What an engine needs of the cluster, or None if that is not known.
        cpus_per_leader: Beside its hosts.
    """

    def __init__(
        self,
        rules: Mapping[str, Any],
        need: Mapping[str, Any] | None,
        cpus_per_leader: float,
    ) -> None:
        self._rules = ScalingRules(**rules)
        self._need = _read_need(need) if need is not None else None
        self._cpus_per_leader = cpus_per_leader
        self._demand = EngineDemand(self._rules)
        self._decided_s = -math.inf
        self._counted_s = -math.inf
        self._num_possible = self._rules.max_engines
        self._num_wanted = 0

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many engines there should be, and a state that Serve keeps: none."""
        now_s = time.monotonic()
        if now_s - self._decided_s < _DECISION_PERIOD_S:
            return self._num_wanted, {}
        self._decided_s = now_s
        self._count_possible(now_s)
        load = read_load(
            context.raw_metrics or {},
            arrivals_s=self._rules.arrivals_s,
            time_s=now_s,
            num_asked=context.target_num_replicas,
            num_ready=context.current_num_replicas,
            # An average: what is on its way for some milliseconds is no queue.
            num_queued=math.floor(context.total_queued_requests or 0),
            num_possible=self._num_possible,
        )
        self._num_wanted = self._demand.decide(load)
        if self._num_wanted != load.num_asked:
            logger.info("%d engines in place of %d: %s", self._num_wanted, load.num_asked, load)
        return self._num_wanted, {}

    def _count_possible(self, now_s: float) -> None:
        if self._need is None or now_s - self._counted_s < _CLUSTER_PERIOD_S:
            return
        self._counted_s = now_s
        cluster = read_cluster()
        self._num_possible = count_gangs(self._need, cluster, cpus_beside=self._cpus_per_leader)


def _read_need(fields: Mapping[str, Any]) -> Need:
    tpu = fields["tpu"]
    return Need(**{**fields, "tpu": Slice(**tpu) if tpu is not None else None})


def read_load(
    figures: Mapping[str, Mapping[Any, Sequence[Point]]],
    *,
    arrivals_s: float,
    time_s: float,
    num_asked: int,
    num_ready: int,
    num_queued: int,
    num_possible: int,
) -> FleetLoad:
    """Put together what each engine told, `Engine.record_autoscaling_stats`, over the last while.

    Args:
        figures: Points by the figure's name and engine, the oldest first.
        arrivals_s: Over how long arrivals are counted.
        num_queued: Requests that no engine has taken.
    """

    def latest(name: str) -> list[float]:
        return [points[-1].value for points in figures.get(name, {}).values() if points]

    delays_s = latest("queue_delay_s")
    arrivals = _rises(figures, "requests_total", arrivals_s)
    served = _rises(figures, "served_total", arrivals_s)
    service_s = _rises(figures, "service_s_total", arrivals_s)
    num_served = sum(count for count, _ in served)
    return FleetLoad(
        time_s=time_s,
        num_asked=num_asked,
        num_ready=num_ready,
        num_running=sum(latest("num_running")),
        num_waiting=sum(latest("num_waiting")) + num_queued,
        queue_delay_s=sum(delays_s) / len(delays_s) if delays_s else 0.0,
        pages_used=sum(latest("page_use")),
        arrivals_per_s=sum(count / passed_s for count, passed_s in arrivals),
        service_s=sum(each for each, _ in service_s) / num_served if num_served else None,
        num_possible=num_possible,
    )


def _rises(
    figures: Mapping[str, Mapping[Any, Sequence[Point]]], name: str, over_s: float
) -> list[tuple[float, float]]:
    """By how much each engine's counter has risen, and in how many seconds."""
    rises = []
    for points in figures.get(name, {}).values():
        last = points[-1]
        first = next(point for point in points if point.timestamp >= last.timestamp - over_s)
        passed_s = last.timestamp - first.timestamp
        if passed_s > 0:
            rises.append((last.value - first.value, passed_s))
    return rises


def engine_autoscaling(
    config: EngineConfig, *, need: Need | None, cpus_per_leader: float
) -> AutoscalingConfig:
    """Have the number of engines follow the load, within what `config` says.

    Args:
        config: Its `max_engines` is set.
        need: What an engine needs of the cluster, or None if that is not known.
        cpus_per_leader: Beside its hosts.
    """
    assert config.max_engines is not None, "else the number is fixed"
    rules = ScalingRules(
        min_engines=config.fewest_engines,
        max_engines=config.max_engines,
        num_slots=config.max_running_requests,
        target_load=config.target_load,
        target_queue_delay_s=config.target_queue_delay_s,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
    )
    with _by_value(), _own_period():
        return AutoscalingConfig(
            min_replicas=config.fewest_engines,
            max_replicas=config.max_engines,
            # One is started at once, so that what is wrong with it shows.
            initial_replicas=max(1, config.fewest_engines),
            # The policy has its own delays.
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=_REPORT_PERIOD_S,
            look_back_period_s=max(_REPORT_PERIOD_S / _POINTS_SHARE, 2 * config.upscale_delay_s),
            policy=AutoscalingPolicy(
                policy_function=EnginePolicy,
                policy_kwargs={
                    "rules": asdict(rules),
                    "need": asdict(need) if need is not None else None,
                    "cpus_per_leader": cpus_per_leader,
                },
            ),
        )


def router_autoscaling(config: EngineConfig) -> AutoscalingConfig:
    """Have the number of routers follow the requests in flight, as Serve does by itself.

    Args:
        config: Its `max_routers` is set.
    """
    assert config.max_routers is not None, "else the number is fixed"
    return AutoscalingConfig(
        min_replicas=config.num_routers,
        max_replicas=config.max_routers,
        target_ongoing_requests=REQUESTS_PER_ROUTER,
        upscale_delay_s=_ROUTER_UPSCALE_DELAY_S,
        downscale_delay_s=_ROUTER_DOWNSCALE_DELAY_S,
    )


@contextlib.contextmanager
def _by_value() -> Iterator[None]:
    """Pickle what the policy uses of this project along with it."""
    modules = (engine_demand, needs, nodes, slices, tpu_slice, errors)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@contextlib.contextmanager
def _own_period() -> Iterator[None]:
    """Take Serve's one setting for how often it is told, though it will be another one day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        yield
