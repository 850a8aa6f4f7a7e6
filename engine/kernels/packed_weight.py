"""Weights in the order in which a CPU's product reads them, and that product.

XLA's own product takes weights as [out, in], and nine tenths of its time for a few rows go into
reordering them, in every step. Packed once, they stream from memory as fast as it gives them.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.host_arrays import aligned_zeros, from_device_arrays
from engine.kernels.native.arithmetic import InstructionSet, host_instruction_set
from engine.kernels.native.matmul_source import Output, grouped_matmul_source, matmul_source
from engine.kernels.native.xla_handler import register_handler
from engine.sharding import TENSOR_AXIS

_OUTPUTS: dict[np.dtype, tuple[Output, ...]] = {
    jnp.dtype(jnp.bfloat16): ("float32", "bfloat16"),
    jnp.dtype(jnp.int8): ("int32",),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class JoinedWeight:
    """Stands where a weight was that lies among another one's words, after its outputs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """Weights [F, D] of one or all layers, packed for this machine; or [E, F, D], of experts.

    They are those of one linear map, or of several with the same inputs, side by side: one product
    then reads all of them.

    Attributes:
        words: uint32 [L, panels, D / n, W]: for each panel of W outputs and each n inputs, as many
            as fill 32 bits, a word per output, the first input in its lowest bits. int8 lies there
            with 128 added. On each device the outputs of each map are padded to whole panels and
            inputs to whole words. Of experts [L * E, ...], layer by layer.
        outputs: F of each map, over all devices.
        num_inputs: D, over all devices.
        dtype: Of the weights, and of what they are multiplied by.
        sharded_axis: Of [F, D], the one that goes over the mesh; None if neither does.
        layer: int32: which of the layers is meant; None stands for the first.
    """

    words: jax.Array
    outputs: tuple[int, ...] = field(metadata={"static": True})
    num_inputs: int = field(metadata={"static": True})
    dtype: Literal["bfloat16", "int8"] = field(metadata={"static": True})
    sharded_axis: int | None = field(metadata={"static": True})
    layer: jax.Array | None = None

    def at_layer(self, layer: ArrayLike) -> "PackedWeight":
        return replace(self, layer=jnp.asarray(layer, jnp.int32))

    def product(self, x_TD: jax.Array, dtype: DTypeLike, mesh: Mesh) -> jax.Array:
        """The product with the weights of the one map that these are; as `products`."""
        (out_TF,) = self.products(x_TD, dtype, mesh)
        return out_TF

    def products(self, x_TD: jax.Array, dtype: DTypeLike, mesh: Mesh) -> list[jax.Array]:
        """x W^T for each of the maps.

        Args:
            x_TD: [T, D], of the weights' dtype.
            dtype: int32 for int8, where sums are exact. For bfloat16 float32, or bfloat16, to
                which the float32 sums are rounded.
            mesh: Where the weight lies.

        Returns:
            [T, F] of each, sharded as the weights' outputs are.
        """
        axis = self.sharded_axis

        def shard_products(
            x_TD: jax.Array, words: jax.Array, layer: jax.Array
        ) -> tuple[jax.Array, ...]:
            shard = replace(self, words=words, layer=layer)
            found = shard._products_here(_target(dtype), x_TD, dtype, (layer,), mesh.size)
            return tuple(jax.lax.psum(out, TENSOR_AXIS) if axis == 1 else out for out in found)

        found = jax.shard_map(
            shard_products,
            mesh=mesh,
            in_specs=(P(None, TENSOR_AXIS if axis == 1 else None), self._spec, P()),
            out_specs=(P(None, TENSOR_AXIS if axis == 0 else None),) * len(self.outputs),
            check_vma=False,
        )(x_TD, self.words, self._layer)
        return list(found)

    def grouped_products(
        self, x_PD: jax.Array, starts: jax.Array, dtype: DTypeLike, num_shards: int
    ) -> list[jax.Array]:
        """x W^T for each of the maps, of experts: as `engine.kernels.grouped_product` has it.

        Works on one device's part, within `jax.shard_map` over `partition_specs`.
        """
        return self._products_here(
            _grouped_target(dtype), x_PD, dtype, (self._layer, starts), num_shards
        )

    @property
    def partition_specs(self) -> "PackedWeight":
        """For `jax.shard_map`: how what these weights consist of goes over the mesh."""
        specs: Any = {"words": self._spec, "layer": None if self.layer is None else P()}
        return replace(self, **specs)

    def _products_here(
        self,
        target: str,
        x_TD: jax.Array,
        dtype: DTypeLike,
        arguments: tuple[jax.Array, ...],
        num_shards: int,
    ) -> list[jax.Array]:
        """Multiply one device's inputs by its part of the words."""
        outputs = [
            number // (num_shards if self.sharded_axis == 0 else 1) for number in self.outputs
        ]
        num_inputs = self.words.shape[2] * 4 // x_TD.dtype.itemsize
        if num_inputs > x_TD.shape[1]:
            x_TD = jnp.pad(x_TD, ((0, 0), (0, num_inputs - x_TD.shape[1])))
        panel = self.words.shape[3]
        ends = list(accumulate(_padded(number, panel) for number in outputs))
        # Behind the last map's outputs there is nothing to be written over.
        width = ends[-1] - _padded(outputs[-1], panel) + outputs[-1]
        shape = jax.ShapeDtypeStruct((x_TD.shape[0], width), dtype)
        out = jax.ffi.ffi_call(target, shape)(x_TD, self.words, *arguments)
        if self.dtype == "int8":
            out -= 128 * jnp.sum(x_TD, axis=1, keepdims=True, dtype=jnp.int32)
        starts = [0, *ends[:-1]]
        return [
            out[:, start : start + number] for start, number in zip(starts, outputs, strict=True)
        ]

    def rows(self, ids_T: jax.Array, mesh: Mesh) -> jax.Array:
        """Rows of the weight, as an embedding table gives them: [T, D].

        Args:
            ids_T: int32, below F.
            mesh: Where the weight lies.
        """
        assert self.sharded_axis != 1, "an embedding table is sharded by its vocabulary"
        (num_rows,) = self.outputs
        num_rows //= mesh.size if self.sharded_axis == 0 else 1

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
            return rows_TD[:, : self.num_inputs]

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


