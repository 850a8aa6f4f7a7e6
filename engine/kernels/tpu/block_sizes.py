"""How much the TPU's attention kernels take at once, by chip, heads and page size.

Sizes come from `block_sizes.json`, which `scripts/tune_attention.py` makes, where it has a row for
the chip and heads; else, and wherever a row's sizes do not fit the case, from a rule.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from engine.errors import CapacityError
from engine.kernels.tpu.chunks import ChunkBlocks
from engine.kernels.tpu.decode import DecodeBlocks
from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.tpu_slice import GENERATIONS

BLOCK_SIZES = Path(__file__).with_name("block_sizes.json")

_WORD_BYTES = 4
_FEWEST_KEYS = 128
_MOST_KEYS = 2048
_TILE_QUERIES = 256
_VMEM_SHARE = 0.5
"""Of the chip's vector memory, what a kernel may take; into the rest the compiler brings the next
products' weights while the kernel runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlocks:
    """Sizes of both kernels."""

    decode: DecodeBlocks
    chunk: ChunkBlocks
    vmem_limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedRow:
    """Sizes that the static profile found best for bfloat16; None = it could not tell."""

    generation: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    decode: DecodeBlocks | None
    chunk: ChunkBlocks | None

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        return (
            *(self.generation, self.num_heads, self.num_kv_heads, self.head_dim),
            self.page_size,
        )

    @staticmethod
    def read(path: Path = BLOCK_SIZES) -> list["TunedRow"]:
        return [
            TunedRow(
                **fields,
                decode=DecodeBlocks(**decode) if decode else None,
                chunk=ChunkBlocks(**chunk) if chunk else None,
            )
            for fields in json.loads(path.read_text(encoding="utf-8"))
            for decode, chunk in [(fields.pop("decode"), fields.pop("chunk"))]
        ]

    @staticmethod
    def write(rows: Iterable["TunedRow"], path: Path) -> None:
        lines = ",\n".join(json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.key))
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def choose_blocks(
    layout: RowLayout,
    *,
    page_size: int,
    max_len: int,
    num_chunk_tokens: int,
    chip: pltpu.TpuInfo,
) -> AttentionBlocks:
    """Choose sizes that fit the chip.

    Args:
        layout: Of one shard.
        page_size: Tokens in a page.
        max_len: Of a sequence, in tokens: longer blocks would be empty at their ends.
        num_chunk_tokens: Of a step, all chunks together.
        chip: As `pltpu.get_tpu_info_for_chip` gives it.

    Raises:
        CapacityError: Not even the smallest blocks fit.
    """
    chosen = choose_by_rule(
        layout,
        page_size=page_size,
        max_len=max_len,
        num_chunk_tokens=num_chunk_tokens,
        chip=chip,
    )
    decode, chunk = chosen.decode, chosen.chunk
    rows = _rows_by_distance(layout, page_size, chip)
    for row in rows:
        if row.decode and _is_whole(row.decode.num_keys, page_size, max_len):
            decode = row.decode
            break
    for row in rows:
        # A step of few tokens has fewer tiles than the ones that were tuned.
        if (
            row.chunk
            and row.chunk.num_queries == chunk.num_queries
            and _is_whole(row.chunk.num_keys, page_size, max_len)
        ):
            chunk = _within(row.chunk, chunk.num_tiles)
            break
    blocks = replace(chosen, decode=decode, chunk=chunk)
    _check(blocks, layout, page_size)
    return blocks


