"""Traces of JAX's profiler, a bounded number of steps at a time, beside the steps themselves."""

import logging
import threading
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

MAX_SECONDS = 60.0
"""A trace ends after so long even if the steps do not come: it is kept in memory until then."""


class StepProfiler:
    """Writes what the next steps do as a trace for TensorBoard, Perfetto or `ProfileData`.

    Starting and writing take seconds and happen in a thread of their own. `start`, `stop` and
    `count_step` belong to the thread that dispatches.

    Args:
        directory: Of this rank; traces are kept below it, in folders named by their time.
        max_seconds: After which a trace ends by itself.
    """

    def __init__(self, directory: Path, *, max_seconds: float = MAX_SECONDS) -> None:
        self._directory = directory
        self._max_seconds = max_seconds
        self._thread: threading.Thread | None = None
        self._is_tracing = threading.Event()
        self._has_ended = threading.Event()
        self._steps_left = 0

    def start(self, num_steps: int) -> None:
        """Trace the next `num_steps` steps, or some more.

        While a trace is under way, nothing new begins.
        """
        if self._thread is not None and self._thread.is_alive():
            logger.warning("a trace is under way already; it goes on")
            return
        self._steps_left = num_steps
        self._is_tracing.clear()
        self._has_ended.clear()
        self._thread = threading.Thread(target=self._trace, name="profiler", daemon=True)
        self._thread.start()

    def count_step(self) -> None:
        """Say that a step is about to be dispatched; the trace ends when they were enough."""
        if not self._is_tracing.is_set() or self._has_ended.is_set():
            return
        if self._steps_left == 0:
            self._has_ended.set()
        self._steps_left -= 1

    def stop(self) -> None:
        """End the trace early; it is written all the same."""
        self._has_ended.set()

    def wait_until_tracing(self, timeout_s: float) -> bool:
        """Wait until steps are counted; False if that was not so in time."""
        return self._is_tracing.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Wait until a trace that has ended is written; False if it was not in time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _trace(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Python's own calls would drown the steps, and slow them down by more than they take.
        options.python_tracer_level = 0
        try:
            with jax.profiler.trace(self._directory, profiler_options=options):
                self._is_tracing.set()
                self._has_ended.wait(self._max_seconds)
                self._is_tracing.clear()
            logger.info("a trace of JAX's profiler was written below %s", self._directory)
        # The border of this thread: a profile that cannot be written must not end the host.
        except Exception:
            self._is_tracing.clear()
            logger.exception("no trace was written below %s", self._directory)
