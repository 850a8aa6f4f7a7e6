"""One epoch of a gang, from fresh processes to its first failure; never mended, never reused.

A process that has used JAX cannot join another group of hosts, so whatever goes wrong ends the
epoch; `cluster.host_group` makes the next. No JAX here.
"""

import asyncio
import collections
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
import ray.exceptions

from cluster.addresses import bracketed
from cluster.claim import Claim
from cluster.gang_socket import HostMessage, LeaderSocket, MessageKind
from cluster.host_processes import (
    HostProcess,
    ProcessStartError,
    cause_of_death,
    end_processes,
    start_processes,
)
from cluster.host_worker import BEAT_PERIOD_S, HostFacts, HostFailure, HostTask
from engine import errors
from engine.config import EngineConfig
from engine.errors import (
    CapacityError,
    EngineDiedError,
    EngineError,
    HostError,
    QwenOnRayError,
)
from engine.step import (
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepMasks,
    StepPlan,
    StepResult,
    decode_result,
    encode,
)

logger = logging.getLogger(__name__)

_MONITOR_PERIOD_S = 0.25
# Loading and tracing can hold Python's lock for seconds, and delay beats by as much.
_START_TIMEOUT_FACTOR = 6
# A rank that dies takes the others' collectives with it, and its connection: wait this long for
# the one that knows.
_BLAME_WINDOW_S = 1.0
_STEP_TIMEOUT_S = 600.0


