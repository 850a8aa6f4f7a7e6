"""The processes of a gang, one actor per host: made in rank order, and ended for certain.

Knows Ray's actors and the machine's processes, and not what they run. No JAX here.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.claim import Claim
from cluster.host_worker import HostFacts, HostFailure, HostTask, HostWorker
from cluster.nodes import Node, read_cluster
from engine.errors import EngineError

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 30.0
_KILL_PATIENCE_S = 2.0
_POLL_S = 0.02


class ProcessStartError(EngineError):
    """Some hosts did not start a process, or did not answer.

    Attributes:
        node_ids: Of those hosts.
    """

    def __init__(self, message: str, node_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.node_ids = node_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """A host's process and where it runs; its rank is its place in the gang's list."""

    actor: ActorHandle
    facts: HostFacts

    async def run(self, task: HostTask) -> HostFailure:
        """Have it do its part until that fails.

        Raises:
            ray.exceptions.RayError: The process is gone.
        """
        return await _answer(self.actor.run.remote(task))


async def start_processes(
    claim: Claim, num_hosts: int, *, name: str | None = None
) -> list[HostProcess]:
    """Make the actors of a gang on the hosts that it has claimed.

    Args:
        claim: Granted.
        num_hosts: Bundles of the claim.
        name: What Ray's dashboard and `ray list actors` show, followed by `/rank1@host`; unique in
            the cluster, because a name is taken until its actor is gone. None for no names.

    Returns:
        By rank, not by bundle: TPUs have an order of their own.

    Raises:
        ProcessStartError: A process did not start or did not answer.
    """
    node_ids, cluster = await asyncio.to_thread(lambda: (claim.node_ids(), read_cluster()))
    if len(node_ids) != num_hosts:
        raise ProcessStartError("Hosts were lost between their claim and their start.", [])
    nodes = {node.node_id: node for node in cluster.nodes}
    own_node = ray.get_runtime_context().get_node_id()
    order = rank_order(
        [nodes[node_id].rank if node_id in nodes else None for node_id in node_ids],
        [node_id == own_node for node_id in node_ids],
    )
    node_ids = [node_ids[index] for index in order]
    bundle = claim.need.bundle
    worker: Any = ray.remote(HostWorker)
    actors: list[ActorHandle] = [
        worker.options(
            name=name and _actor_name(name, rank, nodes.get(node_ids[rank])),
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            resources={name: bundle[name] for name in bundle if name not in ("CPU", "GPU")},
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=claim.group, placement_group_bundle_index=index
            ),
        ).remote()
        for rank, index in enumerate(order)
    ]
    try:
        facts = await _facts_of(actors, node_ids)
    except BaseException:
        await _kill(actors)
        raise
    return [HostProcess(actor=actor, facts=fact) for actor, fact in zip(actors, facts, strict=True)]


async def end_processes(processes: Sequence[HostProcess]) -> None:
    """End the processes, and return when they are gone."""
    await _kill([process.actor for process in processes])
    await _end_local(process.facts for process in processes)


def cause_of_death(error: BaseException) -> str:
    """What Ray knows of a process's end that can be acted on, as a sentence; usually nothing."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return (
            "Ray ended it because its node ran low on memory: lower --max-total-tokens, or run "
            "less beside it."
        )
    return ""


def rank_order(node_ranks: Sequence[int | None], is_local: Sequence[bool]) -> list[int]:
    """Order bundles by the ranks that their nodes must take.

    Where nodes have none, those on the leader's own node come first: rank 0's results then travel
    no further than they must.

    Returns:
        Bundle indices; the one at position r becomes rank r.
    """
    ranks = [rank for rank in node_ranks if rank is not None]
    if len(set(ranks)) == len(node_ranks):
        return sorted(range(len(node_ranks)), key=lambda index: ranks[index])
    return sorted(range(len(node_ranks)), key=lambda index: not is_local[index])


def _actor_name(prefix: str, rank: int, node: Node | None) -> str:
    return f"{prefix}/rank{rank}@{node.hostname if node else 'unknown'}"


async def _facts_of(actors: Sequence[ActorHandle], node_ids: Sequence[str]) -> list[HostFacts]:
    questions = [asyncio.ensure_future(_answer(actor.facts.remote())) for actor in actors]
    done, silent = await asyncio.wait(questions, timeout=_START_TIMEOUT_S)
    for question in silent:
        question.cancel()
    died = [error for question in done if (error := question.exception())]
    if silent or died:
        failed = [question in silent or question.exception() is not None for question in questions]
        raise ProcessStartError(
            f"{len(silent) + len(died)} of {len(actors)} hosts did not start a process within "
            f"{_START_TIMEOUT_S:.0f} s. "
            + " ".join(cause_of_death(error) or str(error) for error in died),
            list(itertools.compress(node_ids, failed)),
        )
    return [question.result() for question in questions]


async def _kill(actors: Sequence[ActorHandle]) -> None:
    """End the actors and wait until Ray says so."""
    farewells = []
    for actor in actors:
        # Sent before the kill, so that it fails once the actor is gone.
        farewells.append(asyncio.ensure_future(_answer(actor.facts.remote())))
        ray.kill(actor, no_restart=True)
    if farewells:
        _, living = await asyncio.wait(farewells, timeout=_KILL_TIMEOUT_S)
        for farewell in farewells:
            farewell.cancel()
        await asyncio.gather(*farewells, return_exceptions=True)
        if living:
            logger.error("%d actors outlived %.0f s", len(living), _KILL_TIMEOUT_S)


async def _end_local(hosts: Iterable[HostFacts]) -> None:
    """Wait for the end of processes on the leader's own node, and hasten it.

    Ray counts an actor as dead before its process is, and is slow to end one that does not answer.
    """
    own_node = ray.get_runtime_context().get_node_id()
    pids = [host.pid for host in hosts if host.node_id == own_node]
    began_s = time.monotonic()
    while (waited_s := time.monotonic() - began_s) < _KILL_TIMEOUT_S:
        pids = [pid for pid in pids if psutil.pid_exists(pid)]
        if not pids:
            return
        if waited_s > _KILL_PATIENCE_S:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(_POLL_S)
    logger.error("processes %s outlived %.0f s", pids, _KILL_TIMEOUT_S)


async def _answer(reference: ray.ObjectRef) -> Any:
    return await reference
