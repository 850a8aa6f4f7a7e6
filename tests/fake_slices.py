"""TPU hosts without TPUs: as values of a fake cluster, and as real Ray nodes on this machine."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest

from cluster.nodes import Cluster, Node
from cluster.ray_node import start_node

TPU_HOST_FLAGS = ["--num-cpus=1", '--resources={"TPU": 4}', "--object-store-memory=80000000"]
"""Of `ray start` on a host that is to have four chips."""

_START_TIMEOUT_S = 240


def tpu_host(
    name: str | None,
    worker_id: int | None = 0,
    topology: str | None = None,
    *,
    chips: int = 4,
    used: int = 0,
    pod_type: str | None = None,
) -> Node:
    """A host as Ray's table has it; `used` of its chips are someone's."""
    labels = {
        "ray.io/tpu-slice-name": name,
        "ray.io/tpu-worker-id": None if worker_id is None else str(worker_id),
        "ray.io/tpu-topology": topology,
        "ray.io/tpu-pod-type": pod_type,
    }
    resources = {"TPU": float(chips), "CPU": 8.0}
    if worker_id == 0 and pod_type is not None:
        resources[f"TPU-{pod_type}-head"] = 1.0
    return Node(
        node_id=f"{name}-{worker_id}",
        address=f"10.0.{ord((name or '-')[0])}.{worker_id or 0}",
        resources=resources,
        available={**resources, "TPU": float(chips - used)},
        labels={key: value for key, value in labels.items() if value is not None},
    )


def slice_of(name: str, topology: str, *worker_ids: int, used: int = 0) -> list[Node]:
    """Hosts of a slice of v6e with four chips each; of the whole slice where none are named."""
    first, second = map(int, topology.split("x"))
    ids = worker_ids or range(first * second // 4)
    pod_type = f"v6e-{first * second}"
    return [tpu_host(name, each, topology, used=used, pod_type=pod_type) for each in ids]


def cluster_of(*nodes: Sequence[Node] | Node, maxima: Mapping[str, float] | None = None) -> Cluster:
    """A cluster of hosts, and of one node without a TPU."""
    head = Node(node_id="head", address="10.0.0.1", resources={"CPU": 8}, labels={})
    flat = [node for each in nodes for node in ([each] if isinstance(each, Node) else each)]
    return Cluster(nodes=(head, *flat), maxima=maxima or {})


@contextmanager
def real_tpu_host(address: str, name: str, *, pod_type: str = "v6e-4") -> Iterator[None]:
    """A Ray node that joins the cluster at `address` as a slice of one host with four chips."""
    variables = tpu_variables(name, 0, "2x2", pod_type)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setitem(os.environ, variable, value)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        arguments = ["--address", address, *TPU_HOST_FLAGS]
        node = start_node(arguments, labels={}, what="no TPU host", deadline_s=deadline_s)
    try:
        yield
    finally:
        node.stop()


def tpu_variables(name: str, worker_id: int, topology: str, pod_type: str) -> dict[str, str]:
    """What a host of a slice has in its environment, by which Ray knows it."""
    return {
        "TPU_NAME": name,
        "TPU_WORKER_ID": str(worker_id),
        "TPU_ACCELERATOR_TYPE": pod_type,
        "TPU_TOPOLOGY": topology,
        # As a job over several slices, or a webhook, leaves them behind.
        "MEGASCALE_COORDINATOR_ADDRESS": "nowhere:8081",
        "MEGASCALE_NUM_SLICES": "2",
    }
