"""The arithmetic of attention to a block of keys by tiles of queries, scores transposed.

Each step of a tile's chain waits for the one before: scores, weights, their product with the
values. So the chains of all rows, and of several tiles, are written interleaved, each step as many
turns behind the one before as the compiler needs to keep the product unit busy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from engine.kernels.tpu.kv_rows import SUBLANES
from engine.kernels.tpu.numbers import Number
from engine.kernels.tpu.softmax import LOWEST_SCORE, dot, interleave

SLICE_KEYS = 256
"""Of a turn: what the product unit contracts at once."""

_LOG2_E = math.log2(math.e)
_OPENING_KEYS = 128
_FAST_BEHIND = 6
_CAREFUL_BEHIND = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """References to what is multiplied.

    Attributes:
        query: [tiles, rows, queries of a token, tokens, 128], times `query_scale`.
        key: [rows, keys, 128].
        value: [rows, 128, keys], all of them numbers.
        soft_cap: Scores are bent to stay within ±this; None = as they are.
    """

    query: Any
    key: Any
    value: Any
    soft_cap: float | None

    @property
    def num_rows(self) -> int:
        return self.key.shape[0]

    @property
    def slices(self) -> list[slice]:
        num_keys = self.key.shape[1]
        size = min(SLICE_KEYS, num_keys)
        return [slice(first, first + size) for first in range(0, num_keys, size)]

    def scores(self, tile: Number, row: int, keys: slice) -> jax.Array:
        """Scores, float32 [keys, queries], as powers of two."""
        query = self.query[tile, row]
        product = dot(self.key[row, keys], query.reshape(-1, query.shape[-1]), contract=1)
        if self.soft_cap is None:
            return product
        return jnp.tanh(product) * (self.soft_cap * _LOG2_E)

    def weigh(self, row: int, keys: slice, weight: jax.Array) -> jax.Array:
        """The values' sum with such weights, float32 [128, queries]."""
        values = self.value[row, :, keys]
        return dot(values, weight.astype(values.dtype), contract=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSums:
    """References to the running sums of each tile and row, float32.

    Attributes:
        best: [tiles, rows, 1, queries], what exponents are relative to.
        total: [tiles, rows, 8, queries], sums of weights; those of all eight are a query's.
        weighted: [tiles, rows, 128, queries], weighted sum of the values.
    """

    best: Any
    total: Any
    weighted: Any

    def clear(self, tile: Number) -> None:
        self.best[tile] = jnp.full(self.best.shape[1:], LOWEST_SCORE, jnp.float32)
        self.weighted[tile] = jnp.zeros(self.weighted.shape[1:], jnp.float32)

    def output(self, tile: Number, row: int) -> jax.Array:
        """float32 [queries, 128]."""
        total = jnp.sum(self.total[tile, row], axis=0, keepdims=True)
        return (self.weighted[tile, row] * (1.0 / total)).T


def query_scale(sm_scale: float, soft_cap: float | None) -> float:
    """What queries are multiplied by beforehand, so that scores need no factor of their own."""
    return sm_scale * _LOG2_E if soft_cap is None else sm_scale / soft_cap


def find_best(operands: Operands, sums: TileSums, tile: Number) -> None:
    """Take the best score of a few keys for a tile that has none yet and sees the whole block."""
    keys = slice(0, min(_OPENING_KEYS, operands.key.shape[1]))
    for row in range(operands.num_rows):
        score = operands.scores(tile, row, keys)
        sums.best[tile, row] = jnp.max(score, axis=0, keepdims=True)


def attend_fast(operands: Operands, sums: TileSums, first_tile: Number, num_tiles: int) -> None:
    """Attend to a block that all queries see, relative to the best score of the blocks before."""
    turns = _turns(operands, [first_tile + tile for tile in range(num_tiles)])

    def weigh(turn: _Turn) -> None:
        chain = turn.chain
        score = operands.scores(chain.tile, chain.row, turn.keys)
        turn.weight = jnp.exp2(score - sums.best[chain.tile, chain.row])
        chain.total = _added(chain.total, _by_sublane(turn.weight, jnp.sum))
        if turn.is_last:
            sums.total[chain.tile, chain.row] += chain.total

    def multiply(turn: _Turn) -> None:
        chain = turn.chain
        chain.product = _added(chain.product, operands.weigh(chain.row, turn.keys, turn.taken()))
        if turn.is_last:
            sums.weighted[chain.tile, chain.row] += chain.product

    interleave(turns, [(0, weigh), (_FAST_BEHIND, multiply)])


def attend_carefully(
    operands: Operands,
    sums: TileSums,
    first_tile: Number,
    own: list[jax.Array],
    sliding_window: int | None,
) -> None:
    """Attend to a block of which not all queries see everything.

    Args:
        operands, sums: Of the block, and so far.
        first_tile: Of queries.
        own: Of each tile from that on, int32 [1, queries]: the queries' own places among the
            block's keys.
        sliding_window: Positions attended, the query's own included; None = all.
    """
    turns = _turns(operands, [first_tile + number for number in range(len(own))])

    def score(turn: _Turn) -> None:
        chain = turn.chain
        found = operands.scores(chain.tile, chain.row, turn.keys)
        place = lax.broadcasted_iota(jnp.int32, found.shape, 0) + turn.keys.start
        is_seen = place <= own[chain.number]
        if sliding_window is not None:
            is_seen &= place > own[chain.number] - sliding_window
        # Where a query sees nothing yet its best score is the lowest one, and all weights are 1;
        # the first key that it sees takes them out again.
        turn.weight = jnp.where(is_seen, found, LOWEST_SCORE)
        best = _by_sublane(turn.weight, jnp.max)
        chain.best = best if chain.best is None else jnp.maximum(chain.best, best)
        if turn.is_last:
            before = sums.best[chain.tile, chain.row]
            chain.best = jnp.maximum(before, jnp.max(chain.best, axis=0, keepdims=True))
            chain.correction = jnp.exp2(before - chain.best)
            sums.best[chain.tile, chain.row] = chain.best

    def weigh(turn: _Turn) -> None:
        chain = turn.chain
        turn.weight = jnp.exp2(turn.taken() - chain.best)
        chain.total = _added(chain.total, _by_sublane(turn.weight, jnp.sum))
        if turn.is_last:
            total = sums.total[chain.tile, chain.row] * chain.correction
            sums.total[chain.tile, chain.row] = total + chain.total

    def multiply(turn: _Turn) -> None:
        chain = turn.chain
        chain.product = _added(chain.product, operands.weigh(chain.row, turn.keys, turn.taken()))
        if turn.is_last:
            weighted = sums.weighted[chain.tile, chain.row] * chain.correction
            sums.weighted[chain.tile, chain.row] = weighted + chain.product

    # A slice's weights need the best score of all of the chain's slices.
    behind = len(operands.slices) + 1
    interleave(turns, [(0, score), (behind, weigh), (behind + _CAREFUL_BEHIND, multiply)])


@dataclass(slots=True, kw_only=True)
class _Chain:
    """What a tile, with its number among those beside it, and a row have come to in this block."""

    number: int
    tile: Number
    row: int
    best: Any = None
    correction: Any = None
    total: Any = None
    product: Any = None


@dataclass(slots=True, kw_only=True)
class _Turn:
    """A chain and a slice of the block's keys; scores, then weights, [keys, queries]."""

    chain: _Chain
    keys: slice
    is_last: bool
    weight: Any = None

    def taken(self) -> jax.Array:
        weight, self.weight = self.weight, None
        return weight


def _turns(operands: Operands, tiles: list[Number]) -> list[_Turn]:
    slices = operands.slices
    return [
        _Turn(chain=chain, keys=keys, is_last=keys is slices[-1])
        for number, tile in enumerate(tiles)
        for row in range(operands.num_rows)
        for chain in [_Chain(number=number, tile=tile, row=row)]
        for keys in slices
    ]


def _added(before: jax.Array | None, more: jax.Array) -> jax.Array:
    return more if before is None else before + more


def _by_sublane(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce [keys, queries] to [8, queries]: whole registers, element by element."""
    return reduce(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)
