"""Where a gang goes: whether a cluster can ever hold it, the hosts that it takes, and the wait.

TPU hosts are taken slice by slice, each by its name and after its hosts have answered: Ray itself
would also pick a slice with a dead host, and wait there for ever. Must not know what runs on them.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from cluster.claim import Claim
from cluster.heartbeat import silent_nodes
from cluster.needs import Need, need_of
from cluster.nodes import Cluster, read_cluster
from cluster.quarantine import read_quarantine
from cluster.slices import (
    SliceState,
    SliceView,
    TpuSlice,
    has_such_heads,
    tpu_slices,
    view_slices,
)
from engine.config import EngineConfig
from engine.errors import CapacityError, EngineError

_POLL_S = 0.25
_KEEP_ANSWER_S = 2.0
"""A host that a gang has just failed on is left sooner than an engine's host counts as dead."""
_GRANT_POLL_S = 0.05
_GRANT_PATIENCE_S = 2.0
"""A slice that is free is granted within milliseconds, unless someone else was quicker."""
_QUICK_ANSWER_S = 0.5
"""Hosts that are well answer within milliseconds; others need not hold up the choice."""
_DEMAND_AFTER_S = 10.0
"""How long a slice that exists may take to become whole or free before another is asked for."""
_ASK_AGAIN_S = 10.0
_MAX_TOLD = 4


def check_capacity(need: Need, cluster: Cluster) -> None:
    """Check that the cluster can give what is needed, now or after others have let go of it.

    Raises:
        CapacityError: It never can, however long one waits.
    """
    slices = tpu_slices(cluster) if need.device == "tpu" else []
    if need.device == "tpu":
        is_possible = any(found.fits(need) for found in slices)
    else:
        per_node = [need.num_bundles_in(node.resources) for node in cluster.nodes]
        # Hosts with GPUs are distinct machines; processes on CPUs may share one.
        most = need.num_hosts if need.device == "cpu" else 1
        is_possible = sum(min(most, count) for count in per_node) >= need.num_hosts
    may_come = need.num_bundles_in(cluster.maxima) >= need.num_hosts
    if is_possible or (may_come and has_such_heads(need, cluster.maxima)):
        return
    num_nodes = len(cluster.nodes)
    has = (
        f"{cluster.total(need.resource):g} {need.device_words} on {num_nodes} "
        f"{'node' if num_nodes == 1 else 'nodes'}"
    )
    if slices:
        has += f", as {'slice' if len(slices) == 1 else 'slices'} {', '.join(map(str, slices))}"
    if cluster.maxima:
        has += f", and its autoscaler stops at {cluster.maxima.get(need.resource, 0):g}"
        if may_come:
            has += f" and starts no {need.tpu}"
    change = (
        "change --tp-size and --nnodes, or set --device=cpu"
        if need.tpu is None
        else "change --tpu or --nnodes, or put --device=cpu in the place of --tpu"
    )
    remedy = (
        "Add CPUs to the cluster or lower --nnodes."
        if need.device == "cpu"
        else f"Start a cluster that has them (`ray up`), {change}."
    )
    raise CapacityError(f"The model needs {need}; this cluster has {has}. {remedy}")


async def can_keep(claim: Claim, config: EngineConfig) -> bool:
    """Whether a gang that has ended may go on where it was.

    Not if a host is gone or does not answer, nor if it is in quarantine and there is another.
    """
    cluster = await asyncio.to_thread(read_cluster)
    if not await asyncio.to_thread(claim.is_intact, cluster):
        return False
    own = set(await asyncio.to_thread(claim.node_ids))
    hosts = [node for node in cluster.nodes if node.node_id in own]
    if await silent_nodes(hosts, timeout_s=min(_KEEP_ANSWER_S, config.host_timeout_s)):
        return False
    if claim.slice is None:
        return True
    quarantined = await asyncio.to_thread(read_quarantine, config.host_quarantine_s)
    return not any(
        view.state is SliceState.QUARANTINED
        for view in view_slices(claim.need, cluster, quarantined=quarantined)
        if not own.isdisjoint(view.slice.node_ids)
    )


async def claim_hosts(
    config: EngineConfig, *, on_wait: Callable[[str], None], timeout_s: float
) -> Claim:
    """Wait for the hosts that `config` needs, and claim them.

    Args:
        on_wait: Told what is waited for, each time that it changes.

    Raises:
        CapacityError: The cluster can never give them.
        EngineError: It did not within `timeout_s`.
    """
    need = need_of(config)
    said = ""

    def tell(note: str) -> None:
        nonlocal said
        if note != said:
            on_wait(f"waiting for {need}: {note}")
            said = note

    search = _claim_slice if need.device == "tpu" else _claim_anywhere
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await search(need, config, tell)
    except TimeoutError:
        if not limit.expired():
            raise
        raise EngineError(
            f"The cluster did not give {need} within {timeout_s:.0f} s: {said}. See `ray status`, "
            "or raise --start-timeout-s."
        ) from None


