"""What a gang needs against what a cluster has; claims against a real Ray."""

import asyncio
from typing import Any

import pytest
import ray
from fake_slices import cluster_of, slice_of, tpu_host

from cluster.claim import Claim
from cluster.needs import need_of, resolve_device
from cluster.nodes import NODE_RANK_LABEL, Cluster, Node, read_cluster
from cluster.placement import check_capacity, claim_hosts
from cluster.slices import tpu_slices
from engine.config import EngineConfig
from engine.errors import CapacityError, EngineError


def config(**fields: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model_path": "m", **fields})


def cluster(*resources: dict[str, float], maxima: dict[str, float] | None = None) -> Cluster:
    nodes = tuple(
        Node(node_id=str(index), address=f"10.0.0.{index}", resources=each, labels={})
        for index, each in enumerate(resources)
    )
    return Cluster(nodes=nodes, maxima=maxima or {})


TWO_TPU_HOSTS = need_of(config(device="tpu", nnodes=2, tp_size=8))
FOUR_TPU_HOSTS = need_of(config(device="tpu", nnodes=4, tp_size=16))


def test_missing_chips_are_named_with_what_the_cluster_has_and_what_to_do() -> None:
    with pytest.raises(CapacityError) as raised:
        check_capacity(FOUR_TPU_HOSTS, cluster({"CPU": 8}))
    assert str(raised.value) == (
        "The model needs 4 hosts with 4 TPU chips each (one slice of 16 chips); this cluster has "
        "0 TPU chips on 1 node. Start a cluster that has them (`ray up`), change "
        "--tp-size and --nnodes, or set --device=cpu."
    )


def test_autoscaler_that_can_bring_the_hosts_is_waited_for() -> None:
    check_capacity(FOUR_TPU_HOSTS, cluster({"CPU": 8}, maxima={"TPU": 16, "CPU": 64}))
    with pytest.raises(CapacityError, match="its autoscaler stops at 8"):
        check_capacity(FOUR_TPU_HOSTS, cluster({"CPU": 8}, maxima={"TPU": 8, "CPU": 64}))


def test_one_large_tpu_host_is_not_four_hosts() -> None:
    with pytest.raises(CapacityError, match="has 16 TPU chips on 1 node"):
        check_capacity(FOUR_TPU_HOSTS, cluster({"CPU": 8, "TPU": 16}))


def test_processes_on_cpus_may_share_a_node() -> None:
    two = need_of(config(device="cpu", nnodes=2, tp_size=2))
    check_capacity(two, cluster({"CPU": 1}))
    check_capacity(two, cluster({"CPU": 0.5}, {"CPU": 0.5}))
    with pytest.raises(CapacityError, match=r"2 hosts with 0\.5 CPUs each.*lower --nnodes"):
        check_capacity(two, cluster({"CPU": 0.5}, {"CPU": 0.4}))


@pytest.mark.parametrize(
    ("found", "device"),
    [
        (cluster({"CPU": 2}), "cpu"),
        (cluster({"CPU": 2, "GPU": 1}), "gpu"),
        (cluster({"CPU": 2, "GPU": 1}, {"TPU": 4}), "tpu"),
        (cluster({"CPU": 2}, maxima={"TPU": 4}), "tpu"),
    ],
)
def test_device_auto_is_the_best_that_the_cluster_has_or_may_get(
    found: Cluster, device: str
) -> None:
    assert resolve_device(config(), found).device == device
    assert resolve_device(config(device="cpu"), found).device == "cpu"


@pytest.mark.parametrize(
    ("nodes", "has"),
    [
        (slice_of("a", "4x4", 0, 1, 2, 3), r"16 TPU chips on 4 nodes, as slice a \(4 hosts\)\."),
        (
            [*slice_of("b", "2x2", 0), *slice_of("a", "2x2", 0)],
            r"8 TPU chips on 2 nodes, as slices a \(1 host\), b \(1 host\)\.",
        ),
    ],
    ids=["a part of a slice", "parts of two slices"],
)
def test_slices_of_another_size_are_named_at_once(nodes: list[Node], has: str) -> None:
    with pytest.raises(CapacityError, match=has):
        check_capacity(TWO_TPU_HOSTS, Cluster(nodes=tuple(nodes), maxima={}))
    check_capacity(TWO_TPU_HOSTS, Cluster(nodes=tuple(nodes), maxima={"TPU": 24, "CPU": 99}))


def test_slice_of_the_right_size_that_lacks_a_host_is_waited_for() -> None:
    nodes = [*slice_of("a", "2x4", 0), *slice_of("b", "2x4", 1)]
    check_capacity(TWO_TPU_HOSTS, Cluster(nodes=tuple(nodes), maxima={}))


def test_rank_of_a_node_is_its_tpu_worker_or_what_the_command_line_said() -> None:
    labels = {NODE_RANK_LABEL: "3"}
    assert Node(node_id="", address="", resources={}, labels=labels).rank == 3
    assert tpu_host("a", 2).rank == 2
    assert Node(node_id="", address="", resources={}, labels={}).rank is None


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
class TestClaims:
    async def test_hosts_in_use_are_waited_for_and_the_wait_is_told(self) -> None:
        num_cpus = int(ray.cluster_resources()["CPU"])
        everything = config(device="cpu", nnodes=2 * num_cpus, tp_size=2 * num_cpus)
        notes: list[str] = []
        first = await claim_hosts(everything, on_wait=notes.append, timeout_s=20)
        assert first.is_intact(read_cluster())
        with pytest.raises(EngineError, match=r"within 1 s: in use by others"):
            await claim_hosts(everything, on_wait=notes.append, timeout_s=1)
        assert any("in use by others, or not started yet" in note for note in notes)
        waiting = asyncio.create_task(claim_hosts(everything, on_wait=notes.append, timeout_s=30))
        first.release()
        second = await waiting
        second.release()

    async def test_released_claim_is_not_intact(self) -> None:
        claim = await claim_hosts(config(device="cpu"), on_wait=lambda note: None, timeout_s=20)
        found = read_cluster()
        gone = Cluster(nodes=(), maxima={})
        assert claim.is_intact(found)
        assert not claim.is_intact(gone)
        claim.release()
        assert not claim.is_intact(found)

    async def test_claim_on_a_node_that_does_not_exist_is_not_granted(self) -> None:
        (nowhere,) = tpu_slices(cluster_of(tpu_host("nowhere", topology="2x2")))
        claim = Claim.on_slice(need_of(config(device="tpu", tp_size=4)), nowhere)
        assert not claim.is_granted()
        assert claim.node_ids() == []
        claim.release()

    async def test_claim_avoids_nodes_and_breaks_when_it_is_released(self) -> None:
        everywhere = frozenset(node.node_id for node in read_cluster().nodes)
        claim = Claim.anywhere(need_of(config(device="cpu")), avoided=everywhere)
        assert not claim.is_granted()
        assert not claim.is_broken()
        claim.release()
        assert claim.is_broken()
