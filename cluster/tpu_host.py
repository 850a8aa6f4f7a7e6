"""A TPU host as JAX starts on it: what is left of others there, and a door for profilers.

Runs in the host's own process. Must not import JAX by itself.
"""

import contextlib
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray.util.tpu

from engine.errors import HostError

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0
"""A process that is ending, such as the last epoch's on this host, may take so long."""
_POLL_S = 0.5
# struct flock of 64-bit Linux: type, whence, start, length, process.
_FLOCK = "hhqqi4x"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPaths:
    """Where things lie on a host; others only in tests."""

    lock: Path = Path("/tmp/libtpu_lockfile")
    devices: Path = Path("/dev")
    processes: Path = Path("/proc")


def leave_other_slices(environment: MutableMapping[str, str]) -> None:
    """Drop the variables by which libtpu would look for more slices: a gang is one slice.

    They stay behind where a host was part of a larger job, or a webhook sets them on every pod;
    with them libtpu waits for a coordinator that is not there.
    """
    stale = sorted(name for name in environment if name.startswith("MEGASCALE_"))
    for name in stale:
        logger.info("not heeding %s=%s: a gang is one slice", name, environment.pop(name))


def let_ray_profile(profile_dir: str | None) -> None:
    """Let Ray's dashboard profile this process, where profiling was asked for.

    It opens a port without any guard, 9999 or that of JAX_PROFILER_PORT. Does not raise: a port
    that is taken, as by another engine's process on this host, is an error in the log.

    Args:
        profile_dir: As `--profile-dir`; None opens nothing.
    """
    if profile_dir is not None:
        ray.util.tpu.init_jax_profiler()


def check_device(
    num_chips: int,
    *,
    on_wait: Callable[[str], None],
    paths: HostPaths = HostPaths(),
    patience_s: float = _PATIENCE_S,
) -> None:
    """Check that the host has TPU chips that nobody else uses; waits a while for who is ending.

    libtpu itself says of a device in use that its lock file should be removed, which lets two
    processes at one chip, and of a host without chips that it found no backend.

    Args:
        num_chips: That this process will use. Fewer than the host has may be shared with others.
        on_wait: Told who is waited for.

    Raises:
        HostError: Naming the process that holds the device, or what is missing.
    """
    devices = tpu_devices(paths.devices)
    if not devices:
        raise HostError(
            f"This host has no TPU: there is neither {paths.devices}/accel0 nor a number in "
            f"{paths.devices}/vfio. In a container, pass the devices on; else take the host out of "
            "the cluster."
        )
    if num_chips < len(devices) or os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD") == "1":
        return
    deadline_s = time.monotonic() + patience_s
    while (holder := lock_holder(paths.lock)) or (holder := device_holder(devices, paths)):
        if time.monotonic() > deadline_s:
            raise HostError(
                f"The TPU of this host is held by {holder}, and was for {patience_s:.0f} s. End "
                "that process, or leave the host to it."
            )
        on_wait(f"waiting for {holder} to let go of the TPU")
        time.sleep(_POLL_S)


def tpu_devices(folder: Path) -> list[Path]:
    """The device files of a host's chips: accel0, accel1 and so on, or numbers in vfio."""
    found = [path for path in folder.glob("accel*") if not path.is_dir()]
    return sorted(found or folder.glob("vfio/[0-9]*"))


def lock_holder(lock: Path) -> str | None:
    """Who has locked libtpu's file, which its users do for as long as they live; None if nobody.

    A file that a dead process left behind is not locked, and in nobody's way.

    Raises:
        HostError: It cannot be opened: libtpu could not either.
    """
    try:
        file = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(
            f"libtpu's lock file cannot be opened: {error}. Another user left it behind: `sudo rm "
            f"{lock}` on this host, once none of that user's processes is on the TPU."
        ) from error
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, question))
    finally:
        os.close(file)
    if kind == fcntl.F_UNLCK:
        return None
    # The kernel knows no number for a process of another container.
    return _describe(pid) if pid > 0 else "a process of another container on this machine"


def device_holder(devices: list[Path], paths: HostPaths = HostPaths()) -> str | None:
    """A process, not this one, that has one of the device files open; None if none is seen.

    Processes of other users show their files to root alone.
    """
    names = {str(path) for path in devices}
    for process in paths.processes.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        # A process may end meanwhile, or be none of our business.
        with contextlib.suppress(OSError):
            if any(str(file.readlink()) in names for file in (process / "fd").iterdir()):
                return _describe(int(process.name))
    return None


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        # Not its arguments: they may hold a secret, and this ends up in a status that others read.
        return f"process {pid} ({process.name()}, of {process.username()})"
    except psutil.Error:
        return f"process {pid}"
