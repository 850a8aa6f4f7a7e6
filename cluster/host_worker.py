"""One host of a gang: joins the others, loads its share of the model, runs the plans it is sent.

Decides nothing: the same plans in the same order on every host are the same programs with the same
collectives. Runs in a process of its own, an actor that lives for one epoch, because JAX can be
initialised once in a process. The leader imports this file too, so JAX must stay out of it:
whatever needs JAX stands behind the dotted name of a `HostProgram`.
"""

import logging
import os
import pkgutil
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import msgspec
import ray

from cluster.addresses import free_port
from cluster.gang_socket import GangInvitation, HostSocket, MessageKind
from cluster.jax_rendezvous import join_jax_distributed
from cluster.tpu_host import check_device, leave_other_slices, let_ray_profile
from engine.config import EngineConfig
from engine.errors import EngineError, QwenOnRayError
from engine.step import (
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepMasks,
    StepPlan,
    StepResult,
    decode_masks,
    decode_plan,
    encode,
)

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 0.5
# A leader that Ray lost sight of cannot be told apart from a slow one sooner.
LEADER_TIMEOUT_S = 60.0
_POLL_S = 0.1
_STALL_S = 1.0
"""A turn of the loop takes a poll; one that took so long was held up, as by a stopped process."""


class PendingStep(Protocol):
    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host. Raises what the device raised."""
        ...


class Runner(Protocol):
    """What a host runs plans with; `engine.runner`'s ModelRunner is one."""

    def start(self, on_progress: ProgressCallback) -> EngineLimits: ...

    def dispatch(self, plan: StepPlan) -> PendingStep:
        """Start a step, in plan order; returns before the device is done."""
        ...

    def sample_masked(self, masks: StepMasks) -> PendingStep:
        """Have the last step, whose plan has masked rows, sample them; returns that step."""
        ...

    def profile(self, num_steps: int) -> None:
        """Trace the next steps; 0 ends a trace early. Returns at once, never raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Where an actor found itself.

    Attributes:
        port: Free at the time of asking, for JAX's coordinator should this host become rank 0.
    """

    node_id: str
    address: str
    hostname: str
    pid: int
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTask:
    """A host's part in one epoch of a gang.

    Attributes:
        coordinator_address: host:port of JAX's coordinator, on rank 0.
        num_local_hosts: Ranks of this gang on this machine, itself included.
        program: Dotted name, `module:function`, of a `HostProgram`.
    """

    config: EngineConfig
    rank: int
    num_hosts: int
    address: str
    coordinator_address: str
    num_local_hosts: int
    invitation: GangInvitation
    program: str


HostProgram = Callable[[HostTask, ProgressCallback], Runner]
"""Joins the gang's other hosts and makes this host's runner; `start` is called on the result."""


class HostFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a host gave up.

    Plain strings and not the exception, because reading a pickled one might import JAX into the
    leader.

    Attributes:
        kind: Class name of the exception.
        is_own: Whether the class is one of `engine.errors`, whose message says what to do.
    """

    kind: str
    message: str
    traceback: str
    is_own: bool


class HostWorker:
    """Runs one host's part of a gang; made a Ray actor by the leader."""

    def facts(self) -> HostFacts:
        address = ray.util.get_node_ip_address()
        return HostFacts(
            node_id=ray.get_runtime_context().get_node_id(),
            address=address,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            port=free_port(address),
        )

    def run(self, task: HostTask) -> HostFailure:
        """Start, then run plans for as long as the gang lives. Returns only if it fails."""
        logging.basicConfig(
            level=task.config.log_level.upper(),
            format=f"%(asctime)s %(levelname)s rank {task.rank} %(name)s: %(message)s",
        )
        link = HostSocket(task.invitation, task.rank)
        has_ended = threading.Event()
        beats = threading.Thread(
            target=_send_beats, args=(link, has_ended), name="beats", daemon=True
        )
        beats.start()
        try:
            runner = _start(task, link)
            _run_plans(runner, link, is_reporting=task.rank == 0)
        # The border of this process: whatever went wrong is the leader's to tell.
        except BaseException as error:
            logger.exception("rank %d failed", task.rank)
            return HostFailure(
                kind=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
                is_own=isinstance(error, QwenOnRayError),
            )
        finally:
            has_ended.set()
            beats.join()
            link.close()