async def _claim_anywhere(need: Need, config: EngineConfig, tell: Callable[[str], None]) -> Claim:
    claim: Claim | None = None
    asked_s = 0.0
    try:
        while True:
            cluster = await asyncio.to_thread(read_cluster)
            check_capacity(need, cluster)
            if claim is None or time.monotonic() - asked_s > _ASK_AGAIN_S:
                free = [node for node in cluster.nodes if node.has_free(need.bundle)]
                silent = await silent_nodes(free, timeout_s=config.host_timeout_s)
                asked_s = time.monotonic()
                if claim is None or silent != claim.avoided:
                    _release(claim)
                    claim = await _made(Claim.anywhere, need, avoided=silent)
            if await asyncio.to_thread(claim.is_granted):
                granted, claim = claim, None
                return granted
            if await asyncio.to_thread(claim.is_broken):
                _release(claim)
                claim = None
            tell("in use by others, or not started yet")
            await asyncio.sleep(_POLL_S)
    finally:
        _release(claim)


async def _claim_slice(need: Need, config: EngineConfig, tell: Callable[[str], None]) -> Claim:
    demand: Claim | None = None
    began_s = time.monotonic()
    try:
        while True:
            cluster = await asyncio.to_thread(read_cluster)
            check_capacity(need, cluster)
            quarantined = await asyncio.to_thread(read_quarantine, config.host_quarantine_s)
            views = view_slices(need, cluster, quarantined=quarantined)
            if demand is not None and await asyncio.to_thread(_has_come, demand, views):
                # By their slice's name the hosts are to be had together, and not otherwise.
                _release(demand)
                demand, began_s = None, time.monotonic()
                continue
            silent: frozenset[str] = frozenset()
            idle = [view.slice for view in views if view.state is SliceState.IDLE]
            for timeout_s in (_QUICK_ANSWER_S, config.host_timeout_s) if idle else ():
                hosts = [host for found in idle for host in found.hosts]
                silent = await silent_nodes(hosts, timeout_s=timeout_s)
                for found in idle:
                    if found.node_ids.isdisjoint(silent) and (claim := await _take(need, found)):
                        return claim
            views = view_slices(need, cluster, silent=silent, quarantined=quarantined)
            if demand is None and (not views or time.monotonic() - began_s > _DEMAND_AFTER_S):
                demand = await _made(Claim.on_new_hosts, need, cluster)
            tell(_describe(views, is_demanded=demand is not None))
            await asyncio.sleep(_POLL_S)
    finally:
        _release(demand)


async def _take(need: Need, found: TpuSlice) -> Claim | None:
    """Claim an idle slice; None if someone else was quicker."""
    claim = await _made(Claim.on_slice, need, found)
    is_taken = False
    try:
        deadline_s = time.monotonic() + _GRANT_PATIENCE_S
        while not is_taken and time.monotonic() < deadline_s:
            is_taken = await asyncio.to_thread(claim.is_granted)
            await asyncio.sleep(0 if is_taken else _GRANT_POLL_S)
    finally:
        if not is_taken:
            _release(claim)
    return claim if is_taken else None


def _has_come(demand: Claim, views: list[SliceView]) -> bool:
    """Whether a demand has done its part: hosts came for it that make a slice, or it is broken."""
    held = demand.node_ids()
    whole = [view for view in views if view.state in (SliceState.IDLE, SliceState.IN_USE)]
    return demand.is_broken() or any(not view.slice.node_ids.isdisjoint(held) for view in whole)


def _describe(views: list[SliceView], *, is_demanded: bool) -> str:
    told = [f"slice {view}" for view in views[:_MAX_TOLD]] or ["there is no such slice at present"]
    if len(views) > _MAX_TOLD:
        told.append(f"{len(views) - _MAX_TOLD} more slices are no better")
    if is_demanded:
        told.append("the autoscaler is asked for one")
    return "; ".join(told)


async def _made(make: Callable[..., Claim], *args: Any, **options: Any) -> Claim:
    """Make a claim in a thread; it is released if nobody waits for it any more."""
    making = asyncio.ensure_future(asyncio.to_thread(make, *args, **options))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda made: made.exception() or made.result().release())
        raise


def _release(claim: Claim | None) -> None:
    if claim is not None:
        claim.release()
