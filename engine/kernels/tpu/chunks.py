"""Attention of prompts' chunks on TPUs: many new tokens of a sequence at once.

First the new keys and values go to their pages, then blocks of queries are attended one after
another, each to all pages up to its own last token. There is far more to compute than to read, so
two buffers for blocks of keys are enough: one is computed while the other fills.

A block of queries belongs to one chunk. With chunks of 5 and 2 tokens and blocks of 4:

    block 0     block 1     block 2     block 3
    0 1 2 3     4 - - -     5 6 - -     - - - -
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.kernels.tpu.softmax import LOWEST_SCORE, Sums, block_sums, load_kv, scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkBlocks:
    """How much is computed at once.

    Attributes:
        num_tokens: New tokens of a block of queries.
        num_keys: Of a block of keys; a multiple of the page size.
    """

    num_tokens: int
    num_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """What the kernel is specialised for."""

    layout: RowLayout
    blocks: ChunkBlocks
    page_size: int
    pages_per_seq: int
    num_chunks: int
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def pages_per_block(self) -> int:
        return self.blocks.num_keys // self.page_size


def attend_chunks(
    q: jax.Array,
    new_kv: jax.Array,
    pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_chunk_lens: jax.Array,
    first_page: jax.Array,
    *,
    layout: RowLayout,
    blocks: ChunkBlocks,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    vmem_limit_bytes: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Write the chunks' keys and values to their pages, and attend their tokens, causally.

    Args:
        q: [T, num_rows, queries, 128], of the chunk tokens, as `RowLayout.split_queries` has them.
        new_kv: [T, num_stored_rows, 128], keys and values of the same tokens.
        pages: [num_pages, num_stored_rows, page_size, 128]; donated in effect.
        kv_lens: int32 [C], cached tokens of the chunks' sequences, the chunks included.
        page_indices: int32 [C, pages_per_seq].
        cu_chunk_lens: int32 [C + 1], offsets of the chunks among the tokens.
        first_page: int32 [], added to every page index.
        layout, sm_scale, sliding_window, soft_cap, vmem_limit_bytes, interpret: As for
            `attend_decodes`.
        blocks: Sizes of the loops' turns.

    Returns:
        As `q`, anything for tokens of no chunk; and the pages.
    """
    num_tokens, num_rows, num_queries, _ = q.shape
    block_len = blocks.num_tokens
    num_chunks = len(kv_lens)
    kernel = _Kernel(
        layout=layout,
        blocks=blocks,
        page_size=pages.shape[2],
        pages_per_seq=page_indices.shape[1],
        num_chunks=num_chunks,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    if blocks.num_keys % kernel.page_size:
        raise ValueError(f"blocks of {blocks.num_keys} keys are no whole pages of {pages.shape[2]}")
    chunk_lens = jnp.diff(cu_chunk_lens)
    blocks_per_chunk = -(-chunk_lens // block_len)
    cu_blocks = jnp.cumsum(blocks_per_chunk)
    num_blocks = -(-num_tokens // block_len) + min(num_chunks, num_tokens)
    number = jnp.arange(num_blocks, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.searchsorted(cu_blocks, number, side="right"), num_chunks - 1)
    chunk = chunk.astype(jnp.int32)
    in_chunk = (number - (cu_blocks - blocks_per_chunk)[chunk]) * block_len
    first_token = cu_chunk_lens[chunk] + in_chunk
    count = jnp.clip(chunk_lens[chunk] - in_chunk, 0, block_len)
    count = jnp.where(number < cu_blocks[-1], count, 0)
    position = (kv_lens - chunk_lens)[chunk] + in_chunk
    # Queries by block, [blocks, rows, tokens * queries, 128]: whole registers, whatever the chunks.
    token = jnp.minimum(first_token[:, None] + jnp.arange(block_len)[None], num_tokens - 1)
    q_blocks = q[token].transpose(0, 2, 1, 3, 4)
    q_blocks = q_blocks.reshape(num_blocks, num_rows, block_len * num_queries, LANES)

    block = (1, num_rows, block_len * num_queries, LANES)
    sums = pltpu.VMEM((num_rows, block_len * num_queries, LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffer = (2, layout.num_stored_rows, blocks.num_keys, LANES)
    scalars = (chunk, position, count, kv_lens, cu_chunk_lens, page_indices.reshape(-1))
    out, pages = pl.pallas_call(
        functools.partial(_attend_kernel, kernel=kernel, num_queries=num_queries),
        out_shape=(
            jax.ShapeDtypeStruct(q_blocks.shape, q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 1,
            grid=(num_blocks,),
            in_specs=[pl.BlockSpec(block, lambda index, *_: (index, 0, 0, 0)), anywhere, anywhere],
            out_specs=(pl.BlockSpec(block, lambda index, *_: (index, 0, 0, 0)), anywhere),
            scratch_shapes=[
                pltpu.VMEM(buffer, pages.dtype),
                sums,
                sums,
                sums,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={len(scalars) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="attend_chunks",
    )(*scalars, first_page.reshape(1), q_blocks, new_kv.swapaxes(0, 1), pages)
    out = out.reshape(num_blocks, num_rows, block_len, num_queries, LANES)
    # Back to the order of tokens.
    place = jnp.arange(num_tokens)
    of_token = jnp.searchsorted(cu_chunk_lens[1:], place, side="right")
    of_token = jnp.minimum(of_token, num_chunks - 1)
    offset = place - cu_chunk_lens[of_token]
    block_of = (cu_blocks - blocks_per_chunk)[of_token] + offset // block_len
    return out[jnp.minimum(block_of, num_blocks - 1), :, offset % block_len], pages


def _attend_kernel(
    chunk_ref,
    position_ref,
    count_ref,
    kv_lens_ref,
    cu_chunk_lens_ref,
    page_indices_ref,
    first_page_ref,
    q_ref,
    new_kv_ref,
    _,
    out_ref,
    pages_ref,
    buffer_ref,
    best_ref,
    total_ref,
    weighted_ref,
    read_sems,
    write_sem,
    *,
    kernel: _Kernel,
    num_queries: int,
):
    layout, num_keys, page_size = kernel.layout, kernel.blocks.num_keys, kernel.page_size
    score_of = functools.partial(scores, sm_scale=kernel.sm_scale, soft_cap=kernel.soft_cap)
    index = pl.program_id(0)
    chunk, position, count = chunk_ref[index], position_ref[index], count_ref[index]

    def page_at(chunk: jax.Array, entry: jax.Array) -> jax.Array:
        return first_page_ref[0] + page_indices_ref[chunk * kernel.pages_per_seq + entry]

    @pl.when(index == 0)
    def _():
        _write_chunks(
            kernel, kv_lens_ref, cu_chunk_lens_ref, page_at, new_kv_ref, pages_ref, write_sem
        )

    def copies(block: jax.Array, half: jax.Array, *, starts: bool) -> None:
        """Start, or wait for, the copies of a block's pages, as far as there are any."""
        tokens = jnp.clip(position + count - block * num_keys, 0, num_keys)

        def copy(number: jax.Array, _: None) -> None:
            page = page_at(chunk, block * kernel.pages_per_block + number)
            rows = buffer_ref.at[half, :, pl.ds(number * page_size, page_size)]
            copy = pltpu.make_async_copy(pages_ref.at[page], rows, read_sems.at[half])
            copy.start() if starts else copy.wait()

        lax.fori_loop(0, lax.div(tokens + (page_size - 1), jnp.int32(page_size)), copy, None)

    def attend_block(block: jax.Array, _: None) -> None:
        half = lax.rem(block, jnp.int32(2))
        copies(block + 1, 1 - half, starts=True)
        copies(block, half, starts=False)
        number = lax.broadcasted_iota(jnp.int32, (num_keys, LANES), 0) + block * num_keys
        is_cached = number < position + count
        rows = kernel.blocks.num_tokens * num_queries
        query = lax.broadcasted_iota(jnp.int32, (rows, num_keys), 0)
        own = position + lax.div(query, jnp.int32(num_queries))
        key_number = lax.broadcasted_iota(jnp.int32, (rows, num_keys), 1) + block * num_keys
        is_seen = (key_number <= own) & (key_number < position + count)
        if kernel.sliding_window is not None:
            is_seen &= key_number > own - kernel.sliding_window
        for row in range(layout.num_rows):
            key, value = load_kv(buffer_ref, (half,), row, layout, is_cached=is_cached)
            score = score_of(q_ref[0, row], key)
            before = Sums(best_ref[row], total_ref[row], weighted_ref[row])
            after = before.merge(block_sums(score, is_seen, value))
            best_ref[row], total_ref[row], weighted_ref[row] = after

    first_block = jnp.int32(0)
    if kernel.sliding_window is not None:
        oldest = jnp.maximum(position - kernel.sliding_window + 1, 0)
        first_block = lax.div(oldest, jnp.int32(num_keys))
    stop_block = lax.div(position + count + (num_keys - 1), jnp.int32(num_keys))

    @pl.when(count > 0)
    def _():
        best_ref[...] = jnp.full(best_ref.shape, LOWEST_SCORE, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)
        copies(first_block, lax.rem(first_block, jnp.int32(2)), starts=True)
        lax.fori_loop(first_block, stop_block, attend_block, None)
        for row in range(layout.num_rows):
            total = jnp.maximum(total_ref[row], 1e-30)
            out_ref[0, row] = (weighted_ref[row] / total).astype(out_ref.dtype)


def _write_chunks(
    kernel: _Kernel, kv_lens_ref, cu_chunk_lens_ref, page_at, new_kv_ref, pages_ref, write_sem
) -> None:
    """Write all chunks' tokens to their pages: whole pages at once, others token by token."""
    page_size = kernel.page_size

    def for_chunk(chunk: jax.Array, *, starts: bool) -> None:
        first_token = cu_chunk_lens_ref[chunk]
        num_tokens = cu_chunk_lens_ref[chunk + 1] - first_token
        stop = kv_lens_ref[chunk]
        start = stop - num_tokens

        def copy(position: jax.Array, count: int) -> None:
            token = first_token + position - start
            page = page_at(chunk, lax.div(position, jnp.int32(page_size)))
            offset = lax.rem(position, jnp.int32(page_size))
            source = new_kv_ref.at[:, pl.ds(token, count)]
            target = pages_ref.at[page, :, pl.ds(offset, count)]
            copy = pltpu.make_async_copy(source, target, write_sem)
            copy.start() if starts else copy.wait()

        def copy_token(position: jax.Array, _: None) -> None:
            copy(position, 1)

        def copy_page(number: jax.Array, _: None) -> None:
            copy(number * page_size, page_size)

        first_page = lax.div(start + (page_size - 1), jnp.int32(page_size))
        stop_page = jnp.maximum(lax.div(stop, jnp.int32(page_size)), first_page)
        lax.fori_loop(start, jnp.minimum(first_page * page_size, stop), copy_token, None)
        lax.fori_loop(first_page, stop_page, copy_page, None)
        lax.fori_loop(jnp.maximum(stop_page * page_size, start), stop, copy_token, None)

    for starts in (True, False):
        lax.fori_loop(
            0,
            kernel.num_chunks,
            lambda chunk, _, starts=starts: for_chunk(chunk, starts=starts),
            None,
        )
