"""Host programs without a model, for tests of the gang alone: each step's token is its number."""

import os
import time
from pathlib import Path

import numpy as np

from cluster.host_worker import HostTask, Runner
from engine.errors import CheckpointError
from engine.step import (
    Bucket,
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepMasks,
    StepPlan,
    StepResult,
)

LIMITS = EngineLimits(
    num_pages=8,
    page_size=16,
    context_length=64,
    max_running_requests=4,
    buckets=(Bucket(num_seqs=4),),
    vocab_size=256,
)


class NullStep:
    def __init__(self, plan: StepPlan, device_s: float) -> None:
        self._plan = plan
        self._device_s = device_s

    def wait(self) -> StepResult:
        time.sleep(self._device_s)
        if FAULTY_POSITION in self._plan.decode_positions:
            raise RuntimeError("the device caught fire")
        return StepResult(
            step=self._plan.step,
            token_ids=np.full(self._plan.num_rows, self._plan.step, np.int32),
        )


FAULTY_POSITION = 13
HANGING_POSITION = 99


class NullRunner:
    """Writes the steps that it was given to `<model_path>/rank-<rank>`."""

    def __init__(self, task: HostTask, limits: EngineLimits = LIMITS) -> None:
        self._log = Path(task.config.model_path) / f"rank-{task.rank}"
        self._limits = limits

    def start(self, on_progress: ProgressCallback) -> EngineLimits:
        on_progress(StartProgress(phase="compile", done=3, total=3))
        self._log.write_text(f"pid {os.getpid()}\n")
        return self._limits

    def dispatch(self, plan: StepPlan) -> NullStep:
        with self._log.open("a") as log:
            log.write(f"step {plan.step}\n")
        is_hanging = HANGING_POSITION in plan.decode_positions
        self._last = NullStep(plan, device_s=3600.0 if is_hanging else 0.0)
        return self._last

    def sample_masked(self, masks: StepMasks) -> NullStep:
        with self._log.open("a") as log:
            log.write(f"masks {masks.step}\n")
        return self._last

    def profile(self, num_steps: int) -> None:
        with self._log.open("a") as log:
            log.write(f"profile {num_steps}\n")


def start(task: HostTask, on_progress: ProgressCallback) -> Runner:
    return NullRunner(task)


def start_and_tell_environment(task: HostTask, on_progress: ProgressCallback) -> Runner:
    """Write the names of this process's variables to `<model_path>/environment-<rank>`."""
    names = Path(task.config.model_path) / f"environment-{task.rank}"
    names.write_text("\n".join(sorted(os.environ)))
    return NullRunner(task)


def start_with_uneven_memory(task: HostTask, on_progress: ProgressCallback) -> Runner:
    return NullRunner(task, EngineLimits(**{**_fields(LIMITS), "num_pages": 8 + task.rank}))


def fail_on_rank_1(task: HostTask, on_progress: ProgressCallback) -> Runner:
    if task.rank == 1:
        raise ZeroDivisionError("rank 1 cannot count")
    time.sleep(3600)
    return NullRunner(task)


def start_forever(task: HostTask, on_progress: ProgressCallback) -> Runner:
    time.sleep(3600)
    return NullRunner(task)


def miss_weights_on_rank_1(task: HostTask, on_progress: ProgressCallback) -> Runner:
    if task.rank == 1:
        raise CheckpointError("model-00002.safetensors is missing")
    time.sleep(3600)
    return NullRunner(task)


def _fields(limits: EngineLimits) -> dict[str, object]:
    return {name: getattr(limits, name) for name in limits.__struct_fields__}
