"""Attention of decoding sequences on TPUs: one new token each, over all pages of its own.

Reading the pages is what takes the time, so the kernel keeps their copies in flight without a
pause: it goes over blocks of keys, sequence after sequence, and while it computes one group of
blocks the next group's pages arrive, be they of the same sequence or of the next ones.

    blocks    seq 0: 0 1 2 | seq 1: 0 1 | seq 2: 0 1 ..
    groups    [0 1] [2 | 0] [1 | 0] [1 ..      2 blocks a group
    buffers    A      B       C      A         3 buffers

The blocks of a group are independent chains of products and exponentials, which hide each other's
latency; only then are their sums merged, in order. The new token is not read from its page: it
opens its sequence's sums, and is written to the page once that has been read.

Each wait is for copies that this kernel started: nothing else writes the pages meanwhile.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.kernels.tpu.numbers import (
    Number,
    ceil_div,
    choose,
    larger,
    remainder,
    repeat,
    smaller,
    where,
)
from engine.kernels.tpu.softmax import (
    Steps,
    Sums,
    cached_sums,
    clear_behind,
    interleaved_sums,
    load_kv,
    sums_of_one,
)

_CHAINS_BEHIND = 4
"""Between a block's and row's scores, its weights, and their product with the values."""

_FEWEST_COMPUTED = 256
"""Keys: a product of fewer takes as long."""

MOST_TABLE_BYTES = 512 * 1024
"""Of a page table in scalar memory, which has 1 MiB; larger ones stay in HBM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBlocks:
    """How much is computed at once.

    Attributes:
        num_keys: Of a block; a multiple of the page size and of `CLEARED_KEYS`.
        group: Blocks that are computed side by side.
        num_buffers: Of a group each: one is computed while the others fill.
    """

    num_keys: int
    group: int
    num_buffers: int

    def vmem_bytes(self, layout: RowLayout) -> int:
        """What the kernel's buffers hold in the vector memory."""
        return self.num_buffers * self.group * layout.num_stored_rows * self.num_keys * LANES * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """What the kernel is specialised for."""

    layout: RowLayout
    blocks: DecodeBlocks
    page_size: int
    pages_per_seq: int
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    # For the compiler's static profile, which knows no length that is read from memory, nor the
    # turns of a loop that depends on one: every sequence has that many cached tokens, its pages
    # follow each other, and the loop over blocks is unrolled.
    constant_len: int | None
    num_seqs: int

    @property
    def pages_per_block(self) -> int:
        return self.blocks.num_keys // self.page_size

    @property
    def blocks_per_seq(self) -> int:
        return -(-self.pages_per_seq // self.pages_per_block)

    @property
    def computed_sizes(self) -> list[int]:
        """So many keys of a block may be computed: of short sequences a part of it.

        Each is code of its own, which takes as long to compile.
        """
        num_keys = self.blocks.num_keys
        part = num_keys // 4
        return [part, num_keys] if part >= _FEWEST_COMPUTED else [num_keys]

    @property
    def streams_table(self) -> bool:
        """Whether the page table is too large for the scalar memory, and comes as it is needed."""
        return self.num_seqs * self.pages_per_seq * 4 > MOST_TABLE_BYTES


_Place = tuple[Number, Number]
"""Of a block: its sequence, and its number in it."""


def attend_decodes(
    q: jax.Array,
    new_kv: jax.Array,
    pages: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    num_decodes: jax.Array,
    first_page: jax.Array,
    *,
    layout: RowLayout,
    blocks: DecodeBlocks,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    constant_len: int | None = None,
    vmem_limit_bytes: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """Attend one token of each sequence, and write it to its page.

    Args:
        q: [B, queries, 128], as `RowLayout.tile_queries` lays them out.
        new_kv: [B, num_stored_rows, 128], keys and values of the same tokens.
        pages: [num_pages, num_stored_rows, page_size, 128]; donated in effect.
        kv_lens: int32 [B], cached tokens, the new one included; at least 1 of real sequences.
        page_indices: int32 [B, pages_per_seq]; entries past `kv_lens` may be anything.
        num_decodes: int32 [], real sequences; they come first.
        first_page: int32 [], added to every page index: where a layer's pages begin.
        layout: Of rows.
        blocks: Sizes of the loop's turns.
        sm_scale: Factor on the scores.
        sliding_window: Positions attended, the token's own included; None = all.
        soft_cap: Scores are bent to stay within ±this; None = as they are.
        constant_len: For static profiles only: takes the place of `kv_lens` - 1.
        vmem_limit_bytes: What the kernel may take of the vector memory.
        interpret: Run on a CPU.

    Returns:
        As `q`, in its dtype, zeros for sequences that are not real; and the pages.
    """
    B = q.shape[0]
    page_size = pages.shape[2]
    if blocks.num_keys % page_size:
        raise ValueError(f"blocks of {blocks.num_keys} keys are no whole pages of {page_size}")
    kernel = _Kernel(
        layout=layout,
        blocks=blocks,
        page_size=page_size,
        pages_per_seq=page_indices.shape[1],
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        constant_len=constant_len,
        num_seqs=B,
    )
    first_blocks, num_blocks = _block_ranges(kernel, kv_lens, num_decodes)
    # In a round each buffer has its turn.
    num_rounds = -(-jnp.sum(num_blocks) // (blocks.num_buffers * blocks.group))
    counts = jnp.stack([num_decodes, num_rounds]).astype(jnp.int32)
    # Where each sequence's new token goes.
    entry = jnp.maximum(kv_lens - 1, 0)[:, None] // page_size
    write_pages = first_page + jnp.take_along_axis(page_indices, entry, axis=1)[:, 0]
    table, table_scratch = _page_table(kernel, first_page + page_indices)
    buffer = (blocks.num_buffers, blocks.group, layout.num_stored_rows, blocks.num_keys, LANES)
    in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, pages = pl.pallas_call(
        functools.partial(_attend_kernel, kernel=kernel),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY if kernel.streams_table else pltpu.SMEM),
                in_vmem,
                in_vmem,
                anywhere,
            ],
            out_specs=(in_vmem, anywhere),
            scratch_shapes=[
                pltpu.VMEM(buffer, pages.dtype),
                pltpu.SemaphoreType.DMA((blocks.num_buffers,)),
                pltpu.SemaphoreType.DMA,
                *table_scratch,
            ],
        ),
        input_output_aliases={7: 1},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="attend_decodes",
    )(counts, kv_lens, first_blocks, write_pages, table, q, new_kv, pages)
    return out, pages


