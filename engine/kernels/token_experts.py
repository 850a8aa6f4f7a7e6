"""Which experts a token has, and the sum over them: what is done once a token, not once an expert.

Each in two ways. What XLA makes of the plain one on TPUs computes well enough, but the compiler
takes seconds over each, in every layer; of the other one it takes tenths.
"""

import jax
import jax.numpy as jnp

from engine.kernels.top_scores import top_one_by_one

COUNTED_TOKENS = 128
"""Tokens that are counted by one product with a triangle of ones."""

MOST_GATHERED_BYTES = 16 * 2**20
"""Of rows that are gathered from: beyond, they no longer lie in the vector memory, and over a
gather from outside it the compiler takes longer than over all else of a layer."""

LEAST_COLUMNS = 128


def likeliest_experts(
    probability_TE: jax.Array, num_chosen: int, *, platform: str
) -> tuple[jax.Array, jax.Array]:
    """The likeliest experts of each token: float32 [T, X] and int32 [T, X], likeliest first.

    Args:
        probability_TE: float32, of each expert; of equal ones the first is taken.
        num_chosen: X.
        platform: Of the device.
    """
    if platform != "tpu":
        return jax.lax.top_k(probability_TE, num_chosen)
    return top_one_by_one(probability_TE, num_chosen)


def running_counts(chosen_TE: jax.Array, *, platform: str) -> jax.Array:
    """int32 [T, E]: how many tokens up to each have each expert.

    Args:
        chosen_TE: int32, 0 or 1.
        platform: Of the device.
    """
    num_tokens, num_experts = chosen_TE.shape
    if platform != "tpu" or num_tokens % COUNTED_TOKENS:
        return jnp.cumsum(chosen_TE, axis=0)
    blocks = chosen_TE.astype(jnp.bfloat16).reshape(-1, COUNTED_TOKENS, num_experts)
    ones = jnp.tril(jnp.ones((COUNTED_TOKENS, COUNTED_TOKENS), jnp.bfloat16))
    # Zeros and ones are exact in bfloat16, and sums of them in float32.
    within = jnp.einsum("ts,bse->bte", ones, blocks, preferred_element_type=jnp.float32)
    counts = within.astype(jnp.int32)
    of_block = counts[:, -1:]
    counts += jnp.cumsum(of_block, axis=0) - of_block
    return counts.reshape(num_tokens, num_experts)


def sum_of_experts(
    out_PD: jax.Array, place_TX: jax.Array, weight_TX: jax.Array, *, platform: str
) -> jax.Array:
    """float32 [T, D], the weighted sum of each token's rows.

    Args:
        out_PD: What experts made of their tokens.
        place_TX: int32: where a token's rows are.
        weight_TX: float32.
        platform: Of the device.
    """
    if platform != "tpu":
        out_TXD = out_PD[place_TX].astype(jnp.float32)
        return jnp.sum(out_TXD * weight_TX[:, :, None], axis=1)
    num_rows, num_columns = out_PD.shape
    width = num_columns
    while width % (2 * LEAST_COLUMNS) == 0 and (
        num_rows * width * out_PD.dtype.itemsize > MOST_GATHERED_BYTES
    ):
        width //= 2
    place_XT, weight_XT = place_TX.T, weight_TX.T

    def add_columns(block: jax.Array, sum_TD: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(out_PD, block * width, width, axis=1)
        rows = columns.at[place_XT.reshape(-1)].get(mode="promise_in_bounds")
        of_expert = rows.reshape(*place_XT.shape, width).astype(jnp.float32)
        total = jnp.sum(of_expert * weight_XT[:, :, None], axis=0)
        return jax.lax.dynamic_update_slice_in_dim(sum_TD, total, block * width, axis=1)

    nothing = jnp.zeros((len(place_TX), num_columns), jnp.float32)
    if width == num_columns:
        return add_columns(jnp.int32(0), nothing)
    return jax.lax.fori_loop(0, num_columns // width, add_columns, nothing)