@dataclass(slots=True)
class HostStatus:
    """What the leader knows of one host; kept current while the gang lives."""

    rank: int
    facts: HostFacts
    progress: StartProgress
    is_ready: bool = False
    heard_s: float = 0.0
    """time.monotonic() of its last message."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.place}"

    @property
    def place(self) -> str:
        return f"{self.facts.hostname} ({self.facts.address})"


class Gang:
    """One epoch: from fresh processes to the first failure, then over.

    `failure` resolves once, to the reason; from then on every pending and later step fails with it.

    Attributes:
        failed_hosts: What to call the hosts at fault, by node id; empty where the fault is no
            host's, such as a checkpoint that is missing.
    """

    def __init__(
        self,
        config: EngineConfig,
        claim: Claim,
        epoch: int,
        program: str,
        *,
        name: str | None = None,
    ) -> None:
        self._config = config
        self._claim = claim
        self._epoch = epoch
        self._program = program
        # The last epoch's actors may be slow to go, and keep their names as long.
        self._actor_name = name and f"{name}/epoch{epoch}"
        self._processes: list[HostProcess] = []
        self._socket: LeaderSocket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pending: collections.deque[tuple[int, float, asyncio.Future[StepResult]]] = (
            collections.deque()
        )
        self._greeted: set[int] = set()
        self._limits: dict[int, EngineLimits] = {}
        self._is_started = asyncio.Event()
        self._on_progress: ProgressCallback = lambda progress: None
        self._deaths: dict[int, ray.exceptions.RayError] = {}
        self._failures: dict[int, HostFailure] = {}
        self._lost: set[int] = set()
        self.hosts: list[HostStatus] = []
        self.failed_hosts: dict[str, str] = {}
        self.failure: asyncio.Future[QwenOnRayError] = asyncio.get_running_loop().create_future()

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        self._on_progress = on_progress
        try:
            self._processes = await start_processes(
                self._claim, self._config.nnodes, name=self._actor_name
            )
        except ProcessStartError as error:
            self.failed_hosts = {node_id: f"node {node_id}" for node_id in error.node_ids}
            raise
        self.hosts = [
            HostStatus(rank=rank, facts=process.facts, progress=StartProgress(phase="rendezvous"))
            for rank, process in enumerate(self._processes)
        ]
        # The leader is reached at its own node's address, never at all of a machine's.
        self._socket = LeaderSocket(
            ray.util.get_node_ip_address(), self._epoch, self._config.nnodes
        )
        self._spawn(self._receive())
        coordinator = self.hosts[0].facts
        addresses = [host.facts.address for host in self.hosts]
        for host, process in zip(self.hosts, self._processes, strict=True):
            host.heard_s = time.monotonic()
            task = HostTask(
                config=self._config,
                rank=host.rank,
                num_hosts=len(self.hosts),
                num_local_hosts=addresses.count(host.facts.address),
                address=host.facts.address,
                coordinator_address=f"{bracketed(coordinator.address)}:{coordinator.port}",
                invitation=self._socket.invitation,
                program=self._program,
            )
            self._spawn(self._watch_process(host.rank, process, task))
        self._spawn(self._watch_silence())
        await self._wait_for_start()
        return self._common_limits()

    async def _wait_for_start(self) -> None:
        started = asyncio.ensure_future(self._is_started.wait())
        timeout_s = self._config.dist_timeout_s + self._config.start_timeout_s
        try:
            await asyncio.wait(
                [started, self.failure], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            started.cancel()
        if self.failure.done():
            raise self.failure.result()
        if not self._is_started.is_set():
            late = "; ".join(
                f"{host.name} is at {_describe(host.progress)}"
                for host in self.hosts
                if not host.is_ready
            )
            raise EngineError(
                f"The engine did not start within {timeout_s:.0f} s: {late}. Raise "
                "--start-timeout-s if it was making progress."
            )

    def _common_limits(self) -> EngineLimits:
        """The limits of rank 0, which must be every rank's: they shape the compiled programs."""
        limits = self._limits[0]
        for host in self.hosts:
            if self._limits[host.rank] != limits:
                other = self._limits[host.rank]
                raise CapacityError(
                    f"The hosts found room for different KV caches: {self.hosts[0].name} has "
                    f"{limits.num_pages} pages, {host.name} {other.num_pages}. Set "
                    "--max-total-tokens to what the smaller one holds."
                )
        return limits

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if not self.failure.done() and self._socket is not None:
            self._broadcast(self._socket, MessageKind.PLAN, encode(plan))
        if self.failure.done():
            future.set_exception(self.failure.result())
        else:
            self._pending.append((plan.step, time.monotonic(), future))
        return future

    def mask(self, masks: StepMasks) -> None:
        if not self.failure.done() and self._socket is not None:
            self._broadcast(self._socket, MessageKind.MASKS, encode(masks))

    def profile(self, num_steps: int) -> None:
        if not self.failure.done() and self._socket is not None:
            self._broadcast(self._socket, MessageKind.PROFILE, msgspec.msgpack.encode(num_steps))

    async def stop(self) -> None:
        self._fail(EngineDiedError("the engine's hosts were stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await end_processes(self._processes)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _fail(self, error: QwenOnRayError, *ranks_at_fault: int) -> None:
        if self.failure.done():
            return
        self.failure.set_result(error)
        at_fault = [self.hosts[rank] for rank in ranks_at_fault]
        self.failed_hosts = {host.facts.node_id: host.place for host in at_fault}
        while self._pending:
            _, _, future = self._pending.popleft()
            if not future.done():
                future.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(self._guard(work)))

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        # The border of this gang: a fault in its own code ends it and nothing else.
        except Exception as error:
            logger.exception("the gang's own work failed")
            self._fail(EngineDiedError(f"the leader failed: {error!r}", cause="leader"))

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            message = await self._socket.receive()
            self.hosts[message.rank].heard_s = time.monotonic()
            self._take(message)

    def _take(self, message: HostMessage) -> None:
        host = self.hosts[message.rank]
        if message.kind is MessageKind.RESULT:
            if self.failure.done():
                return  # Its step has been told already that it failed.
            result = decode_result(message.payload)
            step, _, future = self._pending.popleft()
            if result.step != step:
                raise EngineError(f"result of step {result.step} came where {step} was due")
            if not future.done():
                future.set_result(result)
        elif message.kind is MessageKind.PROGRESS:
            progress = msgspec.msgpack.decode(message.payload, type=StartProgress)
            host.progress = msgspec.structs.replace(progress, rank=message.rank)
            self._on_progress(host.progress)
        elif message.kind is MessageKind.HELLO:
            self._greeted.add(message.rank)
        elif message.kind is MessageKind.READY:
            self._limits[message.rank] = msgspec.msgpack.decode(message.payload, type=EngineLimits)
            host.is_ready = True
        if len(self._limits) == len(self._greeted) == len(self.hosts):
            self._is_started.set()

    async def _watch_process(self, rank: int, process: HostProcess, task: HostTask) -> None:
        try:
            failure = await process.run(task)
            logger.error("%s failed:\n%s", self.hosts[rank].name, failure.traceback)
        except ray.exceptions.RayError as error:
            logger.error("%s died: %s", self.hosts[rank].name, error)
            self._deaths[rank] = error
        else:
            self._failures[rank] = failure
            if len(self._failures) + len(self._deaths) < len(self.hosts):
                await asyncio.sleep(_BLAME_WINDOW_S)
        self._fail(self._explain(), *self._ranks_at_fault())

    def _broadcast(self, socket: LeaderSocket, kind: MessageKind, payload: bytes = b"") -> None:
        for rank, reason in socket.broadcast(kind, payload).items():
            if rank not in self._lost:
                self._lost.add(rank)
                self._spawn(self._fail_unless_explained(rank, reason))

    async def _fail_unless_explained(self, rank: int, reason: str) -> None:
        """A process that dies loses its connection first; whoever watches it can say more."""
        await asyncio.sleep(_BLAME_WINDOW_S)
        self._fail(EngineDiedError(f"{self.hosts[rank].name} died or is cut off: {reason}."), rank)

    def _explain(self) -> QwenOnRayError:
        """Name the rank at fault: a dead one before those that only lost their connection to it."""
        if self._deaths:
            names = ", ".join(self.hosts[rank].name for rank in self._deaths)
            cause = cause_of_death(next(iter(self._deaths.values())))
            return EngineDiedError(f"A process of the engine died: {names}. {cause}".rstrip())
        rank, failure = next(iter(self._failures.items()))
        name = self.hosts[rank].name
        if self._is_started.is_set():
            # Clients read this one; the traceback is in the log.
            message = f"{name} failed: {failure.kind}: {failure.message}"
            return EngineDiedError(message, cause="failed")
        if failure.is_own:
            return getattr(errors, failure.kind, EngineError)(f"{name}: {failure.message}")
        return EngineDiedError(f"{name} failed:\n{failure.traceback}", cause="failed")

    def _ranks_at_fault(self) -> list[int]:
        """Ranks whose hosts are to be mistrusted, by the same order as in `_explain`.

        Not where all fail alike, nor for what a user has to mend: memory, flags, checkpoints.
        """
        if self._deaths:
            unexplained = [rank for rank in self._deaths if not cause_of_death(self._deaths[rank])]
            is_all = len(unexplained) == len(self.hosts) > 1
            return [] if is_all else unexplained
        rank, failure = next(iter(self._failures.items()))
        return [rank] if not failure.is_own or failure.kind == HostError.__name__ else []

    async def _watch_silence(self) -> None:
        """Beat to the hosts, and fail when one of them has not been heard of for too long."""
        assert self._socket is not None
        woke_s = time.monotonic()
        while True:
            await asyncio.sleep(_MONITOR_PERIOD_S)
            slept_s, woke_s = time.monotonic() - woke_s, time.monotonic()
            if slept_s > 2 * BEAT_PERIOD_S:
                continue  # This loop was held up itself: first read what has come meanwhile.
            if self._is_started.is_set():
                self._broadcast(self._socket, MessageKind.BEAT)
            timeout_s = self._config.host_timeout_s
            if not self._is_started.is_set():
                timeout_s *= _START_TIMEOUT_FACTOR
            for host in self.hosts:
                if woke_s - host.heard_s > timeout_s:
                    self._fail(
                        EngineDiedError(
                            f"{host.name} has been silent for {woke_s - host.heard_s:.1f} s "
                            f"(--host-timeout-s={self._config.host_timeout_s:g}).",
                            cause="silent",
                        ),
                        host.rank,
                    )
            if self._pending and woke_s - self._pending[0][1] > _STEP_TIMEOUT_S:
                message = f"A step took more than {_STEP_TIMEOUT_S:.0f} s."
                self._fail(EngineDiedError(message, cause="silent"))


def _describe(progress: StartProgress) -> str:
    count = f" {progress.done} of {progress.total}" if progress.total else ""
    return f"{progress.phase}{count}" + (f" ({progress.note})" if progress.note else "")
