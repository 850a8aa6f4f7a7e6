"""The TPU slices of a cluster: which of them a gang could take, and what stands in the way.

A slice is hosts that belong together by wire; a host that is alone is one, too. All that is known
here was asked by others: which hosts are silent, and which are in quarantine. Does no I/O.
"""

import enum
import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from cluster.needs import Need
from cluster.nodes import (
    TPU_POD_TYPE_LABEL,
    TPU_SLICE_LABEL,
    TPU_TOPOLOGY_LABEL,
    Cluster,
    Node,
)
from engine.tpu_slice import num_chips_of

_HEAD_RESOURCE = re.compile(r"TPU-.+-head")
_SHAPE = re.compile(r"\d+(x\d+)+")


class SliceState(enum.Enum):
    """What a slice is to a gang that looks for one."""

    IDLE = "idle"
    IN_USE = "in use by others"
    INCOMPLETE = "incomplete"
    SILENT = "silent"
    QUARANTINED = "in quarantine"


@dataclass(frozen=True, slots=True, kw_only=True)
class TpuSlice:
    """A TPU slice of which at least one host lives.

    Attributes:
        name: Its own, or the address of a host without one.
        hosts: Those that live, by worker id.
        num_hosts: Of the whole slice, dead ones included.
        topology: Its chips, as in 4x4; "" where its hosts do not say.
        pod_type: Generation and size, as in v6e-16; "" where its hosts do not say.
    """

    name: str
    hosts: tuple[Node, ...]
    num_hosts: int
    topology: str
    pod_type: str

    @property
    def node_ids(self) -> frozenset[str]:
        return frozenset(host.node_id for host in self.hosts)

    @property
    def head_resource(self) -> str | None:
        """What Ray gives to worker 0 alone: who holds it holds the slice, to Ray's own users."""
        return next(filter(_HEAD_RESOURCE.fullmatch, self.hosts[0].resources), None)

    def bundles(self, need: Need) -> list[dict[str, float]]:
        """What to claim of each host, the slice's head included where all chips are wanted."""
        bundles = [dict(need.bundle) for _ in self.hosts]
        is_whole = self.hosts[0].resources["TPU"] == need.bundle["TPU"]
        if is_whole and self.head_resource is not None:
            bundles[0][self.head_resource] = 1.0
        return bundles

    def fits(self, need: Need) -> bool:
        """Whether it is what is needed, were it whole and free."""
        if self.num_hosts != need.num_hosts or not all(
            host.has(need.bundle) for host in self.hosts
        ):
            return False
        if need.tpu is None:
            return True
        is_kind = self.pod_type.rpartition("-")[0] in ("", need.tpu.kind.pod_type)
        # A single host may be larger than what is wanted of it.
        return is_kind and (self.num_hosts == 1 or self.topology in ("", need.tpu.shape))

    def is_free(self, need: Need) -> bool:
        wanted = zip(self.hosts, self.bundles(need), strict=True)
        return all(host.has_free(bundle) for host, bundle in wanted)

    def __str__(self) -> str:
        return f"{self.name} ({self.num_hosts} {'host' if self.num_hosts == 1 else 'hosts'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceView:
    """A slice that fits, and whether it could be taken; `str` says why not."""

    slice: TpuSlice
    state: SliceState
    note: str

    def __str__(self) -> str:
        return f"{self.slice.name} {self.note}"


def tpu_slices(cluster: Cluster) -> list[TpuSlice]:
    """All slices by name. A slice that is a single host is named by its host where names repeat."""
    members: dict[str, list[Node]] = {}
    for node in cluster.nodes:
        if node.resources.get("TPU", 0) > 0:
            name = node.labels.get(TPU_SLICE_LABEL)
            is_alone = name is None or _num_hosts(node) == 1
            members.setdefault(node.node_id if is_alone or name is None else name, []).append(node)
    return sorted(map(_slice_of, members.values()), key=lambda found: found.name)


def view_slices(
    need: Need,
    cluster: Cluster,
    *,
    silent: Set[str] = frozenset(),
    quarantined: Mapping[str, str] | None = None,
) -> list[SliceView]:
    """Look at the slices that fit, the one to take first.

    Quarantine holds only while there is something else to take or to wait for: a slice that is
    whole, or hosts that the autoscaler may still start.

    Args:
        silent: Ids of nodes that Ray takes for alive and that did not answer.
        quarantined: What to say of nodes in quarantine, by node id.
    """
    quarantined = quarantined or {}
    fitting = [found for found in tpu_slices(cluster) if found.fits(need)]
    views = [_view(found, need, silent) for found in fitting]
    is_sound = any(
        view.state in (SliceState.IDLE, SliceState.IN_USE)
        and view.slice.node_ids.isdisjoint(quarantined)
        for view in views
    )
    if is_sound or may_grow(need, cluster):
        views = [_quarantine(view, quarantined) for view in views]
    return sorted(
        views,
        key=lambda view: (
            view.state is not SliceState.IDLE,
            # Leave larger hosts to those who need them.
            view.slice.hosts[0].resources["TPU"],
            view.slice.name,
        ),
    )


