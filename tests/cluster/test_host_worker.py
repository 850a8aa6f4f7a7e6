"""One host's process without Ray: when its leader, or it itself, falls silent; lost plans."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster import host_worker
from cluster.gang_socket import LeaderSocket, MessageKind
from cluster.host_worker import HostTask, HostWorker
from engine.config import EngineConfig
from engine.step import Bucket, StepPlan, decode_result, encode

pytestmark = pytest.mark.slow

TIMEOUT_S = 60
PATIENCE_S = 3.0


def plan(step: int) -> bytes:
    return encode(
        StepPlan(
            step=step,
            bucket=Bucket(num_seqs=4),
            decode_slots=np.arange(2, dtype=np.int32),
            decode_positions=np.zeros(2, np.int32),
        )
    )


def run_host(task: HostTask) -> None:
    host_worker.LEADER_TIMEOUT_S = PATIENCE_S
    failure = HostWorker().run(task)
    (Path(task.config.model_path) / "failure").write_text(f"{failure.kind}: {failure.message}")


class Host:
    """A host's process and its leader, which beats until `fall_silent`."""

    def __init__(self, folder: Path) -> None:
        self.leader = LeaderSocket("127.0.0.1", epoch=1, num_hosts=1)
        task = HostTask(
            config=EngineConfig.model_validate({"model_path": str(folder)}),
            rank=0,
            num_hosts=1,
            address="127.0.0.1",
            coordinator_address="",
            num_local_hosts=1,
            invitation=self.leader.invitation,
            program="null_program:start",
        )
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=run_host, args=(task,)
        )
        self.process.start()
        self._beats = asyncio.create_task(self._beat())

    async def receive(self, kind: MessageKind) -> bytes:
        """The next message of a kind."""
        async with asyncio.timeout(TIMEOUT_S):
            while (message := await self.leader.receive()).kind is not kind:
                pass
        return message.payload

    async def wait_until_ready(self) -> None:
        """Both of its connections stand: it reports on one and hears plans on the other."""
        missing = {MessageKind.HELLO, MessageKind.READY}
        async with asyncio.timeout(TIMEOUT_S):
            while missing:
                missing.discard((await self.leader.receive()).kind)

    def send_plan(self, step: int) -> None:
        assert self.leader.broadcast(MessageKind.PLAN, plan(step)) == {}

    def fall_silent(self) -> None:
        self._beats.cancel()

    def close(self) -> None:
        self.fall_silent()
        self.process.kill()
        self.process.join()
        self.leader.close()

    async def _beat(self) -> None:
        while True:
            self.leader.broadcast(MessageKind.BEAT)
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def ready_host(folder: Path) -> AsyncIterator[Host]:
    host = Host(folder)
    try:
        await host.wait_until_ready()
        yield host
    finally:
        host.close()


async def test_host_on_a_machine_that_stood_still_for_long_serves_on(tmp_path: Path) -> None:
    async with ready_host(tmp_path) as host:
        pid = host.process.pid
        assert pid is not None
        # The leader stands still with it, so no beat lies there when they go on.
        host.fall_silent()
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S):
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.2 * PATIENCE_S)
        os.kill(pid, signal.SIGCONT)
        host.send_plan(0)
        assert decode_result(await host.receive(MessageKind.RESULT)).step == 0


async def test_host_whose_leader_is_silent_ends(tmp_path: Path) -> None:
    async with ready_host(tmp_path) as host:
        host.fall_silent()
        await asyncio.to_thread(host.process.join, TIMEOUT_S)
        assert host.process.exitcode == 1


async def test_host_that_missed_a_plan_takes_no_further_step(tmp_path: Path) -> None:
    async with ready_host(tmp_path) as host:
        for step in (0, 1, 3):
            host.send_plan(step)
        await asyncio.to_thread(host.process.join, TIMEOUT_S)
    assert (
        (tmp_path / "failure")
        .read_text()
        .startswith("EngineError: the plan of step 3 came where step 2 was due")
    )
    assert (tmp_path / "rank-0").read_text().splitlines()[1:] == ["step 0", "step 1"]
