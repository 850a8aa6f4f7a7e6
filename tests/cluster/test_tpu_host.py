"""What a host looks for before JAX starts: a device, who holds it, and what is left of others."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray.util.tpu

from cluster.tpu_host import (
    HostPaths,
    check_device,
    leave_other_slices,
    let_ray_profile,
    lock_holder,
)
from engine.errors import HostError

LOCK = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
OPEN = "import sys; file = open(sys.argv[1])"
WAIT = "; print('has it', flush=True); sys.stdin.read()"


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    """A host with four chips, on which nobody has used a TPU yet."""
    for index in range(4):
        (tmp_path / f"accel{index}").touch()
    return HostPaths(lock=tmp_path / "libtpu_lockfile", devices=tmp_path)


@contextmanager
def other_process(program: str, path: Path) -> Iterator[int]:
    """Another process that holds something until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", program + WAIT, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process.pid
        process.stdin.close()


def check(paths: HostPaths, num_chips: int = 4, patience_s: float = 0) -> list[str]:
    notes: list[str] = []
    check_device(num_chips, on_wait=notes.append, paths=paths, patience_s=patience_s)
    return notes


def test_lock_of_a_living_process_is_named_and_that_of_a_dead_one_is_no_obstacle(
    paths: HostPaths,
) -> None:
    assert check(paths) == []
    with other_process(LOCK, paths.lock) as pid:
        assert str(lock_holder(paths.lock)).startswith(f"process {pid} (")
        with pytest.raises(HostError, match=rf"held by process {pid} \(python.*, and was for 0 s"):
            check(paths)
    assert paths.lock.exists()
    assert check(paths) == []


def test_process_that_is_ending_is_waited_for(paths: HostPaths) -> None:
    notes: list[str] = []
    with other_process(LOCK, paths.lock) as pid:

        def end(note: str) -> None:
            notes.append(note)
            os.kill(pid, 9)

        check_device(4, on_wait=end, paths=paths, patience_s=60)
    assert [note for note in notes if note.startswith(f"waiting for process {pid} (")]


def test_process_with_a_chip_open_is_named_also_without_a_lock(paths: HostPaths) -> None:
    with (
        other_process(OPEN, paths.devices / "accel2") as pid,
        pytest.raises(HostError, match=f"held by process {pid} "),
    ):
        check(paths)


def test_chips_of_a_host_may_be_shared_out(paths: HostPaths) -> None:
    with other_process(LOCK, paths.lock):
        assert check(paths, num_chips=1) == []


def test_host_without_a_device_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    with pytest.raises(HostError, match=rf"has no TPU: .*{tmp_path}/accel0 .*{tmp_path}/vfio"):
        check(HostPaths(lock=tmp_path / "lock", devices=tmp_path))
    (tmp_path / "vfio" / "0").touch()
    assert check(HostPaths(lock=tmp_path / "lock", devices=tmp_path), num_chips=1) == []


def test_lock_file_that_cannot_be_opened_is_told_with_the_command(paths: HostPaths) -> None:
    paths.lock.mkdir()
    with pytest.raises(HostError, match=f"sudo rm {paths.lock}"):
        check(paths)


def test_variables_of_other_slices_are_dropped_and_no_others() -> None:
    environment = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_PORT": "1", "TPU_WORKER_ID": "0"}
    leave_other_slices(environment)
    assert environment == {"TPU_WORKER_ID": "0"}


def test_ray_may_profile_a_host_only_where_profiling_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ray.util.tpu, "init_jax_profiler", lambda: opened.append("port"))
    let_ray_profile(None)
    assert not opened
    let_ray_profile("/tmp/traces")
    assert opened == ["port"]
