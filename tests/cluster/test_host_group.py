"""The gang against real processes under a local Ray, with a program that has no model."""

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import null_program
import numpy as np
import psutil
import pytest

from cluster.host_group import HostGroup
from cluster.host_processes import rank_order
from engine.config import EngineConfig
from engine.errors import CapacityError, CheckpointError, EngineDiedError
from engine.step import Bucket, StartProgress, StepMasks, StepPlan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

LOW_MEMORY_GANG = Path(__file__).with_name("low_memory_gang.py")
TESTS = Path(__file__).parents[1]


def plan(step: int, *, position: int = 0) -> StepPlan:
    return StepPlan(
        step=step,
        bucket=Bucket(num_seqs=4),
        decode_slots=np.arange(2, dtype=np.int32),
        decode_positions=np.full(2, position, np.int32),
    )


def config(folder: Path, *, num_hosts: int = 2, **fields: object) -> EngineConfig:
    return EngineConfig.model_validate(
        {"model_path": str(folder), "nnodes": num_hosts, "tp_size": num_hosts, **fields}
    )


@asynccontextmanager
async def gang(
    folder: Path, *, num_hosts: int = 2, program: str = "start", **fields: object
) -> AsyncIterator[HostGroup]:
    group = HostGroup(
        config(folder, num_hosts=num_hosts, **fields), program=f"null_program:{program}"
    )
    try:
        yield group
    finally:
        await group.stop()


