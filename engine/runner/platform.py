"""JAX as this process needs it: platform, devices, compilation cache. Called before JAX starts."""

import logging
import os
from pathlib import Path

import jax

from engine.config import EngineConfig

logger = logging.getLogger(__name__)

PLATFORMS = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}


def configure_jax(config: EngineConfig) -> None:
    """Choose the platform, the number of CPU devices and the compilation cache.

    Call it before anything asks JAX for a device; later calls cannot change the platform.
    """
    if config.device != "auto":
        jax.config.update("jax_platforms", PLATFORMS[config.device])
    has_cpu = config.device in ("auto", "cpu")
    if has_cpu and jax.config.values["jax_num_cpu_devices"] < config.devices_per_host:
        try:
            jax.config.update("jax_num_cpu_devices", config.devices_per_host)
        except RuntimeError:
            # Devices exist already and stay; making the mesh says so if they are too few.
            logger.debug("JAX has started before; its CPU devices stay as they are")
    configure_compilation_cache(config)


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
