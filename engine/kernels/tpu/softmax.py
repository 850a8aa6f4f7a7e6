"""The arithmetic that the TPU's attention kernels share: scores, and the sums of a softmax."""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.kernels.tpu.kv_rows import RowLayout
from engine.kernels.tpu.numbers import Number, floor_div, repeat

CLEARED_KEYS = 64
"""Keys that one turn of the loop behind a block's end clears."""

LOWEST_SCORE = -1e30
"""Below every real score, but finite: its difference with itself is 0, not not-a-number."""

_HIGH_HALF = 0xFFFF0000


class Sums(NamedTuple):
    """Running sums of a softmax, float32 [query rows, 128] each.

    Attributes:
        best: Highest score so far, the same in every lane.
        total: Sum of the weights, likewise.
        weighted: Weighted sum of the values.
    """

    best: jax.Array
    total: jax.Array
    weighted: jax.Array

    def where(self, condition: bool | jax.Array, others: "Sums") -> "Sums":
        """These where a condition holds, else others."""
        if isinstance(condition, bool):
            return self if condition else others
        return Sums(
            *(jnp.where(condition, own, other) for own, other in zip(self, others, strict=True))
        )

    def merge(self, other: "Sums") -> "Sums":
        """The sums over both sets of keys."""
        best = jnp.maximum(self.best, other.best)
        own, others = jnp.exp(self.best - best), jnp.exp(other.best - best)
        return Sums(
            best,
            self.total * own + other.total * others,
            self.weighted * own + other.weighted * others,
        )


Steps = Generator[None, None, Sums]
"""Sums, and where other chains may go on meanwhile: after the scores, and after the weights."""

_NUM_STEPS = 3

T = TypeVar("T")


def load_kv(
    ref,
    index: tuple,
    row: int,
    layout: RowLayout,
    *,
    is_single: bool = False,
    num_keys: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a row, [keys, 128] each, in the dtype that they are computed in.

    Of a single token rows lie one after another without a dimension for keys: `is_single`. Else
    `num_keys` are the first ones to take; None = all.
    """

    def rows(first: int) -> jax.Array:
        if is_single:
            return ref[(*index, pl.ds(first, 1))]
        return ref[(*index, first, slice(0, num_keys))]

    words = rows(row)
    if layout.is_float32:
        key, value = words, rows(layout.num_rows + row)
    else:
        key = pltpu.bitcast(words << 16, jnp.float32)
        value = pltpu.bitcast(words & jnp.uint32(_HIGH_HALF), jnp.float32)
    dtype = jnp.float32 if layout.is_float32 else jnp.bfloat16
    return key.astype(dtype), value.astype(dtype)


def clear_behind(ref, index: tuple, layout: RowLayout, valid: Number, num_keys: int) -> None:
    """Zero what lies behind the valid keys of a block, which may be anything.

    Its weights are zero, but zero times not-a-number is none.
    """

    def clear(tile: Number) -> None:
        first = tile * CLEARED_KEYS
        for row in range(layout.num_stored_rows):
            at = *index, row, pl.ds(first, CLEARED_KEYS)
            words = ref[at]
            number = lax.broadcasted_iota(jnp.int32, words.shape, 0) + first
            ref[at] = jnp.where(number < valid, words, jnp.zeros_like(words))

    repeat(num_keys // CLEARED_KEYS, clear, first=floor_div(valid, CLEARED_KEYS))


def scores(
    query: jax.Array, key: jax.Array, *, sm_scale: float, soft_cap: float | None
) -> jax.Array:
    """Scaled scores, float32 [query rows, keys]; with a cap they stay within ± it."""
    return _scaled(dot(query, key, contract=1), sm_scale, soft_cap)


def sums_of_one(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    sm_scale: float,
    soft_cap: float | None,
) -> Sums:
    """The sums over a single key, [1, 128], which every query row sees."""
    product = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), axis=1, keepdims=True)
    score = jnp.broadcast_to(_scaled(product, sm_scale, soft_cap), query.shape)
    weighted = jnp.broadcast_to(value.astype(jnp.float32), query.shape)
    return Sums(score, jnp.ones_like(score), weighted)


def cached_sums(
    query: jax.Array,
    ref,
    index: tuple,
    row: int,
    layout: RowLayout,
    *,
    num_keys: int,
    valid: jax.Array | int,
    oldest: jax.Array | int | None,
    sm_scale: float,
    soft_cap: float | None,
) -> Steps:
    """The sums of one token's queries over a block of cached keys, all of them numbers, in steps.

    Args:
        query: [query rows, 128].
        ref: Where the block lies.
        index: Of the block in it.
        row: Of the layout.
        layout: Of rows.
        num_keys: Of the block, from its first on, that are looked at.
        valid: Keys that exist.
        oldest: Keys up to this number are not seen; None = all are.
        sm_scale, soft_cap: As for `scores`.
    """
    key, value = load_kv(ref, index, row, layout, num_keys=num_keys)
    score = scores(query, key, sm_scale=sm_scale, soft_cap=soft_cap)
    yield
    number = lax.broadcasted_iota(jnp.int32, score.shape, 1)
    is_seen = number < valid
    if oldest is not None:
        is_seen &= number > oldest
    score = jnp.where(is_seen, score, LOWEST_SCORE)
    best = jnp.max(score, axis=1, keepdims=True)
    # Where nothing is seen the best score is the lowest, and its difference with itself is 0.
    weight = jnp.where(is_seen, jnp.exp(score - best), 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    yield
    weighted = dot(weight.astype(value.dtype), value, contract=0)
    return Sums(
        jnp.broadcast_to(best, weighted.shape), jnp.broadcast_to(total, weighted.shape), weighted
    )


def interleave(turns: Sequence[T], steps: Sequence[tuple[int, Callable[[T], None]]]) -> None:
    """Call each step for all turns in order, so many turns behind.

    The compiler keeps to that order so far that one turn's products do not wait for another's
    exponentials.
    """
    for number in range(len(turns) + max(behind for behind, _ in steps)):
        for behind, step in steps:
            if 0 <= number - behind < len(turns):
                step(turns[number - behind])


def interleaved_sums(chains: list[Steps], *, behind: int) -> list[Sums]:
    """The sums of chains of `cached_sums`, each step so many chains behind the one before."""
    found: dict[int, Sums] = {}

    def advance(number: int) -> None:
        try:
            next(chains[number])
        except StopIteration as end:
            found[number] = end.value

    interleave(range(len(chains)), [(step * behind, advance) for step in range(_NUM_STEPS)])
    return [found[number] for number in range(len(chains))]


def _scaled(product: jax.Array, sm_scale: float, soft_cap: float | None) -> jax.Array:
    score = product * sm_scale
    return score if soft_cap is None else soft_cap * jnp.tanh(score / soft_cap)


def dot(left: jax.Array, right: jax.Array, *, contract: int) -> jax.Array:
    """Contract the last dimension of `left` with one of `right`, in float32."""
    precision = lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
    return lax.dot_general(
        left,
        right,
        (((1,), (contract,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
