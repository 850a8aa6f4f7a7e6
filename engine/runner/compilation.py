"""Compiling every program before the first request, and counting what compiles after that."""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

from engine.errors import CapacityError
from engine.runner.program_store import ProgramStore

logger = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"

_OUT_OF_MEMORY = re.compile(r"(?i)ran out of memory\b[^\n]*")
_SIZES = re.compile(r"(\d[\d.]*[KMG])\b")

Key = TypeVar("Key")


class CompileCounter:
    """Counts XLA compilations of the thread that makes it, those of JAX's cache included.

    Zero after an engine is ready: a program that compiles while requests wait is a fault. Other
    threads are left out, because another engine may start in them. Counts until `close`.
    """

    def __init__(self) -> None:
        self.num_compiles = 0
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and threading.get_ident() == self._thread:
            self.num_compiles += 1
            logger.debug("compiled a program in %.2f s", duration_secs)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


@dataclass(frozen=True, slots=True)
class Program:
    """A function to be compiled for arguments of certain shapes.

    Attributes:
        name: Tells it from other functions of the same arguments.
        jitted: What `jax.jit` returned.
        arguments: Pytrees of `jax.ShapeDtypeStruct`s with shardings, one per parameter.
    """

    name: str
    jitted: Any
    arguments: tuple[Any, ...]

    def compile(self) -> jax.stages.Compiled:
        """Trace and compile, now.

        Raises:
            CapacityError: It needs more memory than the device has.
        """
        try:
            return self.jitted.lower(*self.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if (found := _OUT_OF_MEMORY.search(str(error))) is None:
                raise
            raise CapacityError(_explain_memory(self.name, found[0], str(error))) from error


def compile_all(
    programs: Mapping[Key, Program], store: ProgramStore, on_compiled: Callable[[Key], None]
) -> dict[Key, jax.stages.Compiled]:
    """Take programs from the store, or compile and store them, in parallel threads.

    XLA compiles outside of Python's lock, so that threads do run side by side.

    Args:
        programs: By what the caller calls them.
        store: Where compiled ones are kept from one start to the next.
        on_compiled: Called in the caller's thread with the name of each program as it is ready.
    """

    def compile_one(program: Program) -> tuple[jax.stages.Compiled, bool]:
        started = time.monotonic()
        key = store.key(program.name, program.arguments)
        stored = store.load(key)
        if stored is not None:
            return stored, True
        with _jax_cache_hits() as hits:
            compiled = program.compile()
        if not hits:
            store.save(key, compiled)
        logger.debug("compiled %s in %.1f s", program.name, time.monotonic() - started)
        return compiled, False

    started = time.monotonic()
    ready: dict[Key, jax.stages.Compiled] = {}
    num_stored = 0
    # What a CPU's XLA reads from JAX's cache it cannot write again: a program made of that loads,
    # and lacks functions when it runs. So JAX's cache is left alone where the store could not be
    # filled from it.
    jax_cache = _without_jax_cache() if store.platform == "cpu" else contextlib.nullcontext()
    with jax_cache, ThreadPoolExecutor(os.cpu_count() or 1, "compile") as pool:
        names = {pool.submit(compile_one, program): name for name, program in programs.items()}
        try:
            for future in as_completed(names):
                ready[names[future]], was_stored = future.result()
                num_stored += was_stored
                on_compiled(names[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    logger.info(
        "%d programs compiled, %d found compiled, in %.1f s",
        len(ready) - num_stored,
        num_stored,
        time.monotonic() - started,
    )
    return ready


def _explain_memory(name: str, line: str, message: str) -> str:
    """Say in a sentence what does not fit, of the compiler's own line, and which flags mend it."""
    sizes = _SIZES.findall(line) or _SIZES.findall(message)
    amount = f" (the compiler counts {sizes[0]} of {sizes[1]})" if len(sizes) > 1 else ""
    if "vmem" in line.lower():
        return (
            f"The {name} does not fit into the chip's vector memory{amount}. Lower --page-size or "
            "--max-running-requests, or use --attention-backend=xla."
        )
    return (
        f"The {name} does not fit into a device's memory{amount}. Lower --chunked-prefill-size, "
        "--max-running-requests or --mem-fraction-static, or shard over more devices with "
        "--tp-size."
    )


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    was_enabled = jax.config.values["jax_enable_compilation_cache"]
    _enable_jax_cache(False)
    try:
        yield
    finally:
        _enable_jax_cache(was_enabled)


def _enable_jax_cache(is_enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", is_enabled)
    # JAX decides once whether it has a cache; this makes it decide again.
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _jax_cache_hits() -> Iterator[list[str]]:
    """Collect what this thread finds in JAX's compilation cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def on_event(event: str, **_: str | int) -> None:
        if event == _CACHE_HIT_EVENT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(on_event)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(on_event)
