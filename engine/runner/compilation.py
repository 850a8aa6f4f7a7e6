"""Compiling every program before the first request, and counting what compiles after that."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import jax

logger = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Key = TypeVar("Key")


class CompileCounter:
    """Counts XLA compilations of this process from its making on, those of the cache included.

    Zero after an engine is ready: a program that compiles while requests wait is a fault.
    """

    def __init__(self) -> None:
        self.num_compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            self.num_compiles += 1
            logger.debug("compiled a program in %.2f s", duration_secs)


def compile_all(
    lower: Mapping[Key, Callable[[], Any]], on_compiled: Callable[[Key], None]
) -> dict[Key, Any]:
    """Lower and compile programs in parallel threads.

    XLA compiles outside of Python's lock, so that threads do run side by side.

    Args:
        lower: What names a program → the function that lowers it.
        on_compiled: Called in the caller's thread with the name of each program as it is ready.

    Returns:
        Name → compiled program.
    """

    def compile_one(name: Key) -> Any:
        started = time.monotonic()
        compiled = lower[name]().compile()
        logger.debug("compiled %s in %.1f s", name, time.monotonic() - started)
        return compiled

    compiled: dict[Key, Any] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1, "compile") as pool:
        names = {pool.submit(compile_one, name): name for name in lower}
        try:
            for future in as_completed(names):
                compiled[names[future]] = future.result()
                on_compiled(names[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return compiled