def steps_seen(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank-{rank}").read_text().splitlines()[1:]


def ignore(progress: StartProgress) -> None:
    pass


@pytest.mark.parametrize("num_hosts", [1, 2])
async def test_every_host_gets_every_plan_in_order_and_results_come_back(
    tmp_path: Path, num_hosts: int
) -> None:
    progress: list[StartProgress] = []
    async with gang(tmp_path, num_hosts=num_hosts) as group:
        limits = await group.start(progress.append)
        assert limits == null_program.LIMITS
        for step in range(0, 10, 2):
            first, second = group.execute(plan(step)), group.execute(plan(step + 1))
            assert [(await first).step, (await second).step] == [step, step + 1]
            assert (await second).token_ids.tolist() == [step + 1, step + 1]
        pids = [host.facts.pid for host in group.hosts]
        assert len(set(pids)) == num_hosts
        await group.stop()
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert {p.rank for p in progress if p.phase == "compile"} == set(range(num_hosts))
    assert [p.done for p in progress if p.phase == "placement"][-1] == num_hosts
    for rank in range(num_hosts):
        assert steps_seen(tmp_path, rank) == [f"step {step}" for step in range(10)]


async def test_a_step_with_masked_rows_ends_once_its_masks_are_there(tmp_path: Path) -> None:
    async with gang(tmp_path) as group:
        await group.start(ignore)
        masked = group.execute(
            msgspec.structs.replace(plan(0), masked_rows=np.array([1], np.int32))
        )
        group.mask(StepMasks(step=0, words=(np.array([1], np.int32),)))
        following = group.execute(plan(1))
        assert [(await masked).step, (await following).step] == [0, 1]
    for rank in range(2):
        assert steps_seen(tmp_path, rank) == ["step 0", "masks 0", "step 1"]


async def test_gang_serves_again_in_a_new_epoch_after_a_rank_was_killed(tmp_path: Path) -> None:
    async with gang(tmp_path) as group:
        await group.start(ignore)
        old = [host.facts.pid for host in group.hosts]
        running = group.execute(plan(0, position=null_program.HANGING_POSITION))
        killed_s = time.monotonic()
        os.kill(old[1], signal.SIGKILL)
        with pytest.raises(EngineDiedError, match="process of the engine died: rank 1"):
            await asyncio.wait_for(running, 10)
        assert time.monotonic() - killed_s < 3
        assert isinstance(await group.failed(), EngineDiedError)
        with pytest.raises(EngineDiedError):
            await group.execute(plan(1))
        await group.start(ignore)
        assert group.epoch == 2
        assert (await asyncio.wait_for(group.execute(plan(0)), 10)).step == 0
        assert not any(psutil.pid_exists(pid) for pid in old)


async def test_plans_that_a_dying_host_does_not_take_end_with_the_reason_of_its_death(
    tmp_path: Path,
) -> None:
    async with gang(tmp_path) as group:
        await group.start(ignore)
        os.kill(group.hosts[1].facts.pid, signal.SIGKILL)

        # The connection may be gone before Ray tells of the process; plan on until the end shows.
        async def plan_on() -> None:
            for step in itertools.count():
                await group.execute(plan(step))

        with pytest.raises(EngineDiedError, match="process of the engine died: rank 1"):
            await asyncio.wait_for(plan_on(), 10)


async def test_silent_host_counts_as_dead(tmp_path: Path) -> None:
    async with gang(tmp_path, host_timeout_s=1.5) as group:
        await group.start(ignore)
        stopped = group.hosts[1].facts.pid
        os.kill(stopped, signal.SIGSTOP)
        running = group.execute(plan(0, position=null_program.HANGING_POSITION))
        with pytest.raises(EngineDiedError, match=r"rank 1 on .* silent for .*--host-timeout-s"):
            await asyncio.wait_for(running, 10)
        await asyncio.wait_for(group.start(ignore), 120)
        assert (await asyncio.wait_for(group.execute(plan(0)), 10)).step == 0
        assert not psutil.pid_exists(stopped)


async def test_fault_while_running_names_the_host_and_leaves_the_traceback_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with gang(tmp_path) as group:
        await group.start(ignore)
        running = group.execute(plan(0, position=null_program.FAULTY_POSITION))
        with pytest.raises(
            EngineDiedError, match=r"^rank [01] on .*RuntimeError: the device caught"
        ):
            await asyncio.wait_for(running, 10)
    assert re.search(r"(?s)Traceback.*null_program\.py.*the device caught fire", caplog.text)


async def test_fault_at_start_names_the_rank_and_carries_its_traceback(tmp_path: Path) -> None:
    async with gang(tmp_path, program="fail_on_rank_1") as group:
        with pytest.raises(EngineDiedError, match=r"(?s)rank 1 on .*Traceback.*cannot count"):
            await group.start(ignore)
        assert group.hosts == ()


async def test_fault_that_a_user_can_mend_keeps_its_class_and_message(tmp_path: Path) -> None:
    async with gang(tmp_path, program="miss_weights_on_rank_1") as group:
        with pytest.raises(CheckpointError, match=r"rank 1 on .*: model-00002\.safetensors is"):
            await group.start(ignore)


async def test_hosts_that_found_different_room_are_refused(tmp_path: Path) -> None:
    async with gang(tmp_path, program="start_with_uneven_memory") as group:
        with pytest.raises(CapacityError, match=r"8 pages, rank 1 .* 9\. Set --max-total-tokens"):
            await group.start(ignore)


async def test_more_hosts_than_the_cluster_can_ever_hold_are_refused_at_once(
    tmp_path: Path,
) -> None:
    async with gang(tmp_path, num_hosts=4, device="tpu") as group:
        started_s = time.monotonic()
        with pytest.raises(CapacityError, match=r"4 hosts with 1 TPU chips each.* 0 TPU chips on"):
            await group.start(ignore)
        assert time.monotonic() - started_s < 10


async def test_executing_without_a_gang_fails(tmp_path: Path) -> None:
    async with gang(tmp_path) as group:
        with pytest.raises(EngineDiedError):
            await group.execute(plan(0))


def test_a_host_that_ray_ends_for_want_of_memory_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(LOW_MEMORY_GANG), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    assert re.search(
        r"Ray ended it because its node ran low on memory: lower --max-total-tokens",
        done.stdout,
    ), done.stderr


def test_ranks_follow_the_nodes_own_numbers_where_all_have_one() -> None:
    assert rank_order([2, 0, 1], [True, False, False]) == [1, 2, 0]


def test_ranks_without_numbers_begin_on_the_leaders_node() -> None:
    assert rank_order([None, 0, None], [False, True, False]) == [1, 0, 2]
    assert rank_order([0, 0], [False, False]) == [0, 1]


def test_leader_leaves_jax_alone() -> None:
    check = (
        "import sys, cluster.host_group, cluster.status, cluster.placement, cluster.rendezvous;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
