"""How much the TPU's attention kernels take at once, by chip, heads and page size."""

from dataclasses import dataclass

from jax.experimental.pallas import tpu as pltpu

from engine.kernels.tpu.chunks import ChunkBlocks
from engine.kernels.tpu.decode import DecodeBlocks
from engine.kernels.tpu.kv_rows import LANES, RowLayout

_WORD_BYTES = 4
_FEWEST_KEYS = 128
_MOST_KEYS = 2048
_CHUNK_TOKENS = 128
_VMEM_SHARE = 0.5
"""Of the chip's vector memory, what a kernel may take; into the rest the compiler brings the next
products' weights while the kernel runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlocks:
    """Sizes of both kernels."""

    decode: DecodeBlocks
    chunk: ChunkBlocks
    vmem_limit_bytes: int


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
    """
    limit = int(chip.vmem_capacity_bytes * _VMEM_SHARE)
    token_bytes = layout.num_stored_rows * LANES * _WORD_BYTES
    # Half of that for the buffers.
    group, num_buffers = (2, 3) if layout.num_rows <= 2 else (1, 3)
    most = limit // 2 // (num_buffers * group * token_bytes)
    longest = min(_MOST_KEYS, 1 << (max_len - 1).bit_length())
    num_keys = max(page_size, _FEWEST_KEYS, min(longest, _power_of_two_below(most)))
    chunk_keys = max(page_size, min(512, num_keys))
    return AttentionBlocks(
        decode=DecodeBlocks(num_keys=num_keys, group=group, num_buffers=num_buffers),
        chunk=ChunkBlocks(
            num_tokens=max(1, min(_CHUNK_TOKENS, num_chunk_tokens)), num_keys=chunk_keys
        ),
        vmem_limit_bytes=limit,
    )


def _power_of_two_below(number: int) -> int:
    return 1 << (max(1, number).bit_length() - 1)
