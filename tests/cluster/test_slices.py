"""Which slice a gang takes, over clusters that are values."""

import logging
from dataclasses import replace
from typing import Any

import pytest
from fake_slices import cluster_of, slice_of, tpu_host
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2, common_pb2

from cluster.needs import Need, need_of
from cluster.nodes import Cluster, Node
from cluster.slices import SliceState, count_gangs, new_host_bundles, tpu_slices, view_slices
from engine.config import EngineConfig


def need(**fields: Any) -> Need:
    return need_of(EngineConfig.model_validate({"model_path": "m", "device": "tpu", **fields}))


autoscaler: Any = autoscaler_pb2
common: Any = common_pb2
TWO_HOSTS = need(nnodes=2, tp_size=8)
FOUR_CHIPS = need(tp_size=4)


def states(*views: Any) -> dict[str, SliceState]:
    return {view.slice.name: view.state for view in views}


def test_whole_and_free_slice_comes_first_and_the_others_say_why_not() -> None:
    views = view_slices(
        TWO_HOSTS,
        cluster_of(
            slice_of("a", "2x4", used=4),
            slice_of("b", "2x4", 1),
            slice_of("c", "2x4"),
            slice_of("d", "4x4"),
        ),
    )
    assert views[0].slice.name == "c"
    assert states(*views) == {
        "a": SliceState.IN_USE,
        "b": SliceState.INCOMPLETE,
        "c": SliceState.IDLE,
    }, "a slice of another size is none that could be waited for"
    assert [str(view) for view in views[1:]] == [
        "a is in use by others",
        "b lacks hosts (1 of 2 are there)",
    ]


def test_slice_is_in_use_as_soon_as_one_host_or_its_head_is() -> None:
    first, second = slice_of("a", "2x4")
    used = tpu_host("a", 1, "2x4", used=1)
    assert states(*view_slices(TWO_HOSTS, cluster_of(first, used))) == {"a": SliceState.IN_USE}
    assert first.available is not None
    headless = replace(first, available={**first.available, "TPU-v6e-8-head": 0.0})
    assert states(*view_slices(TWO_HOSTS, cluster_of(headless, second))) == {"a": SliceState.IN_USE}


def test_host_that_does_not_answer_makes_its_slice_silent() -> None:
    cluster = cluster_of(slice_of("a", "2x4"), slice_of("b", "2x4"))
    views = view_slices(TWO_HOSTS, cluster, silent={"a-1"})
    assert states(*views) == {"a": SliceState.SILENT, "b": SliceState.IDLE}
    assert str(views[1]) == f"a has silent hosts: {cluster.nodes[2].address}"


def test_host_that_came_back_is_told_from_its_dead_self() -> None:
    hosts = slice_of("a", "2x4")
    ghost = replace(hosts[1], node_id="ghost")
    cluster = cluster_of(hosts, ghost)
    assert states(*view_slices(TWO_HOSTS, cluster)) == {"a": SliceState.INCOMPLETE}
    (view,) = view_slices(TWO_HOSTS, cluster, silent={"ghost"})
    assert view.state is SliceState.IDLE
    assert [host.node_id for host in view.slice.hosts] == ["a-0", "a-1"]


def test_hosts_are_in_the_order_of_their_worker_ids_and_the_first_brings_the_head() -> None:
    hosts = slice_of("a", "4x8", *reversed(range(8)))
    (found,) = tpu_slices(cluster_of(hosts))
    assert [host.rank for host in found.hosts] == list(range(8))
    bundles = found.bundles(need(nnodes=8, tp_size=32))
    assert bundles == [{"TPU": 4, "CPU": 1, "TPU-v6e-32-head": 1}, *[{"TPU": 4, "CPU": 1}] * 7]


def test_named_slice_must_have_its_generation_and_its_shape() -> None:
    cluster = cluster_of(
        slice_of("square", "4x4"),
        slice_of("long", "2x8"),
        [tpu_host("old", rank, "4x4", pod_type="v5litepod-16") for rank in range(4)],
    )
    assert len(view_slices(need(tp_size=16, nnodes=4), cluster)) == 3
    assert states(*view_slices(need(tpu="v6e:4x4"), cluster)) == {"square": SliceState.IDLE}
    assert states(*view_slices(need(tpu="v5e:4x4"), cluster)) == {"old": SliceState.IDLE}


def test_single_host_is_taken_alone_and_never_out_of_a_larger_slice() -> None:
    cluster = cluster_of(
        slice_of("pod", "4x4"),
        tpu_host("large", 0, "2x4", chips=8),
        slice_of("small", "2x2"),
        tpu_host(None, None),
    )
    names = [view.slice.name for view in view_slices(FOUR_CHIPS, cluster)]
    assert names == ["10.0.45.0", "small", "large"], "larger hosts are left to who needs them"
    assert states(*view_slices(need(tp_size=8), cluster)) == {"large": SliceState.IDLE}


def test_hosts_that_are_slices_of_their_own_may_share_a_name() -> None:
    cluster = cluster_of(
        tpu_host("pool", 0, "2x2", used=4), tpu_host("pool", 0, "2x2"), tpu_host("pool", 0, "2x2")
    )
    nodes = [replace(node, node_id=str(index)) for index, node in enumerate(cluster.nodes)]
    found = view_slices(FOUR_CHIPS, cluster_of(nodes))
    assert [view.state for view in found] == [SliceState.IDLE, SliceState.IDLE, SliceState.IN_USE]


