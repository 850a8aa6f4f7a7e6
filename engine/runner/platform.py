"""JAX as this process needs it: platform, devices, compilation cache. Called before JAX starts."""

import ctypes
import logging
import os
from pathlib import Path

import jax

from engine.config import EngineConfig

logger = logging.getLogger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER_TRIM = 2**31 - 1
_TOP_PAD_BYTES = 64 * 2**20

PLATFORMS = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}


def configure_jax(config: EngineConfig) -> None:
    """Choose the platform, the number of CPU devices and the compilation cache.

    Call it before anything asks JAX for a device; later calls cannot change the platform.
    """
    if config.device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[config.device])
    has_cpu = config.device in ("auto", "cpu")
    if has_cpu:
        # For `keep_freed_memory`: a thread's own arena would map what exceeds 64 MB all the same.
        _mallopt(_M_ARENA_MAX, 1)
    if has_cpu and jax.config.values["jax_num_cpu_devices"] < config.devices_per_host:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices_per_host)
        except RuntimeError:
            # Devices exist already and stay; making the mesh says so if they are too few.
            logger.debug("JAX has started before; its CPU devices stay as they are")
    configure_compilation_cache(config)


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees from now on for its next allocation.

    For CPUs, once all is loaded; what loading and compiling freed, half a gigabyte of 4 for
    Qwen3-0.6B's shape, is given back before. XLA frees a step's temporaries after it and allocates
    them for the next, 68 MB for 32 rows. Given back to the kernel they came back as 17,000 page
    faults a step, a fifth of its time. Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    _mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def _mallopt(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)


def configure_compilation_cache(config: EngineConfig) -> Path:
    """Keep compiled programs between starts, and return where."""
    directory = compilation_cache_dir(config)
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs count too: a warm start is to compile nothing at all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def compilation_cache_dir(config: EngineConfig) -> Path:
    """--jax-compilation-cache-dir, else JAX_COMPILATION_CACHE_DIR, else the user's cache folder."""
    given = config.jax_compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "qwen-on-ray" / "programs"
