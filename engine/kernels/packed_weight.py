"""Weights in the order in which a CPU's product reads them, and that product.

XLA's own product takes weights as [out, in], and nine tenths of its time for a few rows go into
reordering them, in every step. Packed once, they stream from memory as fast as it gives them.
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.native.arithmetic import InstructionSet, host_instruction_set
from engine.kernels.native.matmul_source import Output, matmul_source
from engine.kernels.native.xla_handler import register_handler
from engine.sharding import TENSOR_AXIS

_OUTPUTS: dict[np.dtype, tuple[Output, ...]] = {
    jnp.dtype(jnp.bfloat16): ("float32", "bfloat16"),
    jnp.dtype(jnp.int8): ("int32",),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """One linear map's weights [F, D] of one or all layers, packed for this machine.

    Attributes:
        words: uint32 [L, panels, D / n, W]: for each panel of W outputs and each n inputs, as many
            as fill 32 bits, a word per output, the first input in its lowest bits. int8 lies there
            with 128 added. On each device outputs are padded to whole panels and inputs to whole
            words.
        shape: (F, D), over all devices.
        dtype: Of the weights, and of what they are multiplied by.
        sharded_axis: Of [F, D], the one that goes over the mesh; None if neither does.
        layer: int32: which of the layers is meant; None stands for the first.
    """

    words: jax.Array
    shape: tuple[int, int] = field(metadata={"static": True})
    dtype: Literal["bfloat16", "int8"] = field(metadata={"static": True})
    sharded_axis: int | None = field(metadata={"static": True})
    layer: jax.Array | None = None

    def at_layer(self, layer: ArrayLike) -> "PackedWeight":
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def product(self, x_TD: jax.Array, dtype: DTypeLike, mesh: Mesh) -> jax.Array:
        """x W^T.

        Args:
            x_TD: [T, D], of the weights' dtype.
            dtype: int32 for int8, where sums are exact. For bfloat16 float32, or bfloat16, to
                which the float32 sums are rounded.
            mesh: Where the weight lies.

        Returns:
            [T, F], sharded as the weight's outputs are.
        """
        name = _target(dtype)
        axis = self.sharded_axis
        num_outputs = self.shape[0] // (mesh.size if axis == 0 else 1)

        def shard_product(x_TD: jax.Array, words: jax.Array, layer: jax.Array) -> jax.Array:
            num_inputs = words.shape[2] * 4 // x_TD.dtype.itemsize
            if num_inputs > x_TD.shape[1]:
                x_TD = jnp.pad(x_TD, ((0, 0), (0, num_inputs - x_TD.shape[1])))
            shape = jax.ShapeDtypeStruct((x_TD.shape[0], num_outputs), dtype)
            out = jax.ffi.ffi_call(name, shape)(x_TD, words, layer)
            if self.dtype == "int8":
                out -= 128 * jnp.sum(x_TD, axis=1, keepdims=True, dtype=jnp.int32)
            return jax.lax.psum(out, TENSOR_AXIS) if axis == 1 else out

        return jax.shard_map(
            shard_product,
            mesh=mesh,
            in_specs=(P(None, TENSOR_AXIS if axis == 1 else None), self._spec, P()),
            out_specs=P(None, TENSOR_AXIS if axis == 0 else None),
            check_vma=False,
        )(x_TD, self.words, self._layer)

    def rows(self, ids_T: jax.Array, mesh: Mesh) -> jax.Array:
        """Rows of the weight, as an embedding table gives them: [T, D].

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
            kind = jnp.uint8 if self.dtype == "int8" else jnp.bfloat16
            rows_TD = jax.lax.bitcast_convert_type(words_TK, kind).reshape(len(ids_T), -1)
            if self.dtype == "int8":
                rows_TD = jax.lax.bitcast_convert_type(rows_TD ^ 128, jnp.int8)
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


def can_pack(dtype: DTypeLike) -> bool:
    """Whether there is a kernel for this machine's processor and weights of that type."""
    isa = host_instruction_set()
    if isa is None or jnp.dtype(dtype) not in _OUTPUTS:
        return False
    return jnp.dtype(dtype) != jnp.int8 or isa.has_int8_dot


def pack_weights(weights: list[jax.Array]) -> PackedWeight:
    """Pack one linear map's weights of all layers, and make its product known to XLA.

    Args:
        weights: [F, D] of each layer, alike in shape, type and sharding. The list is emptied
            on the way, so that memory holds each once, but for the one that is being packed.
    """
    isa = host_instruction_set()
    assert isa is not None, "asked can_pack first"
    sharding, (num_outputs, num_inputs) = weights[0].sharding, weights[0].shape
    dtype = weights[0].dtype
    for output in _OUTPUTS[dtype]:
        _register(isa, output, _target(output))
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    sharded = [axis for axis, name in enumerate(sharding.spec) if name is not None]
    sharded_axis = sharded[0] if sharded else None
    shards = [mesh.size if axis == sharded_axis else 1 for axis in (0, 1)]
    num_panels = -(-num_outputs // shards[0] // isa.panel_outputs)
    num_words = -(-num_inputs // shards[1] * dtype.itemsize // 4)
    shape = (len(weights), num_panels * shards[0], num_words * shards[1], isa.panel_outputs)
    spec = _words_spec(sharded_axis)
    words = jnp.zeros(shape, jnp.uint32, device=NamedSharding(mesh, spec))
    for layer in range(len(weights)):
        words = _put(words, weights.pop(0), np.int32(layer), mesh=mesh, spec=spec)
    return PackedWeight(
        words=words,
        shape=(num_outputs, num_inputs),
        dtype="int8" if dtype == jnp.int8 else "bfloat16",
        sharded_axis=sharded_axis,
    )


@partial(jax.jit, static_argnames=("mesh", "spec"), donate_argnames="words")
def _put(
    words: jax.Array, weight_FD: jax.Array, layer: jax.Array, *, mesh: Mesh, spec: P
) -> jax.Array:
    def put_shard(words: jax.Array, weight_FD: jax.Array, layer: jax.Array) -> jax.Array:
        num_panels, num_words, width = words.shape[1:]
        in_word = 4 // weight_FD.dtype.itemsize
        missing = (num_panels * width - len(weight_FD), num_words * in_word - weight_FD.shape[1])
        bits = jax.lax.bitcast_convert_type(
            weight_FD, jnp.uint8 if weight_FD.dtype == jnp.int8 else jnp.uint16
        )
        if bits.dtype == jnp.uint8:
            bits ^= 128
        bits = jnp.pad(bits, ((0, missing[0]), (0, missing[1])))
        rows = jax.lax.bitcast_convert_type(bits.reshape(-1, num_words, in_word), jnp.uint32)
        panels = rows.reshape(num_panels, width, num_words).transpose(0, 2, 1)
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
def _register(isa: InstructionSet, output: Output, target: str) -> None:
    register_handler(target, matmul_source(isa, output), num_arguments=3)
