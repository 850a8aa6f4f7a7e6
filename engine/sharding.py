"""The device mesh, which array axis goes over it, and how uneven sizes are padded to fit.

Sharding is data: a parameter names its axes by what they mean, `MESH_AXES` says where each goes,
and a `ShardLayout` says which row of the checkpoint each row of a padded axis holds. Knows no
model: sizes come in as numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from engine.errors import CapacityError, ConfigError

TENSOR_AXIS = "tp"

MESH_AXES: dict[str, str | None] = {
    "vocab": TENSOR_AXIS,
    "heads": TENSOR_AXIS,  # query heads times head_dim
    "kv_heads": TENSOR_AXIS,  # key or value heads times head_dim
    "ffn": TENSOR_AXIS,
    "expert_ffn": TENSOR_AXIS,  # of each expert: no device waits for another's experts
    "shared_ffn": TENSOR_AXIS,
    "experts": None,
    "shared_gate": None,  # the one output that weighs the shared expert
    "embed": None,
    "head_dim": None,
    "tokens": TENSOR_AXIS,  # of the residual stream, where it is shared out
}
"""Logical axis → mesh axis; None means that each device holds the whole axis."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShardLayout:
    """Padded sizes for one tp size, and the origin of every padded row.

    With G queries per kv head: each kv head is held r = max(1, tp // K) times, so that every
    device has one; G is padded to a multiple of r, K * r to a multiple of tp. Worked for 9 query
    and 3 kv heads at tp 2 (-1 is a head of zeros, which contributes nothing through o_proj):

        device        0                 1
        kv head       0       1         2       -1
        query heads   0 1 2   3 4 5     6 7 8   -1 -1 -1

    Attributes:
        num_heads: Query heads after padding.
        num_kv_heads: Key-value heads after padding and replication.
        rows: Logical axis → int64 array over the padded axis: the checkpoint's row, or -1 for
            padding.
        sizes: Logical axis → its size in the checkpoint.
    """

    tp_size: int
    num_heads: int
    num_kv_heads: int
    rows: dict[str, np.ndarray]
    sizes: dict[str, int]

    def padded_size(self, axis: str) -> int:
        return len(self.rows[axis])


def make_layout(
    *,
    tp_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    num_experts: int = 0,
    expert_size: int = 0,
    shared_expert_size: int = 0,
) -> ShardLayout:
    """Pad a model's sizes so that `tp_size` devices can share them evenly.

    Those of experts, which few models have, are the number of them in a layer, the width of each
    and of the one that all tokens share.
    """
    group = num_heads // num_kv_heads
    num_replicas = max(1, tp_size // num_kv_heads)
    group_part = -(-group // num_replicas)
    padded_kv_heads = -(-num_kv_heads * num_replicas // tp_size) * tp_size

    kv_sources: list[int] = []
    query_sources: list[int] = []
    for padded_head in range(padded_kv_heads):
        kv_head, replica = divmod(padded_head, num_replicas)
        is_real = kv_head < num_kv_heads
        kv_sources.append(kv_head if is_real else -1)
        for member in range(replica * group_part, (replica + 1) * group_part):
            has_query = is_real and member < group
            query_sources.append(kv_head * group + member if has_query else -1)

    sizes = {
        "vocab": vocab_size,
        "heads": num_heads * head_dim,
        "kv_heads": num_kv_heads * head_dim,
        "ffn": intermediate_size,
        "expert_ffn": expert_size,
        "shared_ffn": shared_expert_size,
        "experts": num_experts,
        "shared_gate": 1,
        "embed": hidden_size,
        "head_dim": head_dim,
    }
    rows = {
        axis: _pad_to_multiple(size, tp_size) if MESH_AXES[axis] else np.arange(size)
        for axis, size in sizes.items()
    } | {
        "heads": _head_rows(query_sources, head_dim),
        "kv_heads": _head_rows(kv_sources, head_dim),
    }
    return ShardLayout(
        tp_size=tp_size,
        num_heads=len(query_sources),
        num_kv_heads=padded_kv_heads,
        rows=rows,
        sizes=sizes,
    )


def _pad_to_multiple(size: int, multiple: int) -> np.ndarray:
    rows = np.full(-(-size // multiple) * multiple, -1, np.int64)
    rows[:size] = np.arange(size)
    return rows


def _head_rows(sources: list[int], head_dim: int) -> np.ndarray:
    heads = np.array(sources, np.int64)[:, None]
    rows = np.where(heads >= 0, heads * head_dim + np.arange(head_dim), -1)
    return rows.reshape(-1)


def make_mesh(tp_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh with its one axis, "tp", over equally many devices of each process.

    Args:
        tp_size: Devices over all hosts.
        devices: JAX devices to choose from; by default all that there are.

    Raises:
        ConfigError: The devices cannot be taken evenly from the processes.
        CapacityError: A process has too few devices.
    """
    devices = jax.devices() if devices is None else devices
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    num_processes = len(by_process)
    if tp_size % num_processes:
        raise ConfigError(
            f"--tp-size={tp_size} does not divide over {num_processes} hosts. "
            f"Use a multiple of {num_processes}."
        )
    per_process = tp_size // num_processes
    for process_index, held in sorted(by_process.items()):
        if len(held) < per_process:
            raise CapacityError(
                f"--tp-size={tp_size} needs {per_process} {held[0].platform} devices on each of "
                f"{num_processes} hosts; host {process_index} has {len(held)}. Lower --tp-size or "
                "add hosts with --nnodes."
            )
    chosen = [device for _, held in sorted(by_process.items()) for device in held[:per_process]]
    if len(chosen) == len(devices):
        # make_mesh orders a whole slice along its interconnect.
        return jax.make_mesh(
            (tp_size,), (TENSOR_AXIS,), axis_types=(AxisType.Auto,), devices=chosen
        )
    return Mesh(np.array(chosen), (TENSOR_AXIS,), axis_types=(AxisType.Auto,))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualStream:
    """How the hidden states between a model's blocks lie: whole on every device, or shared out.

    Shared out over tokens, a sum over devices is a reduce-scatter, norms are computed once and not
    on each device, and the all-gather comes before the next product: the same bytes as one
    all-reduce, in two halves that the compiler can run beside products. A step of few tokens would
    only wait twice. After arXiv:2205.05198, section 4.2.2.

    Attributes:
        mesh: The model's.
        parallel_from: Tokens of a step from which on they are shared out; None = never.
    """

    mesh: Mesh
    parallel_from: int | None = None

    def sharding(self, num_tokens: int) -> NamedSharding:
        """Of [T, D] between the blocks of a step of that many tokens."""
        is_parallel = (
            self.parallel_from is not None
            and num_tokens >= self.parallel_from
            and num_tokens % self.mesh.size == 0
        )
        return named_sharding(self.mesh, ("tokens" if is_parallel else None, "embed"))

    @property
    def whole(self) -> NamedSharding:
        """Of what enters a product: every device has all of it."""
        return named_sharding(self.mesh, (None, "embed"))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Return the sharding of an array whose dimensions mean `axes` (None: not sharded)."""
    return NamedSharding(mesh, PartitionSpec(*(MESH_AXES[axis] if axis else None for axis in axes)))
