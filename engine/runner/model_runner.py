"""One host's part of the model: weights, KV pages and compiled programs; one plan = one call.

Decides nothing: every rank runs the plans it is given, in their order, so that ranks stay in step.
Knows neither requests nor queues.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError
from engine.hub import resolve_checkpoint
from engine.kernels.attention import Cache, zeroed_cache
from engine.models.checkpoint import dummy_weights, load_weights
from engine.models.config import ModelConfig, load_model_config
from engine.models.layer_stack import lay_out_for_cpu
from engine.runner.batch import MASKED_AT_ONCE
from engine.runner.compilation import CompileCounter, compile_all
from engine.runner.fingerprint import model_fingerprint
from engine.runner.kv_cache import gang_capacity
from engine.runner.platform import compilation_cache_dir, configure_jax, keep_freed_memory
from engine.runner.program_store import ProgramStore
from engine.runner.programs import (
    ADMISSION,
    MASKED_SAMPLING,
    EnginePrograms,
    describe_program,
)
from engine.runner.sampler import Logprobs
from engine.runner.slot_state import SlotState, make_admissions, needs_admission
from engine.runner.step_profiler import StepProfiler
from engine.runner.step_program import StepOutputs
from engine.scheduling.buckets import steps_of
from engine.sharding import make_mesh
from engine.step import (
    NO_FLOATS,
    NO_INTS,
    Bucket,
    EngineLimits,
    ProgressCallback,
    StartProgress,
    StepLogprobs,
    StepMasks,
    StepPlan,
    StepResult,
)

logger = logging.getLogger(__name__)


class _Sampled(NamedTuple):
    """What one program sampled: of which rows of the plan, and at which places of its outputs."""

    rows: np.ndarray
    places: np.ndarray
    token_ids: jax.Array
    logprobs: Logprobs


class PendingStep:
    """A step that the device may still be computing.

    Where its plan has masked rows, `wait` comes after `ModelRunner.sample_masked`.
    """

    def __init__(
        self, plan: StepPlan, outputs: StepOutputs, started_s: float, num_compiles: int
    ) -> None:
        self.plan = plan
        self._num_compiles = num_compiles
        self._prompt_logprobs = outputs.prompt_logprobs
        self._hidden = outputs.hidden
        self._started_s = started_s
        self._sampled: list[_Sampled] = []
        num_seqs = plan.bucket.num_seqs
        places = np.concatenate(
            [np.arange(len(plan.decode_slots)), num_seqs + np.arange(len(plan.chunks))]
        )
        self.add(np.arange(plan.num_rows), places, outputs.token_ids, outputs.logprobs)

    def add(
        self, rows: np.ndarray, places: np.ndarray, token_ids: jax.Array, logprobs: Logprobs
    ) -> None:
        """Take in what a program sampled, in place of what was there for its rows.

        Args:
            rows: Rows of the plan.
            places: Where the arrays have them.
            token_ids: int32.
            logprobs: Theirs.
        """
        token_ids.copy_to_host_async()
        self._sampled.append(_Sampled(rows, places, token_ids, logprobs))

    def wait(self) -> StepResult:
        """Block until the tokens are on the host."""
        token_ids = self._read(lambda sampled: sampled.token_ids)
        device_ms = (time.monotonic() - self._started_s) * 1e3
        logprobs = prompt_logprobs = None
        if self.plan.has_logprobs:
            logprobs = _step_logprobs(
                lambda name: self._read(lambda sampled: getattr(sampled.logprobs, name))
            )
        if self.plan.has_prompt_logprobs:
            num_tokens = sum(len(chunk.token_ids) for chunk in self.plan.chunks)
            prompt_logprobs = _step_logprobs(
                lambda name: _to_host(getattr(self._prompt_logprobs, name))[:num_tokens].reshape(-1)
            )
        embeddings = NO_FLOATS
        if len(self.plan.embedded_rows):
            chunks = self.plan.embedded_rows - len(self.plan.decode_slots)
            embeddings = _to_host(self._hidden)[chunks].reshape(-1)
        return StepResult(
            step=self.plan.step,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            embeddings=embeddings,
            device_ms=device_ms,
            num_compiles=self._num_compiles,
        )

    def _read(self, array_of: Callable[[_Sampled], jax.Array]) -> np.ndarray:
        """One array of all rows: what was sampled last of each."""
        first, *others = self._sampled
        values = _to_host(array_of(first))[first.places]
        for sampled in others:
            values[sampled.rows] = _to_host(array_of(sampled))[sampled.places]
        return values.reshape(-1)


def _step_logprobs(read: Callable[[str], np.ndarray]) -> StepLogprobs:
    """Those that `read` gives by their names."""
    return StepLogprobs(**{name: read(name) for name in StepLogprobs.__struct_fields__})


class ModelRunner:
    """Runs step plans on this process's devices.

    `start` once, then `dispatch` from the same thread, in the order of the plans;
    `PendingStep.wait` may be called from another thread. Invariant between calls: `_cache` and
    `_state` are the outputs of the last dispatched program, whether or not it has run yet.

    Args:
        config: The engine's.
        rank: This process's among the hosts; names its folder of traces.
        devices: JAX devices to use; by default all. jax.distributed must have been initialised
            before `start` if there are several hosts.
    """

    def __init__(
        self, config: EngineConfig, *, rank: int = 0, devices: list[Any] | None = None
    ) -> None:
        self._config = config
        self._profiler = StepProfiler(Path(config.profile_dir or ".").expanduser() / f"rank-{rank}")
        self._devices = devices
        self._programs: dict[Bucket | str, Any] = {}
        self._params: Any = None
        self._cache: Cache = None
        self._state: SlotState | None = None
        self._unsampled: PendingStep | None = None
        self._compiles: CompileCounter | None = None
        self._store: ProgramStore | None = None

    @property
    def store(self) -> ProgramStore:
        """Where this runner's programs are kept; there is one once it has started."""
        assert self._store is not None
        return self._store

    @property
    def num_compiles_since_ready(self) -> int:
        """Programs compiled while serving; anything but 0 is a fault."""
        return 0 if self._compiles is None else self._compiles.num_compiles

    def start(self, on_progress: ProgressCallback) -> EngineLimits:
        """Load the weights, size the KV pool, compile every program.

        Raises:
            CheckpointError: The model is missing or unsupported.
            CapacityError: Too few devices, or too little memory on them.
            ConfigError: The devices are not what --device asks for, or --context-length exceeds
                the model's.
        """
        config = self._config
        configure_jax(config)
        directory = resolve_checkpoint(
            config.model_path,
            revision=config.revision,
            download_dir=config.download_dir,
            on_progress=_progress_of(on_progress, "weights", "downloading"),
            has_weights=config.load_format != "dummy",
        )
        model_config = load_model_config(directory)
        mesh = make_mesh(config.tp_size, self._devices)
        platform = _check_platform(config, mesh)
        programs = EnginePrograms(
            config,
            model_config,
            mesh,
            chip=pltpu.get_tpu_info() if platform == "tpu" else None,
        )
        dtype = programs.dtype
        self._vocab_size = model_config.vocab_size
        self._params = self._load_weights(directory, model_config, mesh, dtype, on_progress)
        if platform == "cpu":
            self._params = lay_out_for_cpu(model_config, self._params)

        self._store = programs.open_store(compilation_cache_dir(config), config.compiled_programs)
        pages = self._compile(programs, on_progress)
        self._cache = zeroed_cache(programs.cache_shapes(pages))
        self._state = jax.jit(programs.init_state, out_shardings=programs.replicated)()
        self._batch = programs.batch_builder()
        if platform == "cpu":
            keep_freed_memory()
        self._warm_up(programs.buckets, on_progress)
        self._compiles = CompileCounter()
        logger.info(
            "ready: %d pages of %d tokens, %d programs, context %d, tp %d on %s",
            pages,
            config.page_size,
            len(self._programs),
            programs.context_length,
            config.tp_size,
            platform,
        )
        return EngineLimits(
            num_pages=pages,
            page_size=config.page_size,
            context_length=programs.context_length,
            max_running_requests=config.max_running_requests,
            buckets=programs.buckets,
            vocab_size=model_config.vocab_size,
            model_fingerprint=model_fingerprint(
                directory,
                dtype=dtype if config.quantization == "none" else config.quantization,
                tp_size=config.tp_size,
                load_format=config.load_format,
            ),
            chunk_cost=steps_of(platform).chunk_cost,
        )

    def dispatch(self, plan: StepPlan) -> PendingStep:
        """Start a step and return before the device is done with it.

        Where the plan has masked rows, `sample_masked` comes before the next step.

        Raises:
            EngineError: It did not come for the step before.
        """
        if self._unsampled is not None:
            raise EngineError(
                f"step {plan.step} came before the masks of step {self._unsampled.plan.step}"
            )
        started_s = time.monotonic()
        self._profiler.count_step()
        with jax.profiler.StepTraceAnnotation("step", step_num=plan.step):
            for params in plan.admissions:
                if needs_admission(params):
                    for admission in make_admissions(params, self._vocab_size):
                        self._state = self._programs[ADMISSION](self._state, admission)
            inputs = self._batch.build(plan)
            outputs, self._cache, self._state = self._programs[plan.bucket](
                self._params, self._cache, self._state, inputs
            )
        pending = PendingStep(plan, outputs, started_s, self.num_compiles_since_ready)
        if len(plan.masked_rows):
            self._unsampled = pending
        return pending

    def sample_masked(self, masks: StepMasks) -> PendingStep:
        """Start to sample the masked rows of the step that was dispatched last, and return it.

        Raises:
            EngineError: That step has none, or the masks are another step's.
        """
        pending, self._unsampled = self._unsampled, None
        if pending is None or pending.plan.step != masks.step:
            raise EngineError(f"masks of step {masks.step} came where none were due")
        rows = pending.plan.masked_rows
        for index, inputs in enumerate(self._batch.build_masked(pending.plan, masks.words)):
            token_ids, logprobs, self._state = self._programs[MASKED_SAMPLING](self._state, inputs)
            some = rows[index * MASKED_AT_ONCE : (index + 1) * MASKED_AT_ONCE]
            pending.add(some, np.arange(len(some)), token_ids, logprobs)
        return pending

    def profile(self, num_steps: int) -> None:
        """Write a trace of the next steps below `profile_dir`; 0 ends one that is under way."""
        if num_steps == 0:
            self._profiler.stop()
        elif self._config.profile_dir is None:
            logger.warning("no trace: --profile-dir is not set")
        else:
            self._profiler.start(num_steps)

    def close(self) -> None:
        """Free weights, pages and programs; safe to call twice, and after a `start` that failed."""
        self._params = self._cache = self._state = None
        self._programs.clear()
        compiles, self._compiles = self._compiles, None
        if compiles is not None:
            compiles.close()

    def _load_weights(
        self,
        directory: Path,
        model_config: ModelConfig,
        mesh: Mesh,
        dtype: str,
        on_progress: ProgressCallback,
    ) -> Any:
        if self._config.load_format == "dummy":
            return dummy_weights(
                model_config,
                mesh,
                dtype,
                self._config.random_seed,
                quantization=self._config.quantization,
            )
        progress = _progress_of(on_progress, "weights", "reading")
        return load_weights(
            directory,
            model_config,
            mesh,
            dtype,
            quantization=self._config.quantization,
            on_progress=progress,
        )

    def _compile(self, programs: EnginePrograms, on_progress: ProgressCallback) -> int:
        """Compile all programs, and return the size of the pool that they were compiled for.

        The largest program comes first and tells what temporaries take. Only if the pool has to
        shrink for them is it compiled again.
        """
        devices = programs.replicated.addressable_devices
        capacity = gang_capacity(
            min(devices, key=lambda device: device.id), self._config.devices_per_host
        )
        largest, *others = programs.names
        total = len(programs.names)

        def compile_some(names: list[Bucket | str], pages: int) -> None:
            wanted = {name: programs.program(name, self._params, pages) for name in names}
            done = len(self._programs)

            def on_compiled(name: Bucket | str) -> None:
                nonlocal done
                done += 1
                note = describe_program(name)
                on_progress(StartProgress(phase="compile", done=done, total=total, note=note))

            self._programs.update(compile_all(wanted, self.store, on_compiled))

        on_progress(StartProgress(phase="compile", total=total, note=describe_program(largest)))
        pages = programs.num_pages(programs.memory(self._params, capacity))
        compile_some([largest], pages)
        memory = programs.memory(self._params, capacity, self._programs[largest])
        fitting = programs.num_pages(memory)
        if fitting < pages:
            self._programs.clear()
            others.append(largest)
        compile_some(others, fitting)
        return fitting

    def _warm_up(self, buckets: tuple[Bucket, ...], on_progress: ProgressCallback) -> None:
        """Run the smallest programs once on padding: first calls allocate, and find faults."""
        smallest = {bucket.num_chunks > 0: bucket for bucket in reversed(buckets)}
        on_progress(StartProgress(phase="warmup", total=len(smallest)))
        for done, bucket in enumerate(smallest.values(), start=1):
            plan = StepPlan(
                step=0,
                bucket=bucket,
                decode_slots=NO_INTS,
                decode_positions=NO_INTS,
                has_logprobs=True,
                has_prompt_logprobs=True,
            )
            self.dispatch(plan).wait()
            for inputs in self._batch.build_masked(plan, ()):
                *_, self._state = self._programs[MASKED_SAMPLING](self._state, inputs)
            on_progress(StartProgress(phase="warmup", done=done, total=len(smallest)))


def _to_host(array: jax.Array) -> np.ndarray:
    # Every device holds the whole array; another process's copy could not be read.
    return np.asarray(array.addressable_data(0))


def _check_platform(config: EngineConfig, mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    if config.device not in ("auto", platform):
        raise ConfigError(
            f"--device={config.device} was asked for, but JAX runs on {platform}. Install the "
            f"{config.device} extra, or use --device={platform}."
        )
    return platform


def _progress_of(on_progress: ProgressCallback, phase: str, note: str) -> Any:
    def report(done: int, total: int) -> None:
        on_progress(StartProgress(phase=phase, done=done, total=total, note=note))

    return report
