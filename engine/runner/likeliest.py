"""The likeliest tokens of each row, and the score below which none may be drawn: two ways to them.

On CPUs and GPUs a few hundred candidates are sorted. On TPUs nothing is: the compiler takes longer
over a sort than over all of a model's layers, whereas a pass over logits in its vector memory takes
microseconds. There the likeliest are found one by one, and limits by a search among the bits of
scores. Both give the same results, up to the rounding of sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from engine.kernels.top_scores import top_one_by_one

NUM_CANDIDATES = 256
"""Likeliest tokens that are sorted; limits beyond them are found by searching."""

CANDIDATE_BLOCK = 64

SEARCH_WAYS = 4
"""Parts into which one pass of a search divides what is left."""

NEVER = -1e30
"""Logit of a banned token; finite, because infinities subtracted are not numbers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds the tokens that a row may draw, arrays [R].

    Attributes:
        top_k: int32, 0 = all.
        top_p: float32, 1 = all.
        min_p: float32, 0 = all.
    """

    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeliest:
    """One way to the likeliest tokens.

    Attributes:
        top_scores: (score_RV, count) → the `count` highest scores of each row, highest first, and
            their ids, lowest first where scores are equal.
        lowest_score: (score_RV, limits) → the lowest score that min_p, top_k and top_p let
            through, per row; scores are differences to the likeliest token's, so never positive.
    """

    top_scores: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    lowest_score: Callable[[jax.Array, Limits], jax.Array]


def likeliest_on(platform: str) -> Likeliest:
    """The way that suits a platform, "cpu", "gpu" or "tpu"."""
    return BY_SEARCH if platform == "tpu" else BY_SORT


def _top_by_sort(score_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # The highest `count` numbers lie in the `count` blocks with the highest maxima: only those
    # blocks are sorted through.
    R, V = score_RV.shape
    num_blocks = -(-V // CANDIDATE_BLOCK)
    if num_blocks <= count:
        return jax.lax.top_k(score_RV, count)
    padded_RV = jnp.pad(
        score_RV, ((0, 0), (0, num_blocks * CANDIDATE_BLOCK - V)), constant_values=-jnp.inf
    )
    blocks = padded_RV.reshape(R, num_blocks, CANDIDATE_BLOCK)
    _, block_ids = jax.lax.top_k(jnp.max(blocks, axis=-1), count)
    # In the order of ids, so that equal scores come in that order too.
    block_ids = jnp.sort(block_ids, axis=-1)
    chosen = jnp.take_along_axis(blocks, block_ids[:, :, None], axis=1)
    scores_RC, places = jax.lax.top_k(chosen.reshape(R, count * CANDIDATE_BLOCK), count)
    chosen_block = jnp.take_along_axis(block_ids, places // CANDIDATE_BLOCK, axis=1)
    return scores_RC, chosen_block * CANDIDATE_BLOCK + places % CANDIDATE_BLOCK


Weigh = Callable[[jax.Array], jax.Array]
"""Scores, [R, any] → what each counts in the sum that a limit sets."""

Find = Callable[[Weigh, jax.Array], jax.Array]
"""(weights of scores, wanted_R) → the highest score at and above which weights sum to it, [R]."""


def _lowest_by_sort(score_RV: jax.Array, limits: Limits) -> jax.Array:
    num_candidates = min(NUM_CANDIDATES, score_RV.shape[-1])
    candidate_RC, _ = _top_by_sort(score_RV, num_candidates)

    def find(weigh: Weigh, wanted_R: jax.Array) -> jax.Array:
        weight_RC = weigh(candidate_RC)
        is_enough_RC = jnp.cumsum(weight_RC, axis=-1) >= wanted_R[:, None]
        # Without weight in the last candidate there is none behind it, either; rounding may keep
        # the sum of all just below what is wanted.
        is_among_R = is_enough_RC[:, -1] | (weight_RC[:, -1] == 0)
        is_among_R |= num_candidates == score_RV.shape[-1]
        last_R = jnp.minimum(jnp.sum(~is_enough_RC, axis=-1), num_candidates - 1)
        found_R = jnp.take_along_axis(candidate_RC, last_R[:, None], axis=1)[:, 0]
        return jax.lax.cond(
            jnp.all(is_among_R),
            lambda: found_R,
            lambda: jnp.where(is_among_R, found_R, _search(score_RV, weigh, wanted_R)),
        )

    return _narrow(score_RV, limits, find)


def _lowest_by_search(score_RV: jax.Array, limits: Limits) -> jax.Array:
    return _narrow(score_RV, limits, partial(_search, score_RV))


def _narrow(score_RV: jax.Array, limits: Limits, find: Find) -> jax.Array:
    """The lowest score that min_p lets through, then top_k, then top_p.

    The latter two are the same search, for a number of tokens and for a sum of probabilities, and
    one piece of a program that runs twice.
    """
    vocab_size = score_RV.shape[-1]
    top_k_R = jnp.where(limits.top_k > 0, jnp.minimum(limits.top_k, vocab_size), vocab_size)

    def narrow(turn: jax.Array, floor_R: jax.Array) -> jax.Array:
        is_top_k = turn == 0

        def weigh(score: jax.Array) -> jax.Array:
            weight = jnp.where(is_top_k, 1.0, jnp.exp(score))
            return jnp.where(score >= floor_R[:, None], weight, 0.0)

        def apply() -> jax.Array:
            some_R = limits.top_p * jnp.sum(weigh(score_RV), axis=-1)
            wanted_R = jnp.where(is_top_k, top_k_R.astype(jnp.float32), some_R)
            found_R = find(weigh, jnp.where(is_limited_R, wanted_R, 0.0))
            return jnp.where(is_limited_R, jnp.maximum(floor_R, found_R), floor_R)

        is_limited_R = jnp.where(is_top_k, top_k_R < vocab_size, limits.top_p < 1)
        # No row wants it, no row pays for it.
        return jax.lax.cond(jnp.any(is_limited_R), apply, lambda: floor_R)

    floor_R = jnp.where(limits.min_p > 0, jnp.log(jnp.maximum(limits.min_p, 1e-30)), NEVER)
    return jax.lax.fori_loop(0, 2, narrow, floor_R)


def _search(score_RV: jax.Array, weigh: Weigh, wanted_R: jax.Array) -> jax.Array:
    """The highest score at and above which the weights sum to `wanted_R`, per row.

    Scores are not positive, and the bits of positive floats, read as integers, are in the order of
    the floats: sixteen divisions of that range by four find the score exactly.
    """
    weight_RV = weigh(score_RV)
    depth_RV = jax.lax.bitcast_convert_type(jnp.abs(score_RV), jnp.int32)

    def divide(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_R, high_R = bounds
        # Neither is negative; `//` would be a dozen operations that see to it.
        size_R = jax.lax.div(high_R - low_R, SEARCH_WAYS) + 1
        num_short_R = jnp.zeros_like(low_R)
        for part in range(1, SEARCH_WAYS):
            last_R = low_R + part * size_R - 1
            sum_R = jnp.sum(jnp.where(depth_RV <= last_R[:, None], weight_RV, 0.0), axis=-1)
            num_short_R += sum_R < wanted_R
        low_R = low_R + num_short_R * size_R
        return low_R, jnp.minimum(high_R, low_R + size_R - 1)

    num_passes = -(-31 // (SEARCH_WAYS.bit_length() - 1))
    start = jnp.zeros(wanted_R.shape, jnp.int32), jnp.max(depth_RV, axis=-1)
    depth_R, _ = jax.lax.fori_loop(0, num_passes, divide, start)
    return -jax.lax.bitcast_convert_type(depth_R, jnp.float32)


BY_SORT = Likeliest(top_scores=_top_by_sort, lowest_score=_lowest_by_sort)
BY_SEARCH = Likeliest(top_scores=top_one_by_one, lowest_score=_lowest_by_search)