def start_model_runner(task: HostTask, on_progress: ProgressCallback) -> Runner:
    """Join jax.distributed and make a ModelRunner: the `HostProgram` of every real gang."""
    # Here and not at the top, because the leader imports this file and must not import JAX.
    from engine.runner.model_runner import ModelRunner
    from engine.runner.platform import configure_jax

    on_progress(StartProgress(phase="rendezvous", total=task.num_hosts))
    if task.config.device == "tpu":
        check_device(
            task.config.chips_per_host,
            on_wait=lambda note: on_progress(StartProgress(phase="rendezvous", note=note)),
        )
    configure_jax(task.config)
    join_jax_distributed(
        task.config,
        rank=task.rank,
        num_hosts=task.num_hosts,
        num_local_hosts=task.num_local_hosts,
        address=task.address,
        coordinator_address=task.coordinator_address,
    )
    if task.config.device == "tpu":
        let_ray_profile(task.config.profile_dir)
    on_progress(StartProgress(phase="rendezvous", done=task.num_hosts, total=task.num_hosts))
    return ModelRunner(task.config, rank=task.rank)


def _start(task: HostTask, link: HostSocket) -> Runner:
    def on_progress(progress: StartProgress) -> None:
        link.send(MessageKind.PROGRESS, msgspec.msgpack.encode(progress))

    started_s = time.monotonic()
    if task.config.device == "tpu":
        leave_other_slices(os.environ)
    program: HostProgram = pkgutil.resolve_name(task.program)
    runner = program(task, on_progress)
    limits = runner.start(on_progress)
    logger.info("rank %d is ready after %.1f s", task.rank, time.monotonic() - started_s)
    link.send(MessageKind.READY, msgspec.msgpack.encode(limits))
    return runner


def _run_plans(runner: Runner, link: HostSocket, *, is_reporting: bool) -> NoReturn:
    """Dispatch plans in this thread while another waits for their results. Returns never.

    Raises:
        EngineError: A plan did not reach this host, which must not take steps without it.
    """
    steps: queue.SimpleQueue[PendingStep] = queue.SimpleQueue()
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    results = threading.Thread(
        target=_send_results,
        args=(steps, failures, link if is_reporting else None),
        name="results",
        daemon=True,
    )
    results.start()
    next_step = 0
    heard_s = turned_s = time.monotonic()
    while failures.empty():
        message = link.receive(timeout_s=_POLL_S)
        turn_s, turned_s = time.monotonic() - turned_s, time.monotonic()
        if message is None:
            if turn_s > _STALL_S:
                heard_s = turned_s  # What came while this process stood still is yet to be read.
            if turned_s - heard_s > LEADER_TIMEOUT_S:
                # Nobody is left to report to, and the device must become free for the next gang.
                logger.error("no word from the leader for %.0f s: this host ends", LEADER_TIMEOUT_S)
                os._exit(1)
            continue
        heard_s = turned_s
        kind, payload = message
        if kind is MessageKind.PLAN:
            plan = decode_plan(payload)
            if plan.step != next_step:
                # Its collectives would meet those of another step on the other hosts.
                raise EngineError(
                    f"the plan of step {plan.step} came where step {next_step} was due: a plan "
                    "was lost with a connection to the leader that broke"
                )
            next_step += 1
            pending = runner.dispatch(plan)
            if not len(plan.masked_rows):
                steps.put(pending)
        elif kind is MessageKind.MASKS:
            steps.put(runner.sample_masked(decode_masks(payload)))
        elif kind is MessageKind.PROFILE:
            runner.profile(msgspec.msgpack.decode(payload, type=int))
    raise failures.get()


def _send_results(
    steps: queue.SimpleQueue[PendingStep],
    failures: queue.SimpleQueue[BaseException],
    link: HostSocket | None,
) -> None:
    try:
        while True:
            result = steps.get().wait()
            if link is not None:
                link.send(MessageKind.RESULT, encode(result))
    # The border of this thread: the one that dispatches raises it.
    except BaseException as error:
        failures.put(error)


def _send_beats(link: HostSocket, has_ended: threading.Event) -> None:
    while not has_ended.wait(BEAT_PERIOD_S):
        link.send(MessageKind.BEAT)
