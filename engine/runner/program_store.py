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
import json
import logging
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from engine.errors import ConfigError

logger = logging.getLogger(__name__)

_FOLDER = "executables"
_MAX_UNUSED_S = 30 * 24 * 3600.0
_DESCRIPTION = "programs.json"
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")
# Settings of JAX that say where and how much, and change no program.
_IRRELEVANT_SETTINGS = ("cache", "log", "dump", "coordinat", "debug", "traceback", "compiler_")
# Of those, what a program for a TPU does not depend on, so that a machine without one makes it.
_HOSTS_SETTINGS = ("platform", "cpu", "cuda", "gpu", "mock", "pjrt")
_RELEVANT_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class ProgramStore:
    """Programs of one mesh in one folder, written and read by any number of processes.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        parts: What all keys are made of, by name, beside a program's own name and arguments.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, closed_over: Iterable[object], source: str | None = None
    ) -> None:
        """Open the store, and drop what nobody has used for a month.

        Args:
            folder: Made if absent; entries go to a folder of their own below it.
            mesh: The devices that the programs run on.
            closed_over: What the programs depend on besides their arguments and this project's
                code, in objects whose `repr` says it all.
            source: Folder or address (as fsspec reads them: gs://, s3://, ...) with another
                store's files, where programs are fetched from that this one lacks.
        """
        self._folder = folder / _FOLDER
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._devices = list(mesh.devices.flat)
        self.platform: str = self._devices[0].platform
        self.parts = _environment(self.platform) | {
            "devices": _describe_devices(mesh),
            "model": repr([repr(part) for part in closed_over]),
        }
        self._base = hashlib.sha256()
        for name, part in self.parts.items():
            self._base.update(f"{name}={part}\0".encode())
        self._source = None if source is None else _Source(source, self.parts)
        self._drop_unused()

    def key(self, name: str, arguments: Any) -> str:
        """Name the program that `name` makes of such arguments.

        Args:
            name: Which function, and what else tells it from the store's other functions.
            arguments: Pytree of arrays or `jax.ShapeDtypeStruct`s, with their shardings.
        """
        digest = self._base.copy()
        leaves, tree = jax.tree.flatten(arguments)
        described = [
            f"{leaf.shape} {leaf.dtype} {_describe_sharding(leaf.sharding, len(leaf.shape))}"
            for leaf in leaves
        ]
        digest.update("\0".join([name, str(tree), *described]).encode())
        return digest.hexdigest()[:32]

    def load(self, key: str) -> jax.stages.Compiled | None:
        """The program that was saved under this key, ready to run; None if there is none."""
        path = self._path(key)
        if self._source is not None and not path.exists():
            self._source.fetch(f"{_FOLDER}/{path.name}", path)
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

    def copy_to(self, folder: Path) -> None:
        """Copy all programs, and what describes them, into a folder that others fetch from."""
        shutil.copytree(self._folder, folder / _FOLDER, dirs_exist_ok=True)
        describe_store(folder, self.parts)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.executable"

    def _drop_unused(self) -> None:
        oldest_s = time.time() - _MAX_UNUSED_S
        for path in self._folder.iterdir():
            # Another process may be doing the same.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest_s:
                    path.unlink()


def describe_store(folder: Path, parts: Mapping[str, str]) -> None:
    """Write beside a store's programs what all their keys are made of, for who fetches them."""
    text = json.dumps({"parts": dict(parts)}, indent=1)
    (folder / _DESCRIPTION).write_text(text, encoding="utf-8")


class _Source:
    """Another store's files, which may lie on another machine."""

    def __init__(self, address: str, parts: Mapping[str, str]) -> None:
        self._address = address.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._address)
            theirs = json.loads(self._files.cat_file(f"{self._root}/{_DESCRIPTION}"))["parts"]
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"--compiled-programs={address} cannot be read: {error}. Give a folder or an "
                "address that `qwen-on-ray compile --output` wrote."
            ) from error
        if different := [name for name, part in parts.items() if theirs.get(name) != part]:
            logger.warning(
                "The programs of --compiled-programs=%s were compiled for something else, and are "
                "of no use here: %s. This start compiles its own.",
                address,
                "; ".join(
                    _difference(name, theirs.get(name, ""), parts[name]) for name in different
                ),
            )

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file, if there is such a one."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetched = Path(folder) / path.name
            try:
                self._files.get_file(f"{self._root}/{name}", str(fetched))
            except FileNotFoundError:
                return
            except OSError as error:
                logger.warning("%s/%s cannot be fetched: %s", self._address, name, error)
                return
            fetched.replace(path)


def _difference(name: str, theirs: str, ours: str) -> str:
    if len(theirs) + len(ours) > 400:
        return f"{name} differ"
    return f"{name} {theirs} there, {ours} here"


def _environment(platform: str) -> dict[str, str]:
    """All of code, libraries, settings and machine that a compiled program may depend on."""
    irrelevant = _IRRELEVANT_SETTINGS + (_HOSTS_SETTINGS if platform == "tpu" else ())
    settings = {
        name: value
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in irrelevant)
    }
    parts = {
        "code": _code_digest(),
        "packages": ", ".join(_versions()),
        "settings": repr(settings),
        "variables": repr({name: os.environ.get(name) or "" for name in _RELEVANT_VARIABLES}),
    }
    if platform != "tpu":
        parts |= {"python": sys.version, "processor": _processor()}
    return parts


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


def _describe_sharding(sharding: Any, num_dimensions: int) -> str:
    """The same for what lies alike: an axis over one device shards nothing."""
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    sizes = sharding.mesh.shape
    named = [each if isinstance(each, tuple) else (each,) for each in sharding.spec]
    named += [()] * (num_dimensions - len(named))
    spec = [tuple(axis for axis in axes if axis and sizes[axis] > 1) for axes in named]
    return f"{dict(sizes)} {spec} {sharding.memory_kind}"


def _describe_devices(mesh: Mesh) -> str:
    if mesh.devices.flat[0].platform == "tpu":
        # Alike on all hosts of a slice, and on a machine that only compiles for it.
        placed = [
            (device.device_kind, tuple(device.coords), device.core_on_chip)
            for device in mesh.devices.flat
        ]
        return repr((mesh.axis_names, placed))
    client = mesh.devices.flat[0].client
    devices = [
        (device.id, device.process_index, device.device_kind) for device in mesh.devices.flat
    ]
    shape = np.shape(mesh.devices)
    return repr((client.platform_version, jax.process_index(), shape, mesh.axis_names, devices))
