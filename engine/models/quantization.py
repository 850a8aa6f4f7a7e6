"""Linear weights as 8-bit integers: half the bytes of bfloat16, and integer products.

A weight row (one output) has one scale, and so does each token's activation row, found as it comes:
both lie in -127..127 times their scale, products are summed exactly in int32, and only the sum is
scaled back. Exact sums make the result independent of the tensor-parallel size. After LLM.int8
(arXiv:2208.07339), without its outlier columns. What chooses among experts stays as it is.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from engine.kernels.packed_weight import PackedWeight, products

Quantization = Literal["none", "int8"]

_LARGEST = 127.0
# Below any scale of real weights; keeps rows of zeros (padding) from dividing by zero.
_SMALLEST_SCALE = 1e-20
# Outputs of the maps that route: few weights, and rounded they would choose other experts.
_ROUTING_AXES = ("experts", "shared_gate")


def is_quantized(axes: tuple[str, ...]) -> bool:
    """Whether a parameter whose axes mean that becomes integers."""
    return len(axes) > 1 and axes[-2] not in _ROUTING_AXES


def quantize_rows(x: jax.Array, *, axis_name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Round each row to int8 with a scale of its own.

    Args:
        x: [..., D], floating.
        axis_name: Within `jax.shard_map`, of the mesh's axis over which the rows' parts lie.

    Returns:
        int8 [..., D], and float32 [...]: what the integers are to be multiplied by.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    scale = jnp.maximum(largest / _LARGEST, _SMALLEST_SCALE)
    return jnp.round(wide / scale[..., None]).astype(jnp.int8), scale


def quantize_weight(weight_FD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise a weight of [out, in], or such weights of experts, where it lies.

    Returns:
        int8 [out, in], sharded as the weight is, and float32 [out], sharded as its rows are.
    """
    sharding = weight_FD.sharding
    assert isinstance(sharding, NamedSharding)
    return _quantize_sharded(weight_FD, (sharding, _row_sharding(sharding, weight_FD.ndim)))


def quantized_shapes(
    shape: tuple[int, ...], sharding: NamedSharding
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What `quantize_weight` makes of a weight of that shape."""
    row_sharding = _row_sharding(sharding, len(shape))
    return (
        jax.ShapeDtypeStruct(shape, jnp.int8, sharding=sharding),
        jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=row_sharding),
    )


def _row_sharding(sharding: NamedSharding, num_axes: int) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: num_axes - 1]))


@partial(jax.jit, static_argnames="shardings")
def _quantize_sharded(
    weight_FD: jax.Array, shardings: tuple[NamedSharding, NamedSharding]
) -> tuple[jax.Array, jax.Array]:
    quantized_FD, scale_F = quantize_rows(weight_FD)
    return (
        jax.lax.with_sharding_constraint(quantized_FD, shardings[0]),
        jax.lax.with_sharding_constraint(scale_F, shardings[1]),
    )


def quantize_activations(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round each token's row to int8: int8 [T, D], and its scale as float32 [T, 1]."""
    quantized_TD, scale_T = quantize_rows(x_TD)
    return quantized_TD, scale_T[:, None]


def quantized_product(
    x_TD: jax.Array, weight_FD: jax.Array | PackedWeight, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Multiply activations by a quantised weight.

    Returns:
        int32 [T, F], exact, and float32 [T, 1]: the activations' scales. The product of both and
        of the weight's scales is the result.
    """
    quantized_TD, scale_T1 = quantize_activations(x_TD)
    (product_TF,) = products(quantized_TD, [weight_FD], jnp.int32, mesh)
    return product_TF, scale_T1


def dequantize(
    product_TF: jax.Array, scale_T1: jax.Array, scale_F: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Scale the sums of `quantized_product` back."""
    return (product_TF.astype(jnp.float32) * scale_T1 * scale_F[None, :]).astype(dtype)
