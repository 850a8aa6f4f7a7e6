"""What a gang needs of the cluster, whether the cluster can ever give it, and the claim on it.

Knows nodes, resources and labels; must not know what runs in the bundles.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state as cluster_state
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from engine.config import EngineConfig
from engine.errors import CapacityError, EngineError

logger = logging.getLogger(__name__)

CPUS_PER_HOST_PROCESS = 0.5
"""On CPU hosts: a claim small enough that router, leader and two hosts fit a laptop's two cores."""

NODE_RANK_LABEL = "qwen-on-ray/node-rank"
"""Label of nodes that joined by the command line's --node-rank."""

TPU_WORKER_LABEL = "ray.io/tpu-worker-id"
_TPU_SLICE_LABEL = "ray.io/tpu-slice-name"
_TPU_TOPOLOGY_LABEL = "ray.io/tpu-topology"
_POLL_S = 0.25
_SLICE_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node.

    Attributes:
        resources: All that it has, used or not.
    """

    node_id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def rank(self) -> int | None:
        """The rank that a gang's process on this node must take, if the node has one."""
        for label in (TPU_WORKER_LABEL, NODE_RANK_LABEL):
            if self.labels.get(label, "").isdigit():
                return int(self.labels[label])
        return None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a gang asks for: `num_hosts` bundles, each of `bundle`."""

    device: str
    num_hosts: int
    bundle: Mapping[str, float]

    @property
    def resource(self) -> str:
        return {"tpu": "TPU", "gpu": "GPU", "cpu": "CPU"}[self.device]

    @property
    def is_slice(self) -> bool:
        """Whether the hosts must belong together by wire, as those of one TPU slice do."""
        return self.device == "tpu" and self.num_hosts > 1

    def __str__(self) -> str:
        amount = self.bundle[self.resource]
        what = {"tpu": "TPU chips", "gpu": "GPUs", "cpu": "CPUs"}[self.device]
        hosts = "1 host" if self.num_hosts == 1 else f"{self.num_hosts} hosts"
        text = f"{hosts} with {amount:g} {what}{' each' if self.num_hosts > 1 else ''}"
        if self.is_slice:
            text += f" (one slice of {amount * self.num_hosts:g} chips)"
        return text


def read_cluster() -> Cluster:
    """Ask Ray what the cluster is at present. Blocks for some milliseconds."""
    nodes = tuple(
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    )
    maxima = cluster_state.get_max_resources_from_cluster_config() or {}
    return Cluster(nodes=nodes, maxima={name: float(most) for name, most in maxima.items()})


def resolve_device(config: EngineConfig, cluster: Cluster) -> EngineConfig:
    """Replace device "auto" by what the cluster has, or may get from its autoscaler."""
    if config.device != "auto":
        return config
    for device, resource in (("tpu", "TPU"), ("gpu", "GPU")):
        if cluster.total(resource) + cluster.maxima.get(resource, 0) > 0:
            return config.model_copy(update={"device": device})
    return config.model_copy(update={"device": "cpu"})


def need_of(config: EngineConfig) -> Need:
    """What `config`, its device resolved, asks of the cluster."""
    bundle = {
        "tpu": {"TPU": float(config.devices_per_host), "CPU": 1.0},
        "gpu": {"GPU": float(config.devices_per_host), "CPU": 1.0},
        "cpu": {"CPU": CPUS_PER_HOST_PROCESS},
    }[config.device]
    return Need(device=config.device, num_hosts=config.nnodes, bundle=bundle)


def check_capacity(need: Need, cluster: Cluster) -> None:
    """Check that the cluster can give what is needed, now or after others have let go of it.

    Raises:
        CapacityError: It never can, however long one waits.
    """
    per_node = [_num_bundles(need, node.resources) for node in cluster.nodes]
    # TPU and GPU hosts are distinct machines; processes on CPUs may share one.
    possible = sum(per_node if need.device == "cpu" else (min(1, count) for count in per_node))
    slices = _slices(need, cluster) if need.is_slice else []
    has_slice = any(found.num_hosts == need.num_hosts for found in slices)
    if possible >= need.num_hosts and (has_slice or not need.is_slice):
        return
    if _num_bundles(need, cluster.maxima) >= need.num_hosts:
        return
    what = {"tpu": "TPU chips", "gpu": "GPUs", "cpu": "CPUs"}[need.device]
    num_nodes = len(cluster.nodes)
    has = (
        f"{cluster.total(need.resource):g} {what} on {num_nodes} "
        f"{'node' if num_nodes == 1 else 'nodes'}"
    )
    if slices:
        has += f", as {'slice' if len(slices) == 1 else 'slices'} {', '.join(map(str, slices))}"
    if cluster.maxima:
        has += f", and its autoscaler stops at {cluster.maxima.get(need.resource, 0):g}"
    remedy = (
        "Add CPUs to the cluster or lower --nnodes."
        if need.device == "cpu"
        else "Start a cluster that has them (`ray up`), change --tp-size and "
        "--nnodes, or set --device=cpu."
    )
    raise CapacityError(f"The model needs {need}; this cluster has {has}. {remedy}")


def _num_bundles(need: Need, resources: Mapping[str, float]) -> int:
    """How many of the bundles these resources hold."""
    return min(
        math.floor(resources.get(name, 0) / amount + 1e-6) for name, amount in need.bundle.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """A TPU slice of which at least one host lives.

    Attributes:
        num_hosts: Of the whole slice, dead ones included.
        num_living: Those that could take one of the bundles.
    """

    name: str
    num_hosts: int
    num_living: int

    def __str__(self) -> str:
        return f"{self.name} ({self.num_hosts} {'host' if self.num_hosts == 1 else 'hosts'})"


def _slices(need: Need, cluster: Cluster) -> list[_Slice]:
    """The TPU slices whose hosts are large enough, in order of name."""
    members: dict[str, list[Node]] = {}
    for node in cluster.nodes:
        if _TPU_SLICE_LABEL in node.labels and _num_bundles(need, node.resources) > 0:
            members.setdefault(node.labels[_TPU_SLICE_LABEL], []).append(node)
    return [
        _Slice(name=name, num_hosts=_full_size(nodes), num_living=len(nodes))
        for name, nodes in sorted(members.items())
    ]


def _full_size(nodes: Sequence[Node]) -> int:
    """Hosts of the whole slice by its topology, such as 2x4 chips; those given if it has none."""
    sides = nodes[0].labels.get(_TPU_TOPOLOGY_LABEL, "").split("x")
    if not all(side.isdigit() for side in sides):
        return len(nodes)
    return math.ceil(math.prod(map(int, sides)) / nodes[0].resources["TPU"])


def intact_slices(need: Need, cluster: Cluster) -> list[str]:
    """Names of TPU slices that have all their hosts, as many as are needed, in order of name."""
    return [
        found.name
        for found in _slices(need, cluster)
        if found.num_living == found.num_hosts == need.num_hosts
    ]


class Claim:
    """A placement group with one bundle per host; lives until `release`, or its creator's end.

    That it exists does not mean that it is granted.

    Args:
        slice_name: The TPU slice that all bundles must lie in, or None for any nodes.
    """

    def __init__(self, need: Need, slice_name: str | None = None) -> None:
        self.need = need
        self.slice_name = slice_name
        self.made_s = time.monotonic()
        labels = {} if slice_name is None else {_TPU_SLICE_LABEL: slice_name}
        self.group = placement_group(
            [dict(need.bundle) for _ in range(need.num_hosts)],
            # Spread where hosts are distinct; several processes on one node where it is alone.
            strategy="SPREAD" if need.device == "cpu" else "STRICT_SPREAD",
            bundle_label_selector=[labels] * need.num_hosts,
        )

    def is_granted(self) -> bool:
        return placement_group_table(self.group).get("state") == "CREATED"

    def is_intact(self, cluster: Cluster) -> bool:
        """Whether every bundle lies on a living node. A broken group never heals by itself."""
        on_nodes = placement_group_table(self.group).get("bundles_to_node_id", {}).values()
        living = {node.node_id for node in cluster.nodes}
        return self.is_granted() and living.issuperset(on_nodes)

    def release(self) -> None:
        remove_placement_group(self.group)


async def claim_hosts(
    config: EngineConfig, *, on_wait: Callable[[str], None], timeout_s: float
) -> Claim:
    """Wait for the hosts that `config` needs, and claim them.

    Several TPU hosts are claimed by the name of a slice that has all of them, one slice after the
    other: Ray itself would also pick a slice with a dead host, and wait there for ever. Where no
    slice is intact the claim names none, so that the autoscaler sees a demand.

    Args:
        on_wait: Told what is waited for, each time that it changes.

    Raises:
        CapacityError: The cluster can never give them.
        EngineError: It did not within `timeout_s`.
    """
    need = need_of(config)
    deadline_s = time.monotonic() + timeout_s
    claim: Claim | None = None
    said = ""
    num_tried = 0
    try:
        while time.monotonic() < deadline_s:
            cluster = await asyncio.to_thread(read_cluster)
            check_capacity(need, cluster)
            slices = intact_slices(need, cluster) if need.is_slice else []
            if claim is not None and need.is_slice and _is_stale(claim, slices):
                claim.release()
                claim = None
            if claim is None:
                name = slices[num_tried % len(slices)] if slices else None
                num_tried += 1
                claim = await asyncio.to_thread(Claim, need, name)
            is_enough = claim.slice_name is not None or not need.is_slice
            if is_enough and await asyncio.to_thread(claim.is_granted):
                granted, claim = claim, None
                return granted
            note = f"waiting for {need}: " + (
                "no slice has all its hosts at present"
                if need.is_slice and not slices
                else "in use by others, or not started yet"
            )
            if note != said:
                on_wait(note)
                said = note
            await asyncio.sleep(_POLL_S)
    finally:
        if claim is not None:
            claim.release()
    raise EngineError(
        f"The cluster did not give {need} within {timeout_s:.0f} s: they are in use by others, or "
        "its autoscaler has not started them. See `ray status`, or raise --start-timeout-s."
    )


def _is_stale(claim: Claim, slices: list[str]) -> bool:
    """Whether another slice should be asked for: this one broke, or is someone else's."""
    if claim.slice_name is None:
        return bool(slices)
    is_impatient = time.monotonic() - claim.made_s > _SLICE_PATIENCE_S and not claim.is_granted()
    return claim.slice_name not in slices or (is_impatient and len(slices) > 1)
