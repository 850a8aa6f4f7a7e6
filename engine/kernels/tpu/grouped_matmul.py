"""Products of rows with their experts' weights on TPUs.

Rows lie sorted by expert, and in tiles. A step of the grid is a visit: one expert's rows in one
tile, all other rows of which it leaves as they are. Experts without rows are not visited, so that
their weights are not read; visits follow each other by expert and by tile, so that each weight is
read once (but for an expert with rows in several tiles, whose weight stays where it is).

    rows of experts   0 0 0 1 | 1 1 1 3 | 3 - - -       tiles of four rows
    visits            0/0  1/0   1/1  3/1   3/2         expert / tile
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from engine.kernels.tpu.kv_rows import LANES

MOST_TILE_ROWS = 128
MOST_WEIGHT_BYTES = 4 * 2**20
"""Of an expert's weight in the vector memory at a time; there are two buffers of it."""

_LEAST_TILE_BYTES = 32
"""Of a tile's rows side by side, in their type: what a register's sublanes hold."""


@dataclass(frozen=True, slots=True)
class Visits:
    """Which expert and tile each step of the grid is for.

    Attributes:
        expert: int32 [V], V more than there can be.
        tile: int32 [V].
        starts: int32 [E + 1]: where each expert's rows begin.
        number: int32 []: how many there are.
        tile_rows: Rows in a tile.
    """

    expert: jax.Array
    tile: jax.Array
    starts: jax.Array
    number: jax.Array
    tile_rows: int


def plan_visits(starts: jax.Array, num_rows: int, dtype: DTypeLike) -> Visits:
    """Plan the visits that all products of the same rows share.

    Args:
        starts: int32 [E + 1]: where each expert's rows begin, and where the last one's end.
        num_rows: In all.
        dtype: Of the rows.
    """
    num_experts = len(starts) - 1
    least = _LEAST_TILE_BYTES // jnp.dtype(dtype).itemsize
    # Twice an expert's share: most of its rows are in one tile, and few of a tile's are others'.
    tile_rows = least
    while tile_rows < min(MOST_TILE_ROWS, 2 * num_rows // num_experts):
        tile_rows *= 2
    first_E = starts[:-1] // tile_rows
    number_E = jnp.where(starts[1:] > starts[:-1], (starts[1:] - 1) // tile_rows - first_E + 1, 0)
    end_E = jnp.cumsum(number_E)
    visit_V = jnp.arange(-(-num_rows // tile_rows) + num_experts, dtype=jnp.int32)
    expert_V = jnp.sum(end_E[None, :] <= visit_V[:, None], axis=1, dtype=jnp.int32)
    expert_V = jnp.minimum(expert_V, num_experts - 1)
    tile_V = (first_E - end_E + number_E)[expert_V] + visit_V
    return Visits(expert_V, tile_V.astype(jnp.int32), starts, end_E[-1], tile_rows)


def grouped_matmul(
    x_PD: jax.Array,
    weight_EFD: jax.Array,
    visits: Visits,
    dtype: DTypeLike,
    *,
    interpret: Any = False,
) -> jax.Array:
    """x W^T, each row with its expert's weight.

    Args:
        x_PD: [P, D], sorted by expert.
        weight_EFD: [E, F, D], of the same dtype.
        visits: Of these rows.
        dtype: Of the result; sums are taken in float32, and those of int8 in int32.
        interpret: As for `pl.pallas_call`; for tests.

    Returns:
        [P, F]; behind the last expert's rows anything may stand.
    """
    num_rows, num_inputs = x_PD.shape
    num_outputs = weight_EFD.shape[1]
    sums = jnp.int32 if x_PD.dtype == jnp.int8 else jnp.float32
    # XLA lays an array of few inputs out with its outputs along the lanes, because nothing is
    # padded then; to have it the other way round would be a copy of all weights in every step.
    is_turned = num_inputs % LANES != 0 and num_outputs % LANES == 0
    most_outputs = MOST_WEIGHT_BYTES // (num_inputs * x_PD.dtype.itemsize) // LANES * LANES
    tile_outputs = min(num_outputs, max(LANES, most_outputs))
    tile_rows = visits.tile_rows
    weight, weight_tile = weight_EFD, (None, tile_outputs, num_inputs)
    if is_turned:
        weight, weight_tile = weight_EFD.mT, (None, num_inputs, tile_outputs)

    def weight_place(column: Any, visit: Any, expert_V: Any, *_: Any) -> tuple[Any, ...]:
        return (expert_V[visit], 0, column) if is_turned else (expert_V[visit], column, 0)

    return pl.pallas_call(
        partial(_visit, tile_rows=tile_rows, is_turned=is_turned, sums=sums),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(-(-num_outputs // tile_outputs), visits.number),
            in_specs=[
                pl.BlockSpec(
                    (tile_rows, num_inputs),
                    lambda _, visit, expert_V, tile_V, *__: (tile_V[visit], 0),
                ),
                pl.BlockSpec(weight_tile, weight_place),
            ],
            out_specs=pl.BlockSpec(
                (tile_rows, tile_outputs),
                lambda column, visit, expert_V, tile_V, *_: (tile_V[visit], column),
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(visits.expert, visits.tile, visits.starts, x_PD, weight)


def _visit(
    expert_V: Any,
    tile_V: Any,
    starts: Any,
    x: Any,
    weight: Any,
    out: Any,
    *,
    tile_rows: int,
    is_turned: bool,
    sums: Any,
) -> None:
    """Multiply a tile's rows by an expert's weight, and keep the rows that are its own."""
    visit = pl.program_id(1)
    expert = expert_V[visit]
    products = jax.lax.dot_general(
        x[...],
        weight[...],
        (((1,), (0 if is_turned else 1,)), ((), ())),
        preferred_element_type=sums,
    )
    row = jax.lax.broadcasted_iota(jnp.int32, products.shape, 0) + tile_V[visit] * tile_rows
    is_own = (row >= starts[expert]) & (row < starts[expert + 1])
    out[...] = jnp.where(is_own, products, out[...].astype(sums)).astype(out.dtype)
