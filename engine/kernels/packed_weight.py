"""bfloat16 weights in the order in which a CPU's product reads them, and that product.

XLA's own product takes weights as [out, in], and nine tenths of its time for a few rows go into
reordering them, in every step. Packed once, they stream from memory as fast as it gives them.
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.native.matmul_source import (
    InstructionSet,
    OutputKind,
    host_instruction_set,
    matmul_source,
)
from engine.kernels.native.xla_handler import register_handler
from engine.sharding import TENSOR_AXIS

_OUTPUTS: dict[str, OutputKind] = {"float32": "float", "bfloat16": "bfloat"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One linear map's bfloat16 weights [F, D] of one or all layers, packed for this machine.

    Attributes:
        words: uint32 [L, panels, D / 2, W]: for each panel of W outputs and each pair of inputs,
            a word per output, the first input in its low half. On each device outputs are padded
            to whole panels and inputs to whole pairs, with zeros.
        shape: (F, D), over all devices.
        sharded_axis: Of [F, D], the one that goes over the mesh; None if neither does.
        layer: int32: which of the layers is meant; None stands for the first.
    """

    words: jax.Array
    shape: tuple[int, int] = field(metadata={"static": True})
    sharded_axis: int | None = field(metadata={"static": True})
    layer: jax.Array | None = None

    def at_layer(self, layer: ArrayLike) -> "PackedWeight":
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def product(self, x_TD: jax.Array, dtype: DTypeLike, mesh: Mesh) -> jax.Array:
        """x W^T.

        Args:
            x_TD: bfloat16, [T, D].
            dtype: float32, or bfloat16, to which the float32 sums are rounded.
            mesh: Where the weight lies.

        Returns:
            [T, F], sharded as the weight's outputs are.
        """
        name = _target(dtype)
        axis = self.sharded_axis
        num_outputs = self.shape[0] // (mesh.size if axis == 0 else 1)

        def shard_product(x_TD: jax.Array, words: jax.Array, layer: jax.Array) -> jax.Array:
            if x_TD.shape[1] % 2:
                x_TD = jnp.pad(x_TD, ((0, 0), (0, 1)))
            shape = jax.ShapeDtypeStruct((x_TD.shape[0], num_outputs), dtype)
            out = jax.ffi.ffi_call(name, shape)(x_TD, words, layer)
            return jax.lax.psum(out, TENSOR_AXIS) if axis == 1 else out

        return jax.shard_map(
            shard_product,
            mesh=mesh,
            in_specs=(P(None, TENSOR_AXIS if axis == 1 else None), self._spec, P()),
            out_specs=P(None, TENSOR_AXIS if axis == 0 else None),
            check_vma=False,
        )(x_TD, self.words, self._layer)

    def rows(self, ids_T: jax.Array, mesh: Mesh) -> jax.Array:
        """Rows of the weight, as an embedding table gives them: bfloat16 [T, D].

        Args:
            ids_T: int32, below F.
            mesh: Where the weight lies.
        """
        assert self.sharded_axis != 1, "an embedding table is sharded by its vocabulary"
        num_rows = self.shape[0] // (mesh.size if self.sharded_axis == 0 else 1)

        def shard_rows(ids_T: jax.Array, words: jax.Array, layer: jax.Array) -> jax.Array:
            width = words.shape[3]
            if self.sharded_axis == 0:
                ids_T = ids_T - jax.lax.axis_index(TENSOR_AXIS) * num_rows
            is_here = (ids_T >= 0) & (ids_T < num_rows)
            ids_T = jnp.where(is_here, ids_T, 0)
            words_TK = words[layer, ids_T // width, :, ids_T % width]
            words_TK = jnp.where(is_here[:, None], words_TK, 0)
            if self.sharded_axis == 0:
                words_TK = jax.lax.psum(words_TK, TENSOR_AXIS)
            rows_TD = jax.lax.bitcast_convert_type(words_TK, jnp.bfloat16).reshape(len(ids_T), -1)
            return rows_TD[:, : self.shape[1]]

        return jax.shard_map(
            shard_rows,
            mesh=mesh,
            in_specs=(P(), self._spec, P()),
            out_specs=P(),
            check_vma=False,
        )(ids_T, self.words, self._layer)

    @property
    def _spec(self) -> P:
        return _words_spec(self.sharded_axis)

    @property
    def _layer(self) -> jax.Array:
        return jnp.zeros((), jnp.int32) if self.layer is None else self.layer


def can_pack() -> bool:
    """Whether there is a kernel for this machine's processor."""
    return _instruction_set() is not None


def pack_weights(weights: list[jax.Array]) -> PackedWeight:
    """Pack one linear map's weights of all layers, and make its product known to XLA.

    Args:
        weights: bfloat16 [F, D] of each layer, alike in shape and sharding. The list is emptied
            on the way, so that memory holds each once, but for the one that is being packed.
    """
    isa = _instruction_set()
    assert isa is not None, "asked can_pack first"
    _register_products()
    sharding, (num_outputs, num_inputs) = weights[0].sharding, weights[0].shape
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    sharded = [axis for axis, name in enumerate(sharding.spec) if name is not None]
    sharded_axis = sharded[0] if sharded else None
    shards = [mesh.size if axis == sharded_axis else 1 for axis in (0, 1)]
    num_panels = -(-num_outputs // shards[0] // isa.panel_outputs)
    num_pairs = -(-num_inputs // shards[1] // 2)
    shape = (len(weights), num_panels * shards[0], num_pairs * shards[1], isa.panel_outputs)
    spec = _words_spec(sharded_axis)
    words = jnp.zeros(shape, jnp.uint32, device=NamedSharding(mesh, spec))
    for layer in range(len(weights)):
        words = _put(words, weights.pop(0), np.int32(layer), mesh=mesh, spec=spec)
    return PackedWeight(words=words, shape=(num_outputs, num_inputs), sharded_axis=sharded_axis)


@partial(jax.jit, static_argnames=("mesh", "spec"), donate_argnames="words")
def _put(
    words: jax.Array, weight_FD: jax.Array, layer: jax.Array, *, mesh: Mesh, spec: P
) -> jax.Array:
    def put_shard(words: jax.Array, weight_FD: jax.Array, layer: jax.Array) -> jax.Array:
        num_panels, num_pairs, width = words.shape[1:]
        missing = (num_panels * width - weight_FD.shape[0], num_pairs * 2 - weight_FD.shape[1])
        bits = jax.lax.bitcast_convert_type(weight_FD, jnp.uint16)
        bits = jnp.pad(bits, ((0, missing[0]), (0, missing[1])))
        pairs = jax.lax.bitcast_convert_type(bits.reshape(-1, num_pairs, 2), jnp.uint32)
        panels = pairs.reshape(num_panels, width, num_pairs).transpose(0, 2, 1)
        return jax.lax.dynamic_update_index_in_dim(words, panels, layer, 0)

    return jax.shard_map(
        put_shard,
        mesh=mesh,
        in_specs=(spec, P(*spec[1:3]), P()),
        out_specs=spec,
        check_vma=False,
    )(words, weight_FD, layer)


def _words_spec(sharded_axis: int | None) -> P:
    return P(*(TENSOR_AXIS if axis == sharded_axis else None for axis in (-1, 0, 1)))


def _target(dtype: DTypeLike) -> str:
    return f"qwen_on_ray_packed_product_{jnp.dtype(dtype).name}"


@cache
def _instruction_set() -> InstructionSet | None:
    return host_instruction_set()


def _register_products() -> None:
    isa = _instruction_set()
    assert isa is not None
    for dtype, output in _OUTPUTS.items():
        register_handler(_target(dtype), matmul_source(isa, output), num_arguments=3)
