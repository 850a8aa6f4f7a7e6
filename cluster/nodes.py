"""The nodes of a Ray cluster as they are at one moment, and the labels that they carry.

Must not know what anybody wants of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray._private import state as ray_state

NODE_RANK_LABEL = "qwen-on-ray/node-rank"
"""Label of nodes that joined by the command line's --node-rank."""

NODE_ID_LABEL = "ray.io/node-id"
TPU_WORKER_LABEL = "ray.io/tpu-worker-id"
TPU_SLICE_LABEL = "ray.io/tpu-slice-name"
TPU_TOPOLOGY_LABEL = "ray.io/tpu-topology"
TPU_POD_TYPE_LABEL = "ray.io/tpu-pod-type"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that Ray takes for alive, which it does for up to a minute after a host's end.

    Attributes:
        address: Of its raylet.
        hostname: Of its machine, as people know it.
        port: Of its raylet.
        resources: All that it has, used or not.
        available: What nobody uses; None for all of it, as of a node that has just joined.
    """

    node_id: str
    address: str
    hostname: str = ""
    port: int = 0
    resources: Mapping[str, float]
    available: Mapping[str, float] | None = None
    labels: Mapping[str, str]

    @property
    def rank(self) -> int | None:
        """The rank that a gang's process on this node must take, if the node has one."""
        for label in (TPU_WORKER_LABEL, NODE_RANK_LABEL):
            if self.labels.get(label, "").isdigit():
                return int(self.labels[label])
        return None

    def has(self, bundle: Mapping[str, float]) -> bool:
        """Whether it has such resources, used or not."""
        return all(self.resources.get(name, 0) >= amount for name, amount in bundle.items())

    def has_free(self, bundle: Mapping[str, float]) -> bool:
        """Whether nobody uses such resources of it."""
        free = self.resources if self.available is None else self.available
        return all(free.get(name, 0) >= amount for name, amount in bundle.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a cluster is at one moment.

    Attributes:
        maxima: What its autoscaler may bring it to, by resource; empty without an autoscaler.
    """

    nodes: tuple[Node, ...]
    maxima: Mapping[str, float]

    def total(self, resource: str) -> float:
        return sum(node.resources.get(resource, 0) for node in self.nodes)


def read_cluster() -> Cluster:
    """Ask Ray what the cluster is at present. Blocks for some milliseconds."""
    available = ray_state.available_resources_per_node()
    nodes = tuple(
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            port=node["NodeManagerPort"],
            resources=node["Resources"],
            available=available.get(node["NodeID"]),
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    maxima = ray_state.state.get_max_resources_from_cluster_config() or {}
    return Cluster(nodes=nodes, maxima={name: float(most) for name, most in maxima.items()})
