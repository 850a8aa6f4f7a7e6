"""Choose the block sizes of the TPU's attention kernels by the compiler's static profile.

    python scripts/tune_attention.py
    python scripts/tune_attention.py --generation v6e --page-size 64

Writes engine/kernels/tpu/block_sizes.json after each row, and leaves rows alone that it has; so a
run that was stopped goes on where it was. Needs no TPU. A generation that the profile cannot tell
of gets no row, and the kernels choose by rule.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from engine.errors import CapacityError
from engine.kernels.tpu.block_sizes import BLOCK_SIZES, AttentionBlocks, TunedRow, choose_by_rule
from engine.kernels.tpu.chunks import ChunkBlocks
from engine.kernels.tpu.decode import DecodeBlocks
from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.kernels.tpu.static_profile import ChunkProfile, DecodeProfile, profile
from engine.topology import chip_of
from engine.tpu_slice import GENERATIONS, chip_kind

HEADS = [(8, 8, 128), (7, 1, 128), (8, 2, 128), (4, 4, 128), (8, 1, 128), (14, 2, 64)]
"""Query heads, kv heads and head_dim of one chip's share of Qwen's models."""

PAGE_SIZES = (64, 16, 128)
CONTEXT = 2048
PROFILED_TILES = 4
MARGIN = 0.98
"""Of the rule's cycles, what a choice must stay below to take its place."""

Blocks = TypeVar("Blocks", DecodeBlocks, ChunkBlocks)

logger = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generation", choices=GENERATIONS, action="append", help="default: all")
    parser.add_argument("--page-size", type=int, action="append", help="default: 16, 64 and 128")
    parser.add_argument("--output", type=Path, default=BLOCK_SIZES, help="default: %(default)s")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = TunedRow.read(arguments.output) if arguments.output.exists() else []
    known = {row.key for row in rows}
    wanted = product(arguments.page_size or PAGE_SIZES, arguments.generation or GENERATIONS, HEADS)
    todo = [case for case in wanted if (case[1], *case[2], case[0]) not in known]
    for page_size, generation, heads in (bar := tqdm(todo, disable=not sys.stderr.isatty())):
        bar.set_description(f"{generation} {heads} page {page_size}")
        num_heads, num_kv_heads, head_dim = heads
        layout = RowLayout(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, is_float32=False
        )
        rule = choose_by_rule(
            layout,
            page_size=page_size,
            max_len=2 * CONTEXT,
            num_chunk_tokens=CONTEXT,
            chip=chip_of(generation),
        )
        case = generation, layout, page_size
        decode = best(
            decode_candidates(rule),
            partial(decode_cost, *case),
            lowest_cost=memory_cycles(generation, layout),
        )
        chunk = None
        # It computes more than it reads: one page size tells for all.
        if page_size == PAGE_SIZES[0]:
            chunk = best(chunk_candidates(rule), partial(chunk_cost, *case))
        if decode is None and chunk is None:
            continue
        rows.append(
            TunedRow(
                generation=generation,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                page_size=page_size,
                decode=decode,
                chunk=chunk,
            )
        )
        TunedRow.write(rows, arguments.output)
    return 0


def best(
    candidates: Iterator[Blocks], cost_of: Callable[[Blocks], float], *, lowest_cost: float = 0
) -> Blocks | None:
    """The cheapest one, or the first one that costs no more than any can.

    The first one, too, if the others are hardly cheaper; None if it has no cost.
    """
    chosen = next(candidates)
    try:
        cost = cost_of(chosen)
    except CapacityError as error:
        logger.info("cannot be profiled: %s", str(error).splitlines()[0])
        return None
    cost *= MARGIN
    for blocks in candidates:
        if cost <= lowest_cost:
            break
        try:
            found = cost_of(blocks)
        except CapacityError:
            continue
        if found < cost:
            chosen, cost = blocks, found
    return chosen


def decode_candidates(rule: AttentionBlocks) -> Iterator[DecodeBlocks]:
    yield rule.decode
    for num_keys, group in ((1024, 2), (2048, 3 - rule.decode.group)):
        yield replace(rule.decode, num_keys=num_keys, group=group)


def chunk_candidates(rule: AttentionBlocks) -> Iterator[ChunkBlocks]:
    yield rule.chunk
    num_keys = 1536 - rule.chunk.num_keys
    yield replace(rule.chunk, num_keys=num_keys)
    yield replace(rule.chunk, num_beside=max(1, rule.chunk.num_beside // 2))


def decode_cost(generation: str, layout: RowLayout, page_size: int, blocks: DecodeBlocks) -> float:
    """Cycles a sequence."""
    few, many = (
        profile(
            DecodeProfile(
                generation=generation,
                layout=layout,
                page_size=page_size,
                context=CONTEXT,
                rounds=rounds,
                blocks=blocks,
            )
        )
        for rounds in (1, 2)
    )
    return (many.cycles - few.cycles) / (many.batch - few.batch)


def memory_cycles(generation: str, layout: RowLayout) -> float:
    """Cycles in which the memory brings a sequence; no sizes can make it faster."""
    num_bytes = CONTEXT * layout.num_stored_rows * LANES * 4
    return num_bytes / chip_of(generation).mem_bw_bytes_per_second * chip_kind(generation).clock_hz


def chunk_cost(generation: str, layout: RowLayout, page_size: int, blocks: ChunkBlocks) -> float:
    """Cycles of a few tiles: each costs the same, and compiling all of them takes minutes."""
    blocks = replace(blocks, num_tiles=min(PROFILED_TILES, blocks.num_tiles))
    length = blocks.num_tiles * blocks.tokens_per_tile(layout.queries_per_row)
    case = ChunkProfile(
        generation=generation,
        layout=layout,
        page_size=page_size,
        start=CONTEXT,
        length=length,
        blocks=blocks,
    )
    return profile(case).cycles


if __name__ == "__main__":
    sys.exit(main())
