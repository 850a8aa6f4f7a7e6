"""Claims on TPU slices against a real Ray whose TPU hosts have no TPU."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from fake_slices import real_tpu_host
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated import autoscaler_pb2

from cluster.claim import Claim
from cluster.host_group import HostGroup
from cluster.nodes import TPU_SLICE_LABEL, read_cluster
from cluster.placement import claim_hosts
from cluster.quarantine import read_quarantine, record_failure
from engine.config import EngineConfig, parse_config
from engine.step import StartProgress

# Three nodes of Ray are started first, which takes minutes on a machine that is busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("slices")]

autoscaler: Any = autoscaler_pb2
HEAD = "TPU-v6e-4-head"


def config(**fields: Any) -> EngineConfig:
    return parse_config({"model_path": "m", "tpu": "v6e:2x2", **fields})


@pytest.fixture(scope="module")
def slices(local_ray: None) -> Iterator[None]:
    """Two slices of one host, a and b."""
    address = ray.get_runtime_context().gcs_address
    with real_tpu_host(address, "a"), real_tpu_host(address, "b"):
        yield
    while any("TPU" in node.resources for node in read_cluster().nodes):
        time.sleep(0.1)


async def claim(notes: list[str] | None = None, **fields: Any) -> Claim:
    told = [] if notes is None else notes
    return await claim_hosts(config(**fields), on_wait=told.append, timeout_s=30)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


def name_of(claim: Claim) -> str:
    assert claim.slice is not None
    return claim.slice.name


def node_ids(name: str) -> list[str]:
    return [
        node.node_id for node in read_cluster().nodes if node.labels.get(TPU_SLICE_LABEL) == name
    ]


@contextmanager
def frozen(name: str) -> Iterator[None]:
    """A host whose raylet stands still; Ray notices after more than ten seconds."""
    (node_id,) = node_ids(name)
    (raylet,) = (
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet"
        and any(node_id in word for word in process.info["cmdline"] or ())
    )
    raylet.suspend()
    try:
        yield
    finally:
        raylet.resume()


async def test_each_engine_takes_a_slice_of_its_own_and_one_too_many_waits() -> None:
    first, second = await asyncio.gather(claim(), claim())
    assert {name_of(first), name_of(second)} == {"a", "b"}
    assert HEAD not in ray.available_resources()
    notes: list[str] = []
    third = asyncio.create_task(claim(notes))
    await until(lambda: notes)
    assert notes == [
        "waiting for 1 host with 4 TPU chips (one slice v6e:2x2): "
        "slice a is in use by others; slice b is in use by others"
    ]
    second.release()
    granted = await third
    assert name_of(granted) == name_of(second)
    granted.release()
    first.release()
    await until(lambda: ray.available_resources().get(HEAD) == 2)


async def test_slice_with_a_host_that_does_not_answer_is_passed_over() -> None:
    await until(lambda: ray.available_resources().get(HEAD) == 2)
    with frozen("a"):
        began_s = time.monotonic()
        granted = await claim()
        assert name_of(granted) == "b"
        assert time.monotonic() - began_s < 4
        assert sum("TPU" in node.resources for node in read_cluster().nodes) == 2, (
            "Ray takes it for alive"
        )
        notes: list[str] = []
        on_cpus = await claim(tpu=None, device="cpu", host_timeout_s=1.0)
        assert on_cpus.avoided == frozenset(node_ids("a"))
        on_cpus.release()
        second = asyncio.create_task(claim(notes, host_timeout_s=1.0))
        await until(lambda: notes)
        assert "slice a has silent hosts: " in notes[0]
    assert name_of(await second) == "a"
    (await second).release()
    granted.release()


async def test_slice_is_asked_of_the_autoscaler_and_claimed_by_name_once_it_is_there() -> None:
    address = ray.get_runtime_context().gcs_address
    client = GcsClient(address)
    wanted = {"TPU": 4, "CPU": 1, "TPU-v5litepod-4-head": 1}
    small = autoscaler.NodeGroupConfig(name="small", max_count=1, resources=wanted)
    notes: list[str] = []
    client.report_cluster_config(
        autoscaler.ClusterConfig(node_group_configs=[small]).SerializeToString()
    )
    try:
        waiting = asyncio.create_task(claim(notes, tpu="v5e:2x2"))
        await until(lambda: notes)
        assert "there is no such slice at present; the autoscaler is asked for one" in notes[0]
        demands = get_cluster_resource_state(client).pending_gang_resource_requests
        (bundle,) = (request.resources_bundle for each in demands for request in each.requests)
        assert bundle == wanted
        # The part of the autoscaler, which the fake hosts have none of.
        host = real_tpu_host(address, "c", pod_type="v5litepod-4")
        await asyncio.to_thread(host.__enter__)
        try:
            granted = await waiting
            assert name_of(granted) == "c"
            assert not get_cluster_resource_state(client).pending_gang_resource_requests
            granted.release()
        finally:
            host.__exit__(None, None, None)
    finally:
        client.report_cluster_config(autoscaler.ClusterConfig().SerializeToString())


async def test_gang_leaves_a_slice_whose_host_failed_twice(tmp_path: Path) -> None:
    fields = {"model_path": str(tmp_path)}
    group = HostGroup(config(**fields), program="null_program:start_and_tell_environment")
    notes: list[str] = []

    def on_progress(progress: StartProgress) -> None:
        notes.append(progress.note)

    try:
        await group.start(on_progress)
        (host,) = group.hosts
        variables = (tmp_path / "environment-0").read_text().split()
        assert "TPU_WORKER_ID" in variables
        assert not [each for each in variables if each.startswith("MEGASCALE")]

        record_failure({host.facts.node_id: "its host"}, "the first failure.")
        assert read_quarantine(600) == {}
        os.kill(host.facts.pid, signal.SIGKILL)
        await group.failed()
        await group.start(on_progress)
        (other,) = group.hosts
        assert other.facts.node_id != host.facts.node_id
        (reason,) = read_quarantine(600).values()
        assert reason.startswith("its host failed 2 times and is left alone for 600 s.")
        assert "A process of the engine died: rank 0" in reason

        waiting = asyncio.create_task(claim(notes))
        await until(lambda: "is in quarantine: its host" in notes[-1])
        waiting.cancel()
        assert read_quarantine(0) == {}
        again = await claim(host_quarantine_s=0)
        assert again.node_ids() == [host.facts.node_id]
        again.release()
    finally:
        await group.stop()