def _page_table(kernel: _Kernel, page_indices: jax.Array) -> tuple[jax.Array, list]:
    """The page table as the kernel reads it, and the scratch memory that it needs for that.

    Streamed, it is a line of entries for each block.
    """
    if not kernel.streams_table:
        return page_indices.reshape(-1), []
    per_block = kernel.pages_per_block
    missing = kernel.blocks_per_seq * per_block - kernel.pages_per_seq
    lines = jnp.pad(page_indices, ((0, 0), (0, missing))).reshape(-1, 1, per_block)
    lines = jnp.pad(lines, ((0, 0), (0, 0), (0, -per_block % LANES)))
    shape = (kernel.blocks.num_buffers, kernel.blocks.group, *lines.shape[1:])
    return lines, [
        pltpu.SMEM(shape, jnp.int32),
        pltpu.SemaphoreType.DMA((kernel.blocks.num_buffers,)),
    ]


def _block_ranges(
    kernel: _Kernel, kv_lens: jax.Array, num_decodes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First block of each sequence, and how many; every real one has at least one."""
    num_keys = kernel.blocks.num_keys
    num_cached = jnp.maximum(kv_lens - 1, 0)
    first = jnp.zeros_like(kv_lens)
    if kernel.sliding_window is not None:
        first = jnp.maximum(kv_lens - kernel.sliding_window, 0) // num_keys
    stop = jnp.maximum(-(-num_cached // num_keys), first + 1)
    is_real = jnp.arange(len(kv_lens)) < num_decodes
    return first, jnp.where(is_real, stop - first, 0)


def _attend_kernel(
    counts_ref,
    kv_lens_ref,
    first_blocks_ref,
    write_pages_ref,
    table_ref,
    q_ref,
    new_kv_ref,
    _,
    out_ref,
    pages_ref,
    buffer_ref,
    read_sems,
    write_sem,
    lines_ref=None,
    line_sems=None,
    *,
    kernel: _Kernel,
):
    layout, num_keys = kernel.layout, kernel.blocks.num_keys
    page_size, pages_per_block = kernel.page_size, kernel.pages_per_block
    is_constant = kernel.constant_len is not None
    num_seqs = kernel.num_seqs if is_constant else counts_ref[0]
    slots = range(kernel.blocks.group)
    rows = range(layout.num_rows)
    sizes = kernel.computed_sizes

    def num_cached(seq: Number) -> Number:
        return kv_lens_ref[seq] - 1 if kernel.constant_len is None else kernel.constant_len

    def first_block(seq: Number) -> Number:
        return 0 if is_constant else first_blocks_ref[seq]

    def last_block(seq: Number) -> Number:
        return larger(ceil_div(num_cached(seq), num_keys) - 1, first_block(seq))

    def line_copies(buffer: int, places: list[_Place]) -> list:
        """Copies of the page table's lines for a group of blocks, if it is streamed."""
        if not kernel.streams_table:
            return []
        assert lines_ref is not None
        assert line_sems is not None
        found = []
        for slot, (seq, block) in enumerate(places):
            # Behind the last sequence's blocks come empty ones, which have no line.
            line = seq * kernel.blocks_per_seq + smaller(block, kernel.blocks_per_seq - 1)
            found.append(
                pltpu.make_async_copy(
                    table_ref.at[line], lines_ref.at[buffer, slot], line_sems.at[buffer]
                )
            )
        return found

    def page_at(buffer: int, slot: int, place: _Place, index: Number) -> Number:
        """The page with that index in a block."""
        seq, block = place
        entry = seq * kernel.pages_per_seq + block * pages_per_block + index
        if is_constant:
            return entry
        if kernel.streams_table:
            assert lines_ref is not None
            return lines_ref[buffer, slot, 0, index]
        return table_ref[entry]

    def take(place: _Place) -> tuple[list[_Place], _Place]:
        """The blocks of a group from a place on, and the place behind them.

        Behind the last sequence's last block come empty ones of the same sequence.
        """
        taken = []
        for _ in slots:
            taken.append(place)
            seq, block = place
            goes_on = (block < last_block(seq)) | (seq + 1 >= num_seqs)
            next_seq = where(goes_on, seq, seq + 1)
            place = next_seq, where(goes_on, block + 1, first_block(next_seq))
        return taken, place

    def num_valid(place: _Place) -> Number:
        """Keys of a block that are cached."""
        seq, block = place
        return larger(smaller(num_cached(seq) - block * num_keys, num_keys), 0)

    def start_reading(buffer: int, places: list[_Place]) -> None:
        for copy in line_copies(buffer, places):
            copy.wait()
        for slot, place in enumerate(places):

            def start(index: Number, slot: int = slot, place: _Place = place) -> None:
                page = page_at(buffer, slot, place, index)
                rows = buffer_ref.at[buffer, slot, :, pl.ds(index * page_size, page_size)]
                pltpu.make_async_copy(pages_ref.at[page], rows, read_sems.at[buffer]).start()

            repeat(ceil_div(num_valid(place), page_size), start)

    def wait_for_reads(buffer: int, places: list[_Place]) -> None:
        for slot, place in enumerate(places):

            def wait(index: Number, num_pages: int, slot: int = slot) -> None:
                rows = buffer_ref.at[
                    buffer, slot, :, pl.ds(index * page_size, num_pages * page_size)
                ]
                pltpu.make_async_copy(rows, rows, read_sems.at[buffer]).wait()

            num_pages = ceil_div(num_valid(place), page_size)
            is_whole = num_pages == pages_per_block
            repeat(where(is_whole, 1, 0), lambda _, wait=wait: wait(0, pages_per_block))
            repeat(where(is_whole, 0, num_pages), lambda index, wait=wait: wait(index, 1))

    def start_writing(place: _Place) -> None:
        """Write the new token of a sequence whose last block this is."""
        seq, block = place

        def start(_: Number) -> None:
            offset = remainder(num_cached(seq), page_size)
            rows = pages_ref.at[write_pages_ref[seq], :, offset]
            pltpu.make_async_copy(new_kv_ref.at[seq], rows, write_sem).start()

        repeat(where(block == last_block(seq), 1, 0), start)

    def queries(seq: Number, row: int) -> jax.Array:
        tile, _ = layout.query_tile(row)
        return q_ref[seq, pl.ds(tile * layout.queries_in_tile, layout.queries_in_tile)]

    def write_outputs(seq: Number, sums: list[Sums]) -> None:
        """Of the sums of all rows, each tile's queries, each from its own row's."""
        shape = (layout.queries_in_tile, LANES)
        number = lax.broadcasted_iota(jnp.int32, shape, 0)
        tiles: list[jax.Array | None] = [None] * layout.num_query_tiles
        for row, found in enumerate(sums):
            tile, first = layout.query_tile(row)
            out, others = found.weighted / found.total, tiles[tile]
            tiles[tile] = out if others is None else jnp.where(number >= first, out, others)
        for tile, out in enumerate(tiles):
            assert out is not None
            place = pl.ds(tile * layout.queries_in_tile, layout.queries_in_tile)
            out_ref[seq, place] = out.astype(out_ref.dtype)

    def attend_block(buffer: int, slot: int, place: _Place, row: int, size: int) -> Steps:
        """Attend to the cached keys of a block, as many as may be valid, by itself."""
        seq, block = place
        oldest = None
        if kernel.sliding_window is not None:
            oldest = num_cached(seq) - kernel.sliding_window - block * num_keys
        return cached_sums(
            queries(seq, row),
            buffer_ref,
            (buffer, slot),
            row,
            layout,
            num_keys=size,
            valid=num_valid(place),
            oldest=oldest,
            sm_scale=kernel.sm_scale,
            soft_cap=kernel.soft_cap,
        )

    def attend_new(seq: Number, row: int) -> Sums:
        """Attend to the sequence's new token: what its sums begin with."""
        key, value = load_kv(new_kv_ref, (seq,), row, layout, is_single=True)
        return sums_of_one(
            queries(seq, row), key, value, sm_scale=kernel.sm_scale, soft_cap=kernel.soft_cap
        )

    def attend_blocks(buffer: int, places: list[_Place]) -> list[list[Sums]]:
        """The sums of each block and row, over as few keys as hold what is valid of all blocks."""

        def attend(size: int) -> list[list[Sums]]:
            for slot, place in enumerate(places):
                clear_behind(buffer_ref, (buffer, slot), layout, num_valid(place), size)
            found = interleaved_sums(
                [
                    attend_block(buffer, slot, place, row, size)
                    for slot, place in enumerate(places)
                    for row in rows
                ],
                behind=_CHAINS_BEHIND,
            )
            return [found[slot * len(rows) : (slot + 1) * len(rows)] for slot in slots]

        most = functools.reduce(larger, [num_valid(place) for place in places])
        return choose([(most <= size, functools.partial(attend, size)) for size in sizes])

    def attend_group(buffer: int, places: list[_Place], sums: list[Sums]) -> list[Sums]:
        wait_for_reads(buffer, places)
        found = attend_blocks(buffer, places)
        sums = list(sums)
        for place, of_block in zip(places, found, strict=True):
            seq, block = place
            is_first = block == first_block(seq)
            for row in range(layout.num_rows):
                before = attend_new(seq, row).where(is_first, sums[row])
                sums[row] = before.merge(of_block[row])
            # Written after each block, and right after the last one.
            write_outputs(seq, sums)
            start_writing(place)
        return sums

    num_buffers = kernel.blocks.num_buffers

    def clear_output(seq: Number) -> None:
        out_ref[seq] = jnp.zeros(out_ref.shape[1:], out_ref.dtype)

    repeat(kernel.num_seqs, clear_output, first=num_seqs)

    def read_next(buffer: int, places: list[_Place], place: _Place):
        """Read a group of blocks, and have the page table's lines of the next one brought."""
        start_reading(buffer, places)
        following, place = take(place)
        for copy in line_copies((buffer + 1) % num_buffers, following):
            copy.start()
        return following, place

    def attend_round(carry):
        groups, following, place, sums = carry
        groups = list(groups)
        for buffer, places in enumerate(groups):
            sums = attend_group(buffer, places, sums)
            groups[buffer] = following
            following, place = read_next(buffer, following, place)
        return groups, following, place, sums

    groups = []
    start: _Place = (0, 0) if is_constant else (jnp.int32(0), first_blocks_ref[0])
    following, place = take(start)
    for copy in line_copies(0, following):
        copy.start()
    for buffer in range(num_buffers):
        groups.append(following)
        following, place = read_next(buffer, following, place)
    nothing = jnp.zeros((layout.queries_in_tile, LANES), jnp.float32)
    carry = groups, following, place, [Sums(nothing, nothing, nothing)] * layout.num_rows
    if is_constant:
        num_blocks = (last_block(0) + 1) * kernel.num_seqs
        for _ in range(ceil_div(num_blocks, num_buffers * kernel.blocks.group)):
            carry = attend_round(carry)
    else:
        carry = lax.fori_loop(0, counts_ref[1], lambda _, carry: attend_round(carry), carry)
    # The blocks that were read last are empty: nothing of them is left to wait for.
    for copy in line_copies(0, carry[1]):
        copy.wait()

    def wait_for_write(_: Number) -> None:
        pltpu.make_async_copy(new_kv_ref.at[0], new_kv_ref.at[0], write_sem).wait()

    repeat(num_seqs, wait_for_write)
