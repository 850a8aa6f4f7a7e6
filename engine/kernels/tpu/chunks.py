"""Attention of prompts' chunks on TPUs: many new tokens of a sequence at once.

First the new keys and values go to their pages; meanwhile blocks of queries are attended one after
another, each to all pages up to its own last token, oldest first. There is far more to compute than
to read, so two buffers for blocks of keys are enough: one is computed while the other fills.

Scores are computed transposed, [keys, queries]: the weights, as the product unit's stationary side,
then fill it, while as its moving side they would leave half of it idle beside values of 128 lanes;
and a softmax's sums are one row per tile, not a register per eight queries.

Two ways to attend a tile of queries to a block of keys:

    careful   masked, with a running maximum: blocks that the diagonal, the window or the end cut
    fast      unmasked, exponents relative to the best score of blocks before, or of a few keys: no
              maximum, no correction, and no product waits for another's maximum

A weight may then exceed 1. As floats of eight exponent bits, weights and sums lose nothing by that,
until they near the largest one: where a sum exceeds `MOST_TOTAL`, the whole block of queries is
computed again, the careful way alone.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.kernels.tpu.chunk_softmax import (
    Operands,
    TileSums,
    attend_carefully,
    attend_fast,
    find_best,
    query_scale,
)
from engine.kernels.tpu.chunk_tiles import TokenTiles
from engine.kernels.tpu.kv_rows import LANES, SUBLANES, RowLayout
from engine.kernels.tpu.numbers import (
    Number,
    ceil_div,
    clip,
    floor_div,
    larger,
    remainder,
    repeat,
    smaller,
    unroll,
    where,
)
from engine.kernels.tpu.softmax import clear_behind, load_kv

_TOKENS_STEP = 16

MOST_TOTAL = 2.0**80
"""Of a softmax's weights, relative to that of the best score as it is known to the fast way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkBlocks:
    """How much is computed at once.

    Attributes:
        num_queries: Of a tile, for each row of the cache, about: see `tokens_per_tile`.
        num_tiles: Of a block of queries, for which keys are read once.
        num_keys: Of a block; a multiple of the page size and of `CLEARED_KEYS`.
        num_beside: Tiles whose products are in flight together.
        num_careful: The same, where scores are masked.
    """

    num_queries: int
    num_tiles: int
    num_keys: int
    num_beside: int
    num_careful: int

    def tokens_per_tile(self, queries_per_token: int) -> int:
        """Whole registers of bfloat16, so that a tile's rows are one matrix as they lie."""
        return max(
            _TOKENS_STEP, self.num_queries // queries_per_token // _TOKENS_STEP * _TOKENS_STEP
        )

    def vmem_bytes(self, layout: RowLayout) -> int:
        """What the kernel holds in the vector memory, but what the compiler spills."""
        width = 4 if layout.is_float32 else 2
        buffers = 2 * layout.num_stored_rows * self.num_keys * LANES * 4
        operands = 2 * layout.num_rows * self.num_keys * LANES * width
        # Queries, weighted sums, totals and best scores.
        per_query = LANES * (width + 4) + 2 * SUBLANES * 4
        queries = self.tokens_per_tile(layout.queries_per_row) * layout.queries_per_row
        return buffers + operands + self.num_tiles * layout.num_rows * queries * per_query


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantChunk:
    """For the compiler's static profile, which knows no length that is read from memory.

    One chunk, whose pages follow each other.

    Attributes:
        start: Cached tokens before it.
        length: Its tokens; whole blocks of queries.
    """

    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Queries:
    """A block of queries: its chunk, its tiles, and which positions of the chunk these have.

    Attributes:
        chunk: Its number.
        first_tile: Among the step's.
        num_tiles: From that on.
        position: Of the first tile's first token, if that were one of the chunk.
        start: Of the first token that is one.
        stop: Behind the last one.
    """

    chunk: Number
    first_tile: Number
    num_tiles: Number
    position: Number
    start: Number
    stop: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """What of a block of keys is read, and which tiles of a block of queries attend to it how.

    Tiles:

        none .. | careful_start .. | fast_start .. | fast_stop .. | careful_stop ..
                      careful            fast          careful         none

    Those from `fast_start` to `opened_stop` have no best score yet.
    """

    num_valid: Number
    num_pages: Number
    num_next_pages: Number
    num_write_waits: Number
    careful_start: Number
    fast_start: Number
    opened_stop: Number
    fast_stop: Number
    careful_stop: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """What the kernel is specialised for."""

    layout: RowLayout
    blocks: ChunkBlocks
    page_size: int
    pages_per_seq: int
    num_chunks: int
    queries_per_token: int
    query_scale: float
    sliding_window: int | None
    soft_cap: float | None
    constant: ConstantChunk | None

    @property
    def pages_per_block(self) -> int:
        return self.blocks.num_keys // self.page_size

    @property
    def tokens_per_tile(self) -> int:
        return self.blocks.tokens_per_tile(self.queries_per_token)

    @property
    def queries_per_tile(self) -> int:
        return self.tokens_per_tile * self.queries_per_token

    def block_range(self, queries: _Queries) -> tuple[Number, Number]:
        """The blocks of keys that any of the queries sees."""
        num_keys = self.blocks.num_keys
        first = 0
        if self.sliding_window is not None:
            first = floor_div(larger(queries.position - self.sliding_window + 1, 0), num_keys)
        return first, ceil_div(queries.stop, num_keys)

    def first_written_block(self, queries: _Queries) -> Number:
        """The first block of keys, among those that a chunk's first queries see, with new ones."""
        first, _ = self.block_range(queries)
        return larger(floor_div(queries.start, self.blocks.num_keys), first)

    def constant_queries(self) -> list[_Queries]:
        """The blocks of queries of a chunk that is a constant."""
        assert self.constant is not None
        tokens = self.blocks.num_tiles * self.tokens_per_tile
        stop = self.constant.start + self.constant.length
        return [
            _Queries(
                chunk=0,
                first_tile=number * self.blocks.num_tiles,
                num_tiles=ceil_div(min(tokens, stop - position), self.tokens_per_tile),
                position=position,
                start=position,
                stop=min(position + tokens, stop),
            )
            for number, position in enumerate(range(self.constant.start, stop, tokens))
        ]

    def keys(
        self,
        queries: _Queries,
        block: Number,
        *,
        first_write: Number,
        is_careful: bool | jax.Array,
    ) -> _Keys:
        """What is known of a block of keys.

        Args:
            queries: That see any of it.
            block: Its number.
            first_write: Of the block before which all writes must have ended.
            is_careful: Whether no tile may attend it the fast way.
        """
        num_keys, per_tile = self.blocks.num_keys, self.tokens_per_tile
        window = self.sliding_window
        # The block, as seen from the first query.
        start = block * num_keys - queries.position
        stop = start + num_keys

        def tiles(number: Number) -> Number:
            return clip(number, 0, queries.num_tiles)

        is_first = block == self.block_range(queries)[0]
        careful_stop = fast_stop = queries.num_tiles
        fast_start = tiles(ceil_div(larger(stop - 1, 0), per_tile))
        if window is not None:
            # The block before is whole for them, too, so that every query has a best score.
            fast_stop = tiles(floor_div(larger(start - num_keys + window, 0), per_tile))
            careful_stop = tiles(ceil_div(larger(stop - 1 + window, 0), per_tile))
            is_careful |= is_first
        fast_start = where(is_careful, careful_stop, smaller(fast_start, careful_stop))
        fast_stop = larger(fast_stop, fast_start)
        return _Keys(
            num_valid=self._num_valid(queries, block),
            num_pages=ceil_div(self._num_valid(queries, block), self.page_size),
            num_next_pages=ceil_div(self._num_valid(queries, block + 1), self.page_size),
            num_write_waits=where(block + 1 == first_write, 1, 0),
            careful_start=tiles(floor_div(larger(start, 0), per_tile)),
            fast_start=fast_start,
            opened_stop=where(is_first, fast_stop, fast_start),
            fast_stop=fast_stop,
            careful_stop=careful_stop,
        )

    def _num_valid(self, queries: _Queries, block: Number) -> Number:
        return clip(queries.stop - block * self.blocks.num_keys, 0, self.blocks.num_keys)