def test_engine_of_one_chip_takes_a_part_of_a_host_without_its_head() -> None:
    host = tpu_host("a", 0, "2x2", used=3, pod_type="v6e-4")
    (view,) = view_slices(need(tp_size=1), cluster_of(host))
    assert view.state is SliceState.IDLE
    assert view.slice.bundles(need(tp_size=1)) == [{"TPU": 1, "CPU": 1}]
    assert view.slice.bundles(FOUR_CHIPS) == [{"TPU": 4, "CPU": 1, "TPU-v6e-4-head": 1}]


@pytest.mark.parametrize("sizes", [(16,), (8, 16)], ids=["one kind", "two kinds"])
def test_rays_autoscaler_starts_one_slice_of_the_right_kind(sizes: tuple[int, ...]) -> None:
    wanted = need(tpu="v6e:4x4")
    kinds = {
        f"v6e-{size}": NodeTypeConfig(
            name=f"v6e-{size}",
            min_worker_nodes=0,
            max_worker_nodes=8,
            resources={"TPU": 4, "CPU": 100, f"TPU-v6e-{size}-head": 1},
        )
        for size in sizes
    }
    head = NodeTypeConfig(name="head", min_worker_nodes=0, max_worker_nodes=0)
    maxima = {name: 32.0 for kind in kinds.values() for name in kind.resources}
    distinct = (ResourceRequestUtil.PlacementConstraintType.ANTI_AFFINITY, "group", "")
    not_in = common.LABEL_OPERATOR_NOT_IN
    demand = autoscaler.GangResourceRequest(
        requests=[
            ResourceRequestUtil.make(bundle, [distinct], [[("ray.io/node-id", not_in, ["there"])]])
            for bundle in new_host_bundles(wanted, maxima)
        ]
    )
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={**kinds, "head": head},
        max_num_nodes=16,
        gang_resource_requests=[demand],
    )
    events: Any = logging.getLogger(__name__)
    log = AutoscalerEventLogger(events)
    reply = ResourceDemandScheduler(log).schedule(request)
    started = {launch.instance_type: launch.count for launch in reply.to_launch}
    assert started == {"v6e-16": 4}


def test_quarantined_slice_is_left_alone_while_another_may_be_had() -> None:
    reason = {"a-1": "host a failed 2 times."}
    both = cluster_of(slice_of("a", "2x4"), slice_of("b", "2x4", used=4))
    views = view_slices(TWO_HOSTS, both, quarantined=reason)
    assert states(*views) == {"a": SliceState.QUARANTINED, "b": SliceState.IN_USE}
    assert any(str(view) == "a is in quarantine: host a failed 2 times." for view in views)

    alone = cluster_of(slice_of("a", "2x4"), slice_of("b", "2x4", 0))
    assert states(*view_slices(TWO_HOSTS, alone, quarantined=reason))["a"] is SliceState.IDLE, (
        "there is no other slice that could ever serve"
    )
    growing = cluster_of(slice_of("a", "2x4"), maxima={"TPU": 16, "CPU": 99})
    assert states(*view_slices(TWO_HOSTS, growing, quarantined=reason)) == {
        "a": SliceState.QUARANTINED
    }
    full = cluster_of(slice_of("a", "2x4"), maxima={"TPU": 8, "CPU": 99})
    assert states(*view_slices(TWO_HOSTS, full, quarantined=reason)) == {"a": SliceState.IDLE}


def nodes_with(*resources: dict[str, float]) -> Cluster:
    nodes = tuple(
        Node(node_id=str(index), address=f"10.0.0.{index}", resources=each, labels={})
        for index, each in enumerate(resources)
    )
    return Cluster(nodes=nodes, maxima={})


def test_gangs_are_counted_by_whole_slices_and_by_what_may_still_come() -> None:
    cluster = cluster_of(
        slice_of("a", "2x4"), slice_of("b", "2x4", 1), slice_of("c", "2x4", used=4)
    )
    assert count_gangs(TWO_HOSTS, cluster, cpus_beside=0.2) == 2
    larger = replace(cluster, maxima={"TPU": 40, "CPU": 400})
    assert count_gangs(TWO_HOSTS, larger, cpus_beside=0.2) == 5
    hosts = nodes_with({"TPU": 8, "CPU": 8}, {"TPU": 4, "CPU": 8}, {"CPU": 8})
    assert count_gangs(FOUR_CHIPS, hosts, cpus_beside=0.2) == 3


def test_hosts_of_one_gang_are_distinct_and_those_of_two_may_share_a_node() -> None:
    two_hosts = need(device="gpu", nnodes=2, tp_size=4)
    large, small = {"GPU": 8.0, "CPU": 8.0}, {"GPU": 2.0, "CPU": 8.0}
    assert count_gangs(two_hosts, nodes_with(large, small), cpus_beside=0.2) == 1
    assert count_gangs(two_hosts, nodes_with(large, large), cpus_beside=0.2) == 4
    assert count_gangs(two_hosts, nodes_with(large), cpus_beside=0.2) == 0


def test_engines_on_cpus_need_a_part_of_one_for_their_leaders_too() -> None:
    two_hosts = need(device="cpu", nnodes=2, tp_size=2)
    assert count_gangs(two_hosts, nodes_with({"CPU": 4.0}), cpus_beside=0.2) == 3
