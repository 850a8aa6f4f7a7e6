"""Compiled programs on disk, found again by all that went into them, without tracing.

JAX's own compilation cache is not enough: it is asked after tracing (most of a warm start), and
only process 0 of a gang writes to it, under a key that on CPUs other processes never ask for. So
every rank keeps the programs that it runs.

An entry is a pickle around machine code: whoever can write to the folder can run code here, as is
true of JAX's cache.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

logger = logging.getLogger(__name__)

_FOLDER = "executables"
_MAX_UNUSED_S = 30 * 24 * 3600.0
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")
# Settings of JAX that say where and how much, and change no program.
_IRRELEVANT_SETTINGS = ("cache", "log", "dump", "coordinat", "debug", "traceback", "compiler_")
_RELEVANT_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class ProgramStore:
    """Programs of one mesh in one folder, written and read by any number of processes."""

    def __init__(self, folder: Path, mesh: Mesh, closed_over: Iterable[object]) -> None:
        """Open the store, and drop what nobody has used for a month.

        Args:
            folder: Made if absent; entries go to a folder of their own below it.
            mesh: The devices that the programs run on.
            closed_over: What the programs depend on besides their arguments and this project's
                code, in objects whose `repr` says it all.
        """
        self._folder = folder / _FOLDER
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._devices = list(mesh.devices.flat)
        self._base = hashlib.sha256()
        for part in (_environment(), _describe_devices(mesh), *map(repr, closed_over)):
            self._base.update(part.encode() + b"\0")
        self.platform: str = self._devices[0].platform
        self._drop_unused()

    def key(self, name: str, arguments: Any) -> str:
        """Name the program that `name` makes of such arguments.

        Args:
            name: Which function, and what else tells it from the store's other functions.
            arguments: Pytree of arrays or `jax.ShapeDtypeStruct`s, with their shardings.
        """
        digest = self._base.copy()
        leaves, tree = jax.tree.flatten(arguments)
        described = [f"{leaf.shape} {leaf.dtype} {leaf.sharding}" for leaf in leaves]
        digest.update("\0".join([name, str(tree), *described]).encode())
        return digest.hexdigest()[:32]

    def load(self, key: str) -> jax.stages.Compiled | None:
        """The program that was saved under this key, ready to run; None if there is none."""
        path = self._path(key)
        try:
            payload = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        try:
            return serialize_executable.deserialize_and_load(
                *pickle.loads(zlib.decompress(payload)), execution_devices=self._devices
            )
        # Whatever is wrong with an entry, compiling mends it.
        except Exception as error:
            logger.warning("The compiled program %s cannot be used: %r", path, error)
            return None

    def save(self, key: str, compiled: jax.stages.Compiled) -> None:
        """Keep a program; it must not have run yet (XLA on CPU cannot write one that has)."""
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            # To a seventh of its size, at a cost of 10 ms.
            payload = zlib.compress(payload, level=1)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(payload)
            Path(file.name).replace(self._path(key))
        # A full disk or a program that cannot be written costs the next start, not this one.
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            logger.warning("A compiled program could not be kept for the next start: %r", error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.executable"

    def _drop_unused(self) -> None:
        oldest_s = time.time() - _MAX_UNUSED_S
        for path in self._folder.iterdir():
            # Another process may be doing the same.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest_s:
                    path.unlink()


def _environment() -> str:
    """All of code, libraries, settings and machine that a compiled program may depend on."""
    settings = {
        name: value
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in _IRRELEVANT_SETTINGS)
    }
    variables = {name: os.environ.get(name) for name in _RELEVANT_VARIABLES}
    return repr((_code_digest(), _versions(), sys.version, settings, variables, _processor()))


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return tuple(versions)


@cache
def _processor() -> str:
    """What XLA generates code for on a CPU: its kind, its instructions, and how many there are."""
    try:
        num_cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS cannot bind processes to cores
        num_cpus = os.cpu_count() or 1
    described = [platform.machine(), platform.processor(), str(num_cpus)]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("flags", "Features", "model name", "CPU part")
        described += sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join(described)


def _describe_devices(mesh: Mesh) -> str:
    client = mesh.devices.flat[0].client
    devices = [
        (device.id, device.process_index, device.device_kind) for device in mesh.devices.flat
    ]
    shape = np.shape(mesh.devices)
    return repr((client.platform_version, jax.process_index(), shape, mesh.axis_names, devices))
