"""The gang of hosts seen from its leader: start, broadcast plans, collect results, notice death.

`HostGroup` is the `Executor` that the engine's core drives. It makes one `Gang` per epoch
and keeps the claim on the hosts between them. No JAX here.
"""

import asyncio
import logging

from cluster.claim import Claim
from cluster.gang import Gang, HostStatus
from cluster.needs import resolve_device
from cluster.nodes import Cluster, read_cluster
from cluster.placement import can_keep, claim_hosts
from cluster.quarantine import record_failure
from engine.config import EngineConfig
from engine.errors import EngineDiedError, EngineError, EngineNotReadyError, QwenOnRayError
from engine.step import (
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepMasks,
    StepPlan,
    StepResult,
)

logger = logging.getLogger(__name__)

MODEL_PROGRAM = "cluster.host_worker:start_model_runner"


class HostGroup:
    """Runs plans on a gang of hosts, one actor each; made again, epoch by epoch, when one dies.

    All methods belong to one event loop. After a failure nothing is mended by itself: the owner
    awaits `failed`, then calls `stop` or `start` again.

    Args:
        config: `device` may be "auto".
        program: Dotted name of the `HostProgram` that every host runs.
        name: Unique in the cluster; what the names of its actors begin with. None for no names.
    """

    def __init__(
        self, config: EngineConfig, *, program: str = MODEL_PROGRAM, name: str | None = None
    ) -> None:
        self._config = config
        self._program = program
        self._name = name
        self._claim: Claim | None = None
        self._gang: Gang | None = None
        self._lock = asyncio.Lock()
        self.epoch = 0

    @property
    def hosts(self) -> tuple[HostStatus, ...]:
        """The living epoch's hosts by rank; empty before they are placed."""
        return tuple(self._gang.hosts) if self._gang else ()

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        """End what is left of the last epoch, and start the next with fresh processes.

        Raises:
            CapacityError, CheckpointError, ConfigError: Naming what to change.
            EngineError: A host failed; carries its own traceback.
        """
        async with self._lock:
            await self._end_gang()
            self.epoch += 1
            claim = await self._claim_hosts(on_progress)
            self._gang = Gang(self._config, claim, self.epoch, self._program, name=self._name)
            try:
                return await self._gang.start(on_progress)
            except BaseException:
                await self._end_gang()
                raise

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Start a step on every host; results come in order."""
        if self._gang is None:
            future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
            future.set_exception(EngineDiedError("the engine's hosts are not running"))
            return future
        return self._gang.execute(plan)

    def mask(self, masks: StepMasks) -> None:
        """Have every host sample the masked rows of the step that was started last."""
        if self._gang is not None:
            self._gang.mask(masks)

    def profile(self, num_steps: int) -> None:
        """Have every host trace its next steps; 0 ends a trace early.

        Raises:
            EngineNotReadyError: There are no hosts.
        """
        if self._gang is None:
            raise EngineNotReadyError("the engine's hosts are not running")
        self._gang.profile(num_steps)

    async def failed(self) -> QwenOnRayError:
        """Wait until the present epoch fails, and say why; for an owner that has no step under way.

        Raises:
            EngineError: There is no gang.
        """
        if self._gang is None:
            raise EngineError("the engine's hosts are not running")
        return await asyncio.shield(self._gang.failure)

    async def stop(self) -> None:
        """End every process and release the hosts; safe to call twice."""
        async with self._lock:
            await self._end_gang()
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    async def _end_gang(self) -> None:
        if self._gang is not None:
            gang, self._gang = self._gang, None
            # Of hosts without TPUs there may be one alone, which has to do whatever befalls it.
            if self._config.device == "tpu" and gang.failed_hosts:
                error = gang.failure.result() if gang.failure.done() else "no process started."
                last_line = str(error).strip().rpartition("\n")[2]
                await asyncio.to_thread(record_failure, gang.failed_hosts, last_line)
            await gang.stop()

    async def _claim_hosts(self, on_progress: ProgressCallback) -> Claim:
        cluster: Cluster = await asyncio.to_thread(read_cluster)
        self._config = resolve_device(self._config, cluster)
        if self._claim is not None and not await can_keep(self._claim, self._config):
            self._claim.release()
            self._claim = None
        num_hosts = self._config.nnodes
        if self._claim is None:
            on_progress(StartProgress(phase="placement", total=num_hosts))
            self._claim = await claim_hosts(
                self._config,
                on_wait=lambda note: on_progress(
                    StartProgress(phase="placement", total=num_hosts, note=note)
                ),
                timeout_s=self._config.start_timeout_s,
            )
        note = f"slice {self._claim.slice}" if self._claim.slice else ""
        on_progress(StartProgress(phase="placement", done=num_hosts, total=num_hosts, note=note))
        return self._claim
