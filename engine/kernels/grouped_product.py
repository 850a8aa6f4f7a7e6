"""Products in which each row has one of many weights: the experts of a sparse layer.

Rows come sorted by their expert, so that each weight that is wanted is read once, and no other is.
Works on one device's part of the weights, within `jax.shard_map`. Knows no routing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from engine.kernels.packed_weight import JoinedWeight, PackedWeight
from engine.kernels.tpu.grouped_matmul import grouped_matmul, plan_visits

BLOCK_ROWS = 16
"""Rows of one expert that XLA's product on CPUs takes at a time."""

_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def grouped_products(
    x_PD: jax.Array,
    weights: Sequence[jax.Array | PackedWeight | JoinedWeight],
    starts: jax.Array,
    dtype: DTypeLike,
    *,
    platform: str,
    num_shards: int,
) -> list[jax.Array]:
    """x W^T for each weight of the same inputs, each row with its expert's.

    Args:
        x_PD: [P, D], of the weights' dtype, sorted by expert.
        weights: [E, F, D], or packed; where the first is packed, the others are those that lie
            with it.
        starts: int32 [E + 1]: where each expert's rows begin, and where the last one's end.
        dtype: Of the results; sums of bfloat16 are taken in float32, and those of int8 in int32.
        platform: Of the device.
        num_shards: Over how many devices each weight goes.

    Returns:
        [P, F] of each; behind the last expert's rows anything may stand. A row's result does not
        depend on the others.
    """
    if isinstance(weights[0], PackedWeight):
        return weights[0].grouped_products(x_PD, starts, dtype, num_shards)
    arrays = [weight for weight in weights if isinstance(weight, jax.Array)]
    if platform == "cpu":
        return [_product_by_blocks(x_PD, weight, starts, dtype) for weight in arrays]
    if platform == "tpu":
        visits = plan_visits(starts, len(x_PD), x_PD.dtype)
        return [grouped_matmul(x_PD, weight, visits, dtype) for weight in arrays]
    return [
        jax.lax.ragged_dot_general(
            x_PD, weight, jnp.diff(starts), _BY_EXPERT, preferred_element_type=jnp.dtype(dtype)
        )
        for weight in arrays
    ]


def _product_by_blocks(
    x_PD: jax.Array, weight_EFD: jax.Array, starts: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """A loop over blocks of one expert's rows, as many as there are.

    On CPUs XLA would make of `ragged_dot` a product of all rows with all experts.
    """
    num_rows = len(x_PD)
    num_blocks_E = -(-jnp.diff(starts) // BLOCK_ROWS)
    last_E = jnp.cumsum(num_blocks_E)
    x_PD = jnp.pad(x_PD, ((0, BLOCK_ROWS), (0, 0)))

    def add_block(block: jax.Array, out_PF: jax.Array) -> jax.Array:
        expert = jnp.sum(last_E <= block)
        first = starts[expert] + (block - last_E[expert] + num_blocks_E[expert]) * BLOCK_ROWS
        rows = jax.lax.dynamic_slice_in_dim(x_PD, first, BLOCK_ROWS)
        product = jnp.einsum("TD,FD->TF", rows, weight_EFD[expert], preferred_element_type=dtype)
        # What it writes behind the expert's last row is the next expert's, whose turn is later.
        return jax.lax.dynamic_update_slice_in_dim(out_PF, product, first, axis=0)

    nothing = jnp.zeros((num_rows + BLOCK_ROWS, weight_EFD.shape[1]), dtype)
    return jax.lax.fori_loop(0, last_E[-1], add_block, nothing)[:num_rows]