def count_gangs(need: Need, cluster: Cluster, *, cpus_beside: float) -> int:
    """How many gangs the cluster can hold at the same time, its autoscaler's nodes included.

    Whatever else runs there is not looked at: its hosts may become free.

    Args:
        cpus_beside: What each gang takes beside its hosts, where these are made of CPUs.
    """
    if need.device == "cpu":
        cpus = need.num_hosts * need.bundle["CPU"] + cpus_beside
        most = max(cluster.total("CPU"), cluster.maxima.get("CPU", 0))
        return math.floor(most / cpus + 1e-6)
    startable = 0
    if has_such_heads(need, cluster.maxima):
        startable = need.num_bundles_in(cluster.maxima) // need.num_hosts
    if need.device == "tpu":
        whole = [
            found
            for found in tpu_slices(cluster)
            if found.fits(need) and len(found.hosts) == found.num_hosts
        ]
        # A large host holds several small gangs; a slice of several hosts is one gang's.
        return max(
            startable,
            sum(
                min(need.num_bundles_in(host.resources) for host in found.hosts) for found in whole
            ),
        )
    per_node = [need.num_bundles_in(node.resources) for node in cluster.nodes]
    # A gang's hosts are distinct nodes; those of two gangs may share one.
    count = sum(per_node) // need.num_hosts
    while count and sum(min(count, bundles) for bundles in per_node) < count * need.num_hosts:
        count -= 1
    return max(startable, count)


def may_grow(need: Need, cluster: Cluster) -> bool:
    """Whether the cluster's autoscaler may still start such a slice."""
    more = {
        name: cluster.maxima.get(name, 0) - cluster.total(name) * (name == "TPU")
        for name in need.bundle
    }
    return need.num_bundles_in(more) >= need.num_hosts and has_such_heads(need, cluster.maxima)


def has_such_heads(need: Need, maxima: Mapping[str, float]) -> bool:
    """Whether an autoscaler knows slices of the wanted kind; yes where it does not say."""
    heads = set(filter(_HEAD_RESOURCE.fullmatch, maxima))
    return need.tpu is None or not heads or _head_of(need) in heads


def new_host_bundles(need: Need, maxima: Mapping[str, float]) -> list[dict[str, float]]:
    """What to ask an autoscaler for, so that it starts one slice, and of the right kind.

    To an autoscaler every host of a kind has the head that only worker 0 will have. With one kind
    of slice, one head is asked for, as there will be. With several kinds, whose hosts are alike in
    all else, one head would have it start some hosts of each: then every host is asked for a head.
    """
    heads = set(filter(_HEAD_RESOURCE.fullmatch, maxima))
    bundles = [dict(need.bundle) for _ in range(need.num_hosts)]
    head = _head_of(need)
    if head is not None and head in heads:
        for bundle in bundles[: 1 if len(heads) == 1 else None]:
            bundle[head] = 1.0
    return bundles


def _head_of(need: Need) -> str | None:
    """The resource of worker 0 of the wanted slice, if it is known which that is."""
    return None if need.tpu is None else f"TPU-{need.tpu.pod_type}-head"


def _slice_of(nodes: list[Node]) -> TpuSlice:
    hosts = sorted(nodes, key=lambda node: (node.rank is None, node.rank or 0, node.node_id))
    labels = hosts[0].labels
    return TpuSlice(
        name=labels.get(TPU_SLICE_LABEL, hosts[0].address),
        hosts=tuple(hosts),
        num_hosts=_num_hosts(hosts[0]) or len(hosts),
        topology=labels.get(TPU_TOPOLOGY_LABEL, ""),
        pod_type=labels.get(TPU_POD_TYPE_LABEL, ""),
    )


def _num_hosts(node: Node) -> int | None:
    """Hosts of the whole slice by its topology; None if the node does not say."""
    shape = node.labels.get(TPU_TOPOLOGY_LABEL, "")
    if not _SHAPE.fullmatch(shape):
        return None
    return max(1, -(-num_chips_of(shape) // int(node.resources["TPU"])))


def _view(found: TpuSlice, need: Need, silent: Set[str]) -> SliceView:
    answering = tuple(host for host in found.hosts if host.node_id not in silent)
    mute = [host.address for host in found.hosts if host.node_id in silent]
    # A host that came back may stand beside its dead self.
    num_places = len({host.rank if host.rank is not None else host.node_id for host in answering})
    if len(answering) == num_places == found.num_hosts:
        whole = replace(found, hosts=answering)
        state = SliceState.IDLE if whole.is_free(need) else SliceState.IN_USE
        return SliceView(slice=whole, state=state, note=f"is {state.value}")
    if mute:
        return SliceView(
            slice=found, state=SliceState.SILENT, note=f"has silent hosts: {', '.join(mute)}"
        )
    return SliceView(
        slice=found,
        state=SliceState.INCOMPLETE,
        note=f"lacks hosts ({len(answering)} of {found.num_hosts} are there)",
    )


def _quarantine(view: SliceView, quarantined: Mapping[str, str]) -> SliceView:
    reasons = [quarantined[node_id] for node_id in view.slice.node_ids if node_id in quarantined]
    if not reasons or view.state not in (SliceState.IDLE, SliceState.IN_USE):
        return view
    return SliceView(
        slice=view.slice,
        state=SliceState.QUARANTINED,
        note=f"is {SliceState.QUARANTINED.value}: {reasons[0]}",
    )