def products(
    x_TD: jax.Array,
    weights: Sequence[jax.Array | PackedWeight | JoinedWeight],
    dtype: DTypeLike,
    mesh: Mesh,
) -> list[jax.Array]:
    """x W^T for each weight of the same inputs, [F, D] or packed, whichever way they lie.

    Args:
        x_TD: [T, D], of the weights' dtype.
        weights: Where the first is packed, the others are those that lie with it.
        dtype: Of the results; sums of bfloat16 are taken in float32, and those of int8 in int32.
        mesh: Where the weights lie.
    """
    if isinstance(weights[0], PackedWeight):
        return weights[0].products(x_TD, dtype, mesh)
    return [
        jnp.einsum("TD,FD->TF", x_TD, weight, preferred_element_type=dtype) for weight in weights
    ]


def can_pack(dtype: DTypeLike) -> bool:
    """Whether there is a kernel for this machine's processor and weights of that type."""
    isa = host_instruction_set()
    if isa is None or jnp.dtype(dtype) not in _OUTPUTS:
        return False
    return jnp.dtype(dtype) != jnp.int8 or isa.has_int8_dot


def pack_weights(*maps: list[jax.Array]) -> PackedWeight:
    """Pack linear maps' weights of all layers side by side, and make the product known to XLA.

    Args:
        maps: For each map its weights [F, D] of each layer, or [E, F, D]; alike in type and
            sharding, and all but F in shape. The lists are emptied on the way, so that memory holds
            each weight once, but for the one that is being packed.
    """
    isa = host_instruction_set()
    assert isa is not None, "asked can_pack first"
    first = maps[0][0]
    sharding, num_inputs, dtype = first.sharding, first.shape[-1], first.dtype
    num_layers, outputs = len(maps[0]), tuple(weights[0].shape[-2] for weights in maps)
    num_experts, has_experts = first.shape[0] if first.ndim == 3 else 1, first.ndim == 3
    del first
    for output in _OUTPUTS[dtype]:
        if has_experts:
            _register_grouped(isa, output, _grouped_target(output))
        else:
            _register(isa, output, _target(output))
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    sharded = [axis for axis, name in enumerate(sharding.spec) if name is not None]
    sharded_axis = sharded[0] - has_experts if sharded else None
    shards = [mesh.size if axis == sharded_axis else 1 for axis in (0, 1)]
    panels = [_padded(n // shards[0], isa.panel_outputs) // isa.panel_outputs for n in outputs]
    num_words = -(-num_inputs // shards[1] * dtype.itemsize // 4)
    num_matrices = num_layers * num_experts
    shape = (num_matrices, sum(panels) * shards[0], num_words * shards[1], isa.panel_outputs)
    words_sharding = NamedSharding(mesh, _words_spec(sharded_axis))
    shard_shape = words_sharding.shard_shape(shape)
    packed = {
        device: aligned_zeros(shard_shape, np.uint32)
        for device in words_sharding.addressable_devices
    }
    num_threads = os.cpu_count() or 1
    first_panel = 0
    with ThreadPoolExecutor(num_threads, "pack") as pool:
        for weights, num_panels in zip(maps, panels, strict=True):
            for layer in range(num_layers):
                weight, fills = weights.pop(0), []
                for shard in weight.addressable_shards:
                    data = np.asarray(shard.data)
                    for expert, matrix in enumerate(data if has_experts else [data]):
                        place = packed[shard.device][layer * num_experts + expert]
                        place = place[first_panel : first_panel + num_panels]
                        words_FK = _words(matrix)
                        for part in np.array_split(np.arange(num_panels), num_threads):
                            fills.append(pool.submit(_fill, place, words_FK, part))
                for fill in fills:
                    fill.result()
            first_panel += num_panels
    return PackedWeight(
        words=from_device_arrays(shape, words_sharding, packed),
        outputs=outputs,
        num_inputs=num_inputs,
        dtype="int8" if dtype == jnp.int8 else "bfloat16",
        sharded_axis=sharded_axis,
    )


def _words(weight_FD: np.ndarray) -> np.ndarray:
    """The bits of a weight's rows in words: uint32 [F, D / n], the last one padded with zeros."""
    bits = weight_FD.view(np.uint8) ^ 128 if weight_FD.dtype == np.int8 else weight_FD
    missing = -weight_FD.shape[1] % (4 // weight_FD.dtype.itemsize)
    if missing:
        bits = np.pad(bits, ((0, 0), (0, missing)))
    return np.ascontiguousarray(bits).view(np.uint32)


def _fill(place: np.ndarray, words_FK: np.ndarray, panels: np.ndarray) -> None:
    """Write some panels of a weight: uint32 [panels, words, W], of words [F, words]."""
    width = place.shape[2]
    for panel in panels:
        rows = words_FK[panel * width : (panel + 1) * width]
        place[panel, :, : len(rows)] = rows.T


def _padded(number: int, step: int) -> int:
    return -(-number // step) * step


def _words_spec(sharded_axis: int | None) -> P:
    return P(*(TENSOR_AXIS if axis == sharded_axis else None for axis in (-1, 0, 1)))


def _target(dtype: DTypeLike) -> str:
    return f"qwen_on_ray_packed_product_{jnp.dtype(dtype).name}"


def _grouped_target(dtype: DTypeLike) -> str:
    return f"{_target(dtype)}_of_experts"


@cache
def _register(isa: InstructionSet, output: Output, target: str) -> None:
    register_handler(target, matmul_source(isa, output), num_arguments=3)


@cache
def _register_grouped(isa: InstructionSet, output: Output, target: str) -> None:
    register_handler(target, grouped_matmul_source(isa, output), num_arguments=4)
