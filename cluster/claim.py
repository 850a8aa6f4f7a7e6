"""A claim on hosts: a placement group with one bundle for each host of a gang.

Knows Ray's placement groups; which hosts to claim is decided by others.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Self

from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.needs import Need
from cluster.nodes import NODE_ID_LABEL, Cluster
from cluster.slices import TpuSlice, new_host_bundles


class Claim:
    """A placement group with one bundle per host; lives until `release`, or its creator's end.

    That it exists does not mean that it is granted, and one that has broken never heals by itself:
    Ray would look for the missing host for ever.

    Attributes:
        slice: The TPU slice whose hosts it names, in the order of its bundles; None for any nodes.
        avoided: Ids of nodes that it does not take.
    """

    def __init__(
        self,
        need: Need,
        bundles: Sequence[Mapping[str, float]],
        selectors: Sequence[Mapping[str, str]],
        *,
        tpu_slice: TpuSlice | None = None,
        avoided: Set[str] = frozenset(),
    ) -> None:
        self.need = need
        self.slice = tpu_slice
        self.avoided = avoided
        self.group = placement_group(
            [dict(bundle) for bundle in bundles],
            # Spread where hosts are distinct; several processes on one node where it is alone.
            strategy="SPREAD" if need.device == "cpu" else "STRICT_SPREAD",
            bundle_label_selector=[dict(selector) for selector in selectors],
        )

    @classmethod
    def on_slice(cls, need: Need, tpu_slice: TpuSlice) -> Self:
        """Claim the hosts of a slice, bundle by bundle: each is a node that was found to live.

        One group holds the hosts and the slice's head, all or nothing. To Ray's own users the head
        stands for the slice (`ray.util.tpu.slice_placement_group`): while it is taken they look for
        another one, in place of reserving a head whose hosts they will not get.
        """
        selectors = [{NODE_ID_LABEL: host.node_id} for host in tpu_slice.hosts]
        return cls(need, tpu_slice.bundles(need), selectors, tpu_slice=tpu_slice)

    @classmethod
    def anywhere(cls, need: Need, *, avoided: Set[str] = frozenset()) -> Self:
        """Claim bundles wherever Ray finds room for them, save on the nodes to avoid."""
        bundles = [need.bundle] * need.num_hosts
        return cls(need, bundles, _all_but(need, avoided), avoided=avoided)

    @classmethod
    def on_new_hosts(cls, need: Need, cluster: Cluster) -> Self:
        """Ask for a slice that is not there yet: a demand that Ray's autoscaler sees.

        It takes no host that is there, none of which will do; nor does it tell one slice from
        another, so that it is to be released, granted or not, for a claim on a slice.
        """
        there = frozenset(
            node.node_id for node in cluster.nodes if node.resources.get("TPU", 0) > 0
        )
        bundles = new_host_bundles(need, cluster.maxima)
        return cls(need, bundles, _all_but(need, there), avoided=there)

    def is_granted(self) -> bool:
        return self._state() == "CREATED"

    def is_broken(self) -> bool:
        """Whether it was granted once and will never be again."""
        return self._state() in ("RESCHEDULING", "REMOVED")

    def node_ids(self) -> list[str]:
        """The node of each bundle; empty before it is granted."""
        nodes = placement_group_table(self.group).get("bundles_to_node_id", {})
        return [nodes[index] for index in sorted(nodes)] if self.is_granted() else []

    def is_intact(self, cluster: Cluster) -> bool:
        """Whether every bundle lies on a node that Ray takes for alive."""
        living = {node.node_id for node in cluster.nodes}
        return self.is_granted() and living.issuperset(self.node_ids())

    def release(self) -> None:
        remove_placement_group(self.group)

    def _state(self) -> str:
        return str(placement_group_table(self.group).get("state"))


def _all_but(need: Need, avoided: Set[str]) -> list[dict[str, str]]:
    selector = {NODE_ID_LABEL: f"!in({','.join(sorted(avoided))})"} if avoided else {}
    return [selector] * need.num_hosts