def choose_by_rule(
    layout: RowLayout,
    *,
    page_size: int,
    max_len: int,
    num_chunk_tokens: int,
    chip: pltpu.TpuInfo,
) -> AttentionBlocks:
    """As `choose_blocks`, but from nothing that was measured, and without a check."""
    limit = int(chip.vmem_capacity_bytes * _VMEM_SHARE)
    token_bytes = layout.num_stored_rows * LANES * _WORD_BYTES
    # Half of that for the buffers.
    group, num_buffers = (2, 3) if layout.num_rows <= 2 else (1, 3)
    most = limit // 2 // (num_buffers * group * token_bytes)
    longest = min(_MOST_KEYS, 1 << (max_len - 1).bit_length())
    num_keys = max(page_size, _FEWEST_KEYS, min(longest, _power_of_two_below(most)))
    return AttentionBlocks(
        decode=DecodeBlocks(num_keys=num_keys, group=group, num_buffers=num_buffers),
        chunk=_chunk_blocks(layout, page_size, longest, num_chunk_tokens, limit),
        vmem_limit_bytes=limit,
    )


def _rows_by_distance(layout: RowLayout, page_size: int, chip: pltpu.TpuInfo) -> list[TunedRow]:
    """The rows for such heads on such a chip, that of the most similar page size first."""
    if layout.is_float32 or not BLOCK_SIZES.exists():
        return []
    names: dict[Any, str] = {
        pltpu.ChipVersion[kind.version]: name for name, kind in GENERATIONS.items()
    }
    key = (
        *(names.get(chip.chip_version), layout.num_heads, layout.num_kv_heads),
        layout.head_dim,
    )
    found = [row for row in TunedRow.read() if row.key[:-1] == key]

    def ratio(row: TunedRow) -> float:
        return max(row.page_size, page_size) / min(row.page_size, page_size)

    return sorted(found, key=ratio)


def _is_whole(num_keys: int, page_size: int, max_len: int) -> bool:
    return num_keys % page_size == 0 and num_keys < 2 * max(max_len, _FEWEST_KEYS)


def _within(chunk: ChunkBlocks, num_tiles: int) -> ChunkBlocks:
    most = min(chunk.num_tiles, num_tiles)
    return replace(
        chunk,
        num_tiles=most,
        num_beside=min(chunk.num_beside, most),
        num_careful=min(chunk.num_careful, most),
    )


def _check(blocks: AttentionBlocks, layout: RowLayout, page_size: int) -> None:
    for needed in (blocks.decode.vmem_bytes(layout), blocks.chunk.vmem_bytes(layout)):
        if needed > blocks.vmem_limit_bytes:
            raise CapacityError(
                f"Attention needs {needed / 2**20:.0f} MiB of a chip's vector memory for pages of "
                f"{page_size} tokens and {layout.num_kv_heads} kv heads a chip, of which it may "
                f"take {blocks.vmem_limit_bytes / 2**20:.0f} MiB. Lower --page-size, or shard over "
                "more chips with --tp-size."
            )


def _chunk_blocks(
    layout: RowLayout, page_size: int, longest: int, num_tokens: int, limit: int
) -> ChunkBlocks:
    num_rows = layout.num_rows
    num_queries = _TILE_QUERIES if num_tokens * layout.queries_per_row > LANES else LANES
    tiles = max(1, -(-num_tokens * layout.queries_per_row // num_queries))
    most_keys = 1024 if num_rows == 1 else 512
    blocks = ChunkBlocks(
        num_queries=num_queries,
        num_tiles=min(tiles, 8 if num_rows > 4 else 16),
        num_keys=max(page_size, _FEWEST_KEYS, min(most_keys, longest)),
        # In float32 products are six, and code is as long.
        num_beside=1 if layout.is_float32 else max(1, min(tiles, 4, 32 // num_rows)),
        num_careful=1 if layout.is_float32 else max(1, min(tiles, 4, 8 // num_rows)),
    )
    # The rest is for what the compiler spills.
    most = limit * 3 // 4
    while blocks.num_tiles > 1 and blocks.vmem_bytes(layout) > most:
        blocks = replace(blocks, num_tiles=blocks.num_tiles // 2)
    while blocks.num_keys > max(page_size, _FEWEST_KEYS) and blocks.vmem_bytes(layout) > most:
        blocks = replace(blocks, num_keys=blocks.num_keys // 2)
    return _within(blocks, blocks.num_tiles)


def _power_of_two_below(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)