def attend_chunks(
    q: jax.Array,
    new_kv: jax.Array,
    pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_chunk_lens: jax.Array,
    first_page: jax.Array,
    *,
    first_token: int,
    layout: RowLayout,
    blocks: ChunkBlocks,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    constant: ConstantChunk | None = None,
    vmem_limit_bytes: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Write the chunks' keys and values to their pages, and attend their tokens, causally.

    Args:
        q: [num_rows, queries, T, 128], of all tokens of a step: `RowLayout.split_queries` with the
            tokens third.
        new_kv: [num_stored_rows, T, 128], keys and values of the same tokens.
        pages: [num_pages, num_stored_rows, page_size, 128]; donated in effect.
        kv_lens: int32 [C], cached tokens of the chunks' sequences, the chunks included.
        page_indices: int32 [C, pages_per_seq].
        cu_chunk_lens: int32 [C + 1], offsets of the chunks among the tokens from `first_token` on.
        first_page: int32 [], added to every page index.
        first_token: Before it are tokens of no chunk.
        layout, sm_scale, sliding_window, soft_cap, vmem_limit_bytes, interpret: As for
            `attend_decodes`.
        blocks: Sizes of the loops' turns.
        constant: For static profiles only: takes the place of all lengths.

    Returns:
        As `q`, anything for tokens before `first_token`, zeros for others of no chunk; and the
        pages.
    """
    num_rows, queries_per_token, num_tokens, _ = q.shape
    tiles = TokenTiles(
        tokens_per_tile=blocks.tokens_per_tile(queries_per_token),
        num_tiles=blocks.num_tiles,
        first_token=first_token,
        cu_chunk_lens=cu_chunk_lens,
        num_tokens=num_tokens,
    )
    kernel = _Kernel(
        layout=layout,
        blocks=blocks,
        page_size=pages.shape[2],
        pages_per_seq=page_indices.shape[1],
        num_chunks=len(kv_lens),
        queries_per_token=queries_per_token,
        query_scale=query_scale(sm_scale, soft_cap),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        constant=constant,
    )
    if blocks.num_keys % kernel.page_size:
        raise ValueError(f"blocks of {blocks.num_keys} keys are no whole pages of {pages.shape[2]}")
    # Copies begin and end with whole registers.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -num_tokens % SUBLANES), (0, 0)))
    operand = jnp.float32 if layout.is_float32 else jnp.bfloat16
    state = (blocks.num_tiles, num_rows)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    cu_tokens = first_token + cu_chunk_lens
    scalars = (*tiles.blocks(), kv_lens, cu_tokens, page_indices.reshape(-1))
    out, pages = pl.pallas_call(
        functools.partial(_attend_kernel, kernel=kernel),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 1,
            grid=(tiles.most_blocks if constant is None else 1,),
            in_specs=[anywhere, anywhere, anywhere],
            out_specs=(anywhere, anywhere),
            scratch_shapes=[
                pltpu.VMEM((*state, queries_per_token, kernel.tokens_per_tile, LANES), q.dtype),
                pltpu.VMEM((2, layout.num_stored_rows, blocks.num_keys, LANES), pages.dtype),
                pltpu.VMEM((num_rows, blocks.num_keys, LANES), operand),
                pltpu.VMEM((num_rows, LANES, blocks.num_keys), operand),
                pltpu.VMEM((*state, 1, kernel.queries_per_tile), jnp.float32),
                pltpu.VMEM((*state, SUBLANES, kernel.queries_per_tile), jnp.float32),
                pltpu.VMEM((*state, LANES, kernel.queries_per_tile), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={len(scalars) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="attend_chunks",
    )(*scalars, first_page.reshape(1), q, new_kv, pages)
    return out[:, :, :num_tokens], pages


def _attend_kernel(
    chunk_ref,
    first_tile_ref,
    num_tiles_ref,
    kv_lens_ref,
    cu_tokens_ref,
    page_indices_ref,
    first_page_ref,
    q_hbm,
    new_kv_ref,
    _,
    out_hbm,
    pages_ref,
    q_ref,
    buffer_ref,
    key_ref,
    value_ref,
    best_ref,
    total_ref,
    weighted_ref,
    read_sems,
    write_sem,
    tile_sem,
    *,
    kernel: _Kernel,
):
    layout, num_keys, page_size = kernel.layout, kernel.blocks.num_keys, kernel.page_size
    operands = Operands(query=q_ref, key=key_ref, value=value_ref, soft_cap=kernel.soft_cap)
    sums = TileSums(best=best_ref, total=total_ref, weighted=weighted_ref)

    def page_at(chunk: Number, entry: Number) -> Number:
        if kernel.constant is not None:
            return entry
        return first_page_ref[0] + page_indices_ref[chunk * kernel.pages_per_seq + entry]

    def write_chunks(*, starts: bool) -> None:
        """Start, or wait for, the copies of all chunks' keys and values to their pages."""

        def write(chunk: Number) -> None:
            if kernel.constant is None:
                first_token = cu_tokens_ref[chunk]
                num_tokens = cu_tokens_ref[chunk + 1] - first_token
                stop = kv_lens_ref[chunk]
            else:
                first_token, num_tokens = 0, kernel.constant.length
                stop = kernel.constant.start + num_tokens

            def copy(position: Number, count: int) -> None:
                token = first_token + position - (stop - num_tokens)
                page = page_at(chunk, floor_div(position, page_size))
                source = new_kv_ref.at[:, pl.ds(token, count)]
                target = pages_ref.at[page, :, pl.ds(remainder(position, page_size), count)]
                copy = pltpu.make_async_copy(source, target, write_sem)
                copy.start() if starts else copy.wait()

            _by_pages(stop - num_tokens, stop, page_size, copy)

        repeat(kernel.num_chunks, write)

    def copy_tile(theirs: Any, place: Number, tile: Number, *, is_out: bool, starts: bool) -> None:
        """Start, or wait for, a copy of a tile of the step into a place of the block, or out of it.

        Of the step's last tile there may be less than a whole one.
        """
        per_tile = kernel.tokens_per_tile
        whole, rest = divmod(q_hbm.shape[2], per_tile)

        def copy(count: int) -> None:
            first = tile * per_tile
            first = first if isinstance(first, int) else pl.multiple_of(first, per_tile)
            ours = q_ref.at[place, :, :, pl.ds(0, count)]
            part = theirs.at[:, :, pl.ds(first, count)]
            source, target = (ours, part) if is_out else (part, ours)
            copy = pltpu.make_async_copy(source, target, tile_sem)
            copy.start() if starts else copy.wait()

        if rest == 0:
            copy(per_tile)
            return
        repeat(where(tile < whole, 1, 0), lambda _: copy(per_tile))
        repeat(where(tile < whole, 0, 1), lambda _: copy(rest))

    def bring(queries: _Queries, tile: Number, *, starts: bool) -> None:
        copy_tile(q_hbm, tile, queries.first_tile + tile, is_out=False, starts=starts)

    def take(queries: _Queries, tile: Number, *, starts: bool) -> None:
        copy_tile(out_hbm, tile, queries.first_tile + tile, is_out=True, starts=starts)

    def positions(queries: _Queries, tile: Number, shape: tuple[int, ...], axis: int) -> jax.Array:
        """Of a tile's tokens, as far as they are the chunk's."""
        token = lax.broadcasted_iota(jnp.int32, shape, axis)
        return queries.position + tile * kernel.tokens_per_tile + token

    def prepare_queries(queries: _Queries, tile: Number) -> None:
        """Scale a tile's queries, once and not score by score: the vector unit has enough to do.

        Those that are another chunk's, which are not to be attended as this one's, become zeros.
        """
        position = positions(queries, tile, (kernel.tokens_per_tile, LANES), 0)
        is_own = (position >= queries.start) & (position < queries.stop)
        for row in range(layout.num_rows):
            for number in range(kernel.queries_per_token):
                scaled = q_ref[tile, row, number].astype(jnp.float32) * kernel.query_scale
                scaled = jnp.where(is_own, scaled, 0.0)
                q_ref[tile, row, number] = scaled.astype(q_ref.dtype)

    def clear_other_tiles() -> None:
        """Zero the outputs of tiles that no chunk has."""
        stop = cu_tokens_ref[kernel.num_chunks]
        first = where(
            stop > cu_tokens_ref[0],
            ceil_div(stop, kernel.tokens_per_tile),
            floor_div(stop, kernel.tokens_per_tile),
        )
        q_ref[0] = jnp.zeros(q_ref.shape[1:], q_ref.dtype)
        stop_tile = -(-out_hbm.shape[2] // kernel.tokens_per_tile)
        for starts in (True, False):
            copy = functools.partial(copy_tile, out_hbm, 0, is_out=True, starts=starts)
            repeat(stop_tile, copy, first=first)

    def start_reading(queries: _Queries, block: Number, half: Number, num_pages: Number) -> None:
        def start(index: Number) -> None:
            page = page_at(queries.chunk, block * kernel.pages_per_block + index)
            rows = buffer_ref.at[half, :, pl.ds(index * page_size, page_size)]
            pltpu.make_async_copy(pages_ref.at[page], rows, read_sems.at[half]).start()

        repeat(num_pages, start)

    def wait_for_reads(half: Number, num_pages: Number) -> None:
        def wait(index: Number, count: int) -> None:
            rows = buffer_ref.at[half, :, pl.ds(index * page_size, count * page_size)]
            pltpu.make_async_copy(rows, rows, read_sems.at[half]).wait()

        is_whole = num_pages == kernel.pages_per_block
        repeat(where(is_whole, 1, 0), lambda _: wait(0, kernel.pages_per_block))
        repeat(where(is_whole, 0, num_pages), lambda index: wait(index, 1))

    def attend_tiles(queries: _Queries, block: Number, keys: _Keys) -> None:
        def own_places(tile: Number) -> jax.Array:
            query = lax.broadcasted_iota(jnp.int32, (1, kernel.queries_per_tile), 1)
            token = lax.rem(query, jnp.int32(kernel.tokens_per_tile))
            position = queries.position + tile * kernel.tokens_per_tile + token
            # What a tile has too many sees what the last token sees, or nothing.
            return jnp.minimum(position, queries.stop - 1) - block * num_keys

        def careful(first_tile: Number, count: int) -> None:
            own = [own_places(first_tile + number) for number in range(count)]
            attend_carefully(operands, sums, first_tile, own, kernel.sliding_window)

        def fast(first_tile: Number, count: int) -> None:
            attend_fast(operands, sums, first_tile, count)

        # The static profile does not count the turns of a loop around loops of products.
        each = repeat if kernel.constant is None else unroll

        def in_groups(
            attend: Callable[[Number, int], None], first: Number, stop: Number, count: int
        ):
            num_groups = floor_div(larger(stop - first, 0), count)
            each(num_groups, lambda group: attend(first + group * count, count))
            if count > 1:
                each(stop, lambda tile: attend(tile, 1), first=first + num_groups * count)

        in_groups(careful, keys.careful_start, keys.fast_start, kernel.blocks.num_careful)
        each(keys.opened_stop, lambda tile: find_best(operands, sums, tile), first=keys.fast_start)
        in_groups(fast, keys.fast_start, keys.fast_stop, kernel.blocks.num_beside)
        if kernel.sliding_window is not None:
            in_groups(careful, keys.fast_stop, keys.careful_stop, kernel.blocks.num_careful)

    def attend_keys(queries: _Queries, block: Number, half: Number, keys: _Keys) -> None:
        repeat(keys.num_write_waits, lambda _: write_chunks(starts=False))
        start_reading(queries, block + 1, 1 - half, keys.num_next_pages)
        wait_for_reads(half, keys.num_pages)
        clear_behind(buffer_ref, (half,), layout, keys.num_valid, num_keys)
        for row in range(layout.num_rows):
            key, value = load_kv(buffer_ref, (half,), row, layout)
            key_ref[row], value_ref[row] = key, value.T
        attend_tiles(queries, block, keys)

    def attend_all_keys(
        queries: _Queries, *, first_write: Number, is_careful: bool | jax.Array
    ) -> None:
        """Attend a block of queries, anew if carefully, to all keys that it sees.

        The writes are waited for before the first of them is read.
        """
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        repeat(queries.num_tiles, sums.clear)
        first, stop = kernel.block_range(queries)
        keys_of = functools.partial(
            kernel.keys, queries, first_write=first_write, is_careful=is_careful
        )
        repeat(where(first == first_write, 1, 0), lambda _: write_chunks(starts=False))
        start_reading(queries, first, remainder(first, 2), keys_of(first).num_pages)
        num_waits = where(is_careful, 0, queries.num_tiles)
        repeat(num_waits, lambda tile: bring(queries, tile, starts=False))
        repeat(num_waits, lambda tile: prepare_queries(queries, tile))

        def attend_block(block: Number) -> None:
            attend_keys(queries, block, remainder(block, 2), keys_of(block))

        if isinstance(first, int) and isinstance(stop, int):
            for keys, found in itertools.groupby(range(first, stop), key=keys_of):
                attend_run(queries, list(found), keys)
        else:
            repeat(stop, attend_block, first=first)

    def attend_run(queries: _Queries, run: list[int], keys: _Keys) -> None:
        """Attend blocks, constants all, of which the same is known; half by half as constants."""

        def attend_pair(pair: Number) -> None:
            for place in (0, 1):
                attend_keys(queries, run[0] + 2 * pair + place, (run[0] + place) % 2, keys)

        repeat(len(run) // 2, attend_pair)
        if len(run) % 2:
            attend_keys(queries, run[-1], run[-1] % 2, keys)

    def attend_queries(queries: _Queries, *, is_first: bool | jax.Array) -> None:
        repeat(queries.num_tiles, lambda tile: bring(queries, tile, starts=True))
        first_write = where(is_first, kernel.first_written_block(queries), -1)

        def attempt(number: jax.Array) -> jax.Array:
            attend_all_keys(
                queries,
                first_write=where(number == 0, first_write, -1),
                is_careful=number > 0,
            )
            # Not-a-number is no total to be trusted, either.
            return jnp.where(jnp.max(total_ref[...]) < MOST_TOTAL, 2, number + 1)

        if kernel.constant is None:
            lax.while_loop(lambda number: number < 2, attempt, jnp.int32(0))
        else:
            attend_all_keys(queries, first_write=first_write, is_careful=False)

        # What of the first tile is another chunk's was written already and stays, what of the last
        # one is another's is written later.
        is_shared = queries.position < queries.start

        def bring_others(_: Number) -> None:
            for starts in (True, False):
                copy_tile(out_hbm, 0, queries.first_tile, is_out=False, starts=starts)

        repeat(where(is_shared, 1, 0), bring_others)

        def finish(tile: Number) -> None:
            position = positions(queries, tile, (1, kernel.tokens_per_tile, LANES), 1)
            for row in range(layout.num_rows):
                out = sums.output(tile, row).astype(q_ref.dtype)
                out = out.reshape(q_ref.shape[2:])
                if kernel.constant is None:
                    out = jnp.where(position < queries.stop, out, jnp.zeros_like(out))
                    out = jnp.where(position < queries.start, q_ref[tile, row], out)
                q_ref[tile, row] = out
            take(queries, tile, starts=True)

        repeat(queries.num_tiles, finish)
        repeat(queries.num_tiles, lambda tile: take(queries, tile, starts=False))

    if kernel.constant is not None:
        write_chunks(starts=True)
        for number, queries in enumerate(kernel.constant_queries()):
            attend_queries(queries, is_first=number == 0)
        return
    index = pl.program_id(0)

    @pl.when(index == 0)
    def _():
        write_chunks(starts=True)
        clear_other_tiles()

    @pl.when(num_tiles_ref[index] > 0)
    def _():
        chunk, first_tile, num_tiles = chunk_ref[index], first_tile_ref[index], num_tiles_ref[index]
        chunk_stop = kv_lens_ref[chunk]
        chunk_start = chunk_stop - (cu_tokens_ref[chunk + 1] - cu_tokens_ref[chunk])
        position = chunk_start + first_tile * kernel.tokens_per_tile - cu_tokens_ref[chunk]
        queries = _Queries(
            chunk=chunk,
            first_tile=first_tile,
            num_tiles=num_tiles,
            position=position,
            start=larger(position, chunk_start),
            stop=smaller(position + num_tiles * kernel.tokens_per_tile, chunk_stop),
        )
        attend_queries(queries, is_first=index == 0)


def _by_pages(
    start: Number, stop: Number, page_size: int, copy: Callable[[Number, int], None]
) -> None:
    """Copy positions: whole pages at once, others token by token."""
    first_page = ceil_div(start, page_size)
    stop_page = larger(floor_div(stop, page_size), first_page)
    repeat(smaller(first_page * page_size, stop), lambda at: copy(at, 1), first=start)
    repeat(stop_page, lambda page: copy(page * page_size, page_size), first=first_page)
    repeat(stop, lambda at: copy(at, 1), first=larger(stop_page * page_size, start))
