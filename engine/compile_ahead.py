"""Compiling all programs of an engine for a TPU slice, on any machine: in processes side by side.

The largest program says how many pages the pool has. If these are fewer than were thought, what is
to be kept is compiled once more; what is only looked at would look the same.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from engine.compile_worker import EngineFacts, Job, ProgramFacts, Request
from engine.config import EngineConfig
from engine.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    QwenOnRayError,
)
from engine.runner.model_runner import ModelRunner
from engine.runner.program_store import describe_store
from engine.step import Bucket, StartProgress
from engine.topology import compile_environment
from engine.tpu_slice import Slice

WORKER_BYTES = 3 * 2**30
"""Memory that a process which compiles takes."""

_LAST_LINES = 4000
_KINDS = {kind.__name__: kind for kind in (CapacityError, CheckpointError, ConfigError)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledEngine:
    """All programs of an engine.

    Attributes:
        tpu: The slice that they are for.
        engine: What is known of the engine.
        num_pages: Of the pool, page 0 included.
        programs: In the order of `EngineFacts.programs`.
    """

    tpu: Slice
    engine: EngineFacts
    num_pages: int
    programs: tuple[ProgramFacts, ...]


Progress = Callable[[int, int, str], None]
"""(programs compiled, of how many, what is under way)."""


def compile_ahead(
    config: EngineConfig,
    tpu: Slice,
    *,
    store: Path | None = None,
    on_progress: Progress = lambda done, total, note: None,
) -> CompiledEngine:
    """Compile every program that serving would run.

    Args:
        config: The engine's; `tp_size` devices of the slice are used.
        tpu: What to compile for.
        store: Folder to keep the programs in, for `--compiled-programs`.
        on_progress: Called from several threads, one at a time.

    Raises:
        QwenOnRayError: As `ModelRunner.start` would raise on such a slice.
        EngineError: A process that compiles ended.
    """
    job = Job(config=config, tpu=str(tpu), store=None if store is None else str(store))
    most_workers = _most_workers()
    with (
        _Workers(job) as workers,
        ThreadPoolExecutor(most_workers) as pool,
        workers.killed_on_error(),
    ):
        started = [pool.submit(workers.start)]
        engine = started[0].result().engine
        total = len(engine.programs)
        found: dict[int, ProgramFacts] = {}
        lock = threading.Lock()

        def compile_all(num_pages: int) -> None:
            waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
            for program in range(total):
                waiting.put(program)

            def compile_waiting(starting: Future[_Worker]) -> None:
                worker = starting.result()
                with contextlib.suppress(queue.Empty):
                    while True:
                        program = waiting.get_nowait()
                        facts = worker.compile(Request(program=program, num_pages=num_pages))
                        with lock:
                            found[program] = facts
                            on_progress(len(found), total, facts.shape.name)

            for future in as_completed([pool.submit(compile_waiting, each) for each in started]):
                future.result()

        on_progress(0, total, engine.programs[0].name)
        # They begin while the first one compiles.
        started += [pool.submit(workers.start) for _ in range(min(most_workers, total) - 1)]
        compile_all(engine.num_pages)
        num_pages = found[0].fitting_pages
        if num_pages < engine.num_pages and store is not None:
            # Their shapes are not those that serving will ask for.
            found.clear()
            compile_all(num_pages)
    if store is not None:
        describe_store(store, engine.parts)
    return CompiledEngine(
        tpu=tpu,
        engine=engine,
        num_pages=num_pages,
        programs=tuple(found[program] for program in range(total)),
    )


def compile_some(
    config: EngineConfig, tpu: Slice, wanted: Sequence[Bucket]
) -> tuple[EngineFacts, list[ProgramFacts]]:
    """Compile some of an engine's steps, one after another, and keep none.

    Args:
        config: The engine's.
        tpu: What to compile for.
        wanted: The steps, by decode rows and prefill tokens.

    Raises:
        QwenOnRayError: As for `compile_ahead`.
        ValueError: The engine has no such step.
    """
    with _Workers(Job(config=config, tpu=str(tpu), store=None)) as workers:
        worker = workers.start()
        engine = worker.engine
        shapes = [(shape.num_seqs, shape.num_chunk_tokens) for shape in engine.programs]
        return engine, [
            worker.compile(
                Request(
                    program=shapes.index((bucket.num_seqs, bucket.num_chunk_tokens)),
                    num_pages=engine.num_pages,
                )
            )
            for bucket in wanted
        ]


def compile_here(config: EngineConfig, store: Path, on_progress: Progress) -> int:
    """Compile every program for this machine's own devices, by starting an engine and ending it.

    Args:
        config: The engine's, on one host.
        store: Folder to keep the programs in.
        on_progress: As for `compile_ahead`.

    Returns:
        How many programs there are.

    Raises:
        QwenOnRayError: As `ModelRunner.start` does.
    """
    if config.nnodes > 1:
        raise ConfigError(
            f"Programs for --device={config.device} are compiled by the hosts that run them, and "
            f"differ from one to the next: --nnodes={config.nnodes} cannot be compiled ahead."
        )
    cache = tempfile.TemporaryDirectory()
    # Weights are arguments of the programs; any will do.
    own = config.model_copy(
        update={"load_format": "dummy", "jax_compilation_cache_dir": cache.name}
    )
    num_programs = 0

    def report(progress: StartProgress) -> None:
        nonlocal num_programs
        if progress.phase == "compile":
            num_programs = progress.total
            on_progress(progress.done, progress.total, progress.note)

    runner = ModelRunner(own)
    try:
        runner.start(report)
        # What JAX keeps beside them, of weights that nobody wants, stays behind.
        runner.store.copy_to(store)
    finally:
        runner.close()
        cache.cleanup()
    return num_programs


def _most_workers() -> int:
    by_memory = psutil.virtual_memory().available // WORKER_BYTES
    return max(1, min(os.cpu_count() or 1, by_memory))


class _Workers:
    """The processes of a job; they end with the block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._started: list[_Worker] = []
        self._is_killed = False
        self._lock = threading.Lock()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._started:
            worker.stop()

    def start(self) -> "_Worker":
        with self._lock:
            if self._is_killed:
                raise EngineError("Compiling was given up.")
            worker = _Worker(self._job.config.start_timeout_s)
            self._started.append(worker)
        worker.take(self._job)
        return worker

    @contextlib.contextmanager
    def killed_on_error(self) -> Iterator[None]:
        """Threads that wait for an answer then get none, and end."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._is_killed = True
                for worker in self._started:
                    worker.kill()
            raise


class _Worker:
    """A process that compiles. Invariant: one question at a time, each followed by its answer.

    Args:
        timeout_s: Within which each question is to be answered.
    """

    engine: EngineFacts

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.compile_worker"],
            env=compile_environment() | {"PYTHONPATH": _import_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def take(self, job: Job) -> None:
        """Tell it what it is for, and hear what is known of that."""
        self.engine = EngineFacts(**self._ask(job))

    def compile(self, request: Request) -> ProgramFacts:
        return ProgramFacts(**self._ask(request))

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, question: BaseModel) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(question.model_dump_json() + "\n")
            self._process.stdin.flush()
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        # A process that is killed answers nothing.
        deadline = threading.Timer(self._timeout_s, give_up)
        deadline.start()
        try:
            answer = self._process.stdout.readline()
        finally:
            deadline.cancel()
        if is_late.is_set():
            raise EngineError(
                f"The compiler had no answer within --start-timeout-s={self._timeout_s:g}. Raise "
                "it, or look for what else keeps this machine busy."
            )
        if not answer:
            self._log.seek(0)
            raise EngineError(
                f"A process that compiles ended with status {self._process.wait()}: "
                f"{self._log.read()[-_LAST_LINES:].strip()}"
            )
        found = json.loads(answer)
        if "error" in found:
            raise _KINDS.get(found["kind"], QwenOnRayError)(found["error"])
        return found


def _import_path() -> str:
    # Where this very package lies, wherever the process was started.
    package = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
