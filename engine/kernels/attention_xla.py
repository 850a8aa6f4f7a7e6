"""Ragged paged attention as a flash loop in plain XLA: for CPUs, GPUs, and as the TPU's oracle.

Keys are visited in blocks at fixed absolute boundaries (0, S, 2S, ..), whatever else is in the
batch, and a block that a token may not see leaves its sums untouched to the last bit: so a token's
result does not depend on the batch, the chunk sizes, or whether it was a prefill or a decode. Time
goes with the sequences' lengths: the loops' trip counts are read from `kv_lens`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engine.kernels.head_pages import gather_pages
from engine.kernels.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """How much one turn of the loops takes; the same for all programs of an engine.

    Attributes:
        num_keys: Of the inner loop, a multiple of the page size, or less than a page for one page.
        num_queries: Tokens of a chunk in one turn of the outer loop.
        num_decodes: Decode rows in one turn of the outer loop, and never more than half of them
            all: a row that decodes alone does not carry its padding along. None = all at once.
    """

    num_keys: int
    num_queries: int
    num_decodes: int | None


CPU_BLOCKS = BlockSizes(num_keys=128, num_queries=128, num_decodes=8)
"""What stays in the cores' caches between being gathered and being read.

Milliseconds of one layer of Qwen3-0.6B's shape, 64 keys and all rows at once, then 128 keys and
these rows: one row at 320 tokens 0.45, 0.35; 32 rows at 128 2.2, 1.9, at 512 9.2, 6.4.
"""

DEVICE_BLOCKS = BlockSizes(num_keys=256, num_queries=64, num_decodes=None)

LOWEST_SCORE = -1e30
"""Below every real score, but finite: its difference with itself is 0, not not-a-number."""


def flash_attention(
    q_TNH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None,
    blocks: BlockSizes = CPU_BLOCKS,
) -> jax.Array:
    """Attend every token to the pages of its own sequence, causally.

    Args:
        q_TNH: Queries of one shard's heads, decode rows first.
        k_pages: [num_pages, K, page_size, H], this step's keys included.
        v_pages: The same of values.
        metadata: The step's.
        sm_scale: Factor on the scores.
        sliding_window: Positions attended, the token's own included; None = all.
        blocks: Sizes of the loops' turns.

    Returns:
        [T, N, H] in the dtype of `q_TNH`; padding rows are zero.
    """
    loop = _KeyLoop(k_pages, v_pages, metadata, sm_scale, sliding_window, blocks)
    num_decode_rows = metadata.num_decode_rows
    parts = []
    if num_decode_rows:
        with jax.named_scope("attend_decodes"):
            parts.append(_attend_decodes(q_TNH[:num_decode_rows], loop))
    if metadata.num_chunk_tokens:
        with jax.named_scope("attend_chunks"):
            parts.append(_attend_chunks(q_TNH[num_decode_rows:], loop))
    return jnp.concatenate(parts)


class _KeyLoop:
    """The inner loop over key blocks, for a batch of B sequences with M query rows a kv head."""

    def __init__(
        self,
        k_pages: jax.Array,
        v_pages: jax.Array,
        metadata: AttentionMetadata,
        sm_scale: float,
        sliding_window: int | None,
        blocks: BlockSizes,
    ) -> None:
        self.metadata = metadata
        self.blocks = blocks
        self.num_kv_heads = k_pages.shape[1]
        self._k_pages = k_pages
        self._v_pages = v_pages
        self._sm_scale = sm_scale
        self._sliding_window = sliding_window
        pages_per_seq = metadata.page_indices.shape[1]
        self._pages_per_block = min(max(1, blocks.num_keys // metadata.page_size), pages_per_seq)
        self._block_len = self._pages_per_block * metadata.page_size
        # A slice that would run over the table's end would be moved, off the fixed boundaries.
        surplus = -pages_per_seq % self._pages_per_block
        self.page_indices = jnp.pad(metadata.page_indices, ((0, 0), (0, surplus)))

    def run(
        self,
        q_BKMH: jax.Array,
        position_BM: jax.Array,
        page_indices: jax.Array,
        kv_lens: jax.Array,
    ) -> jax.Array:
        """Attend M query rows of each of B sequences.

        Args:
            q_BKMH: M is at least 2: products with one row are summed in another order.
            position_BM: Positions of the query rows; -1 sees nothing and gets zeros.
            page_indices: [B, pages_per_seq], padded to whole blocks.
            kv_lens: [B], keys that exist.

        Returns:
            float32 [B, K, M, H].
        """
        B, K, M, H = q_BKMH.shape
        block_len = self._block_len
        num_blocks = jnp.max((kv_lens + block_len - 1) // block_len)
        first_block = jnp.int32(0)
        if self._sliding_window is not None:
            lowest = jnp.where(position_BM >= 0, position_BM, jnp.iinfo(jnp.int32).max)
            lowest_seen = jnp.maximum(jnp.min(lowest) - self._sliding_window + 1, 0)
            first_block = jnp.minimum(lowest_seen // block_len, num_blocks)

        def attend_block(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
            best_BKM, total_BKM, sum_BKMH = carry
            page_ids = jax.lax.dynamic_slice_in_dim(
                page_indices, index * self._pages_per_block, self._pages_per_block, axis=1
            )
            key_position_S = index * block_len + jnp.arange(block_len, dtype=jnp.int32)
            is_cached_BS = key_position_S[None, :] < kv_lens[:, None]
            k_BKSH = gather_pages(self._k_pages, page_ids)
            # Pages hold what was left in them; 0 * not-a-number would come through the sum.
            v_BKSH = jnp.where(
                is_cached_BS[:, None, :, None], gather_pages(self._v_pages, page_ids), 0
            )
            is_seen_BMS = (key_position_S[None, None, :] <= position_BM[:, :, None]) & (
                is_cached_BS[:, None, :]
            )
            if self._sliding_window is not None:
                oldest_BM = position_BM - self._sliding_window
                is_seen_BMS &= key_position_S[None, None, :] > oldest_BM[:, :, None]

            score_BKMS = _einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH) * self._sm_scale
            score_BKMS = jnp.where(is_seen_BMS[:, None], score_BKMS, -jnp.inf)
            higher_BKM = jnp.maximum(best_BKM, jnp.max(score_BKMS, axis=-1))
            decay_BKM = jnp.exp(best_BKM - higher_BKM)
            weight_BKMS = jnp.exp(score_BKMS - higher_BKM[..., None])
            total_BKM = total_BKM * decay_BKM + jnp.sum(weight_BKMS, axis=-1)
            added_BKMH = _einsum("BKMS,BKSH->BKMH", weight_BKMS.astype(v_BKSH.dtype), v_BKSH)
            return higher_BKM, total_BKM, sum_BKMH * decay_BKM[..., None] + added_BKMH

        start = (
            jnp.full((B, K, M), LOWEST_SCORE, jnp.float32),
            jnp.zeros((B, K, M), jnp.float32),
            jnp.zeros((B, K, M, H), jnp.float32),
        )
        _, total_BKM, sum_BKMH = jax.lax.fori_loop(first_block, num_blocks, attend_block, start)
        return sum_BKMH / jnp.maximum(total_BKM, 1e-30)[..., None]


def _attend_decodes(q_BNH: jax.Array, loop: _KeyLoop) -> jax.Array:
    """Decode rows, some at a time; M is the group of query heads that share a kv head."""
    B, N, H = q_BNH.shape
    K = loop.num_kv_heads
    G = N // K
    q_BKMH = q_BNH.reshape(B, K, G, H)
    if G == 1:
        q_BKMH = jnp.concatenate([q_BKMH, q_BKMH], axis=2)
    position_BM = jnp.broadcast_to(loop.metadata.position_T[:B, None], (B, q_BKMH.shape[2]))
    rows = (q_BKMH, position_BM, loop.page_indices[:B], loop.metadata.kv_lens[:B])
    num_at_once = loop.blocks.num_decodes
    turn = B if num_at_once is None else math.gcd(B, min(num_at_once, max(1, B // 2)))

    def attend_rows(index: jax.Array, out_BKMH: jax.Array) -> jax.Array:
        some = [jax.lax.dynamic_slice_in_dim(array, index * turn, turn) for array in rows]
        return jax.lax.dynamic_update_slice_in_dim(out_BKMH, loop.run(*some), index * turn, axis=0)

    if turn == B:
        out_BKMH = loop.run(*rows)
    else:
        num_turns = (loop.metadata.num_decodes + turn - 1) // turn
        out_BKMH = jax.lax.fori_loop(
            0, num_turns, attend_rows, jnp.zeros(q_BKMH.shape, jnp.float32)
        )
    return out_BKMH[:, :, :G].reshape(B, N, H).astype(q_BNH.dtype)


def _attend_chunks(q_TNH: jax.Array, loop: _KeyLoop) -> jax.Array:
    """Blocks of each chunk's tokens, one after another; M is the block's tokens times the group.

    With chunks of 5 and 2 tokens and blocks of 4, a block writes all its rows, and the next one
    overwrites the rows that were not its own:

        token    0 1 2 3 4 5 6 . .
        block 0  x x x x
        block 1          x 0 0 0
        block 2            x x 0 0
    """
    T, N, H = q_TNH.shape
    K = loop.num_kv_heads
    G = N // K
    metadata = loop.metadata
    block = min(loop.blocks.num_queries, max(2, T))
    q_TNH = jnp.pad(q_TNH, ((0, block), (0, 0), (0, 0)))
    position_T = jnp.pad(
        metadata.position_T[metadata.num_decode_rows :], (0, block), constant_values=-1
    )
    starts = metadata.cu_chunk_lens[:-1]
    ends = metadata.cu_chunk_lens[1:]
    blocks_per_chunk = (ends - starts + block - 1) // block
    cu_blocks = jnp.cumsum(blocks_per_chunk)

    def attend_query_block(index: jax.Array, out_TNH: jax.Array) -> jax.Array:
        chunk = jnp.sum(cu_blocks <= index)
        first = starts[chunk] + (index - cu_blocks[chunk] + blocks_per_chunk[chunk]) * block
        is_own_T = first + jnp.arange(block, dtype=jnp.int32) < ends[chunk]
        own_position_T = jnp.where(
            is_own_T, jax.lax.dynamic_slice_in_dim(position_T, first, block), -1
        )
        row = metadata.num_decode_rows + chunk
        q_KGTH = jax.lax.dynamic_slice_in_dim(q_TNH, first, block).reshape(block, K, G, H)
        q_KGTH = q_KGTH.transpose(1, 2, 0, 3)
        out_BKMH = loop.run(
            q_KGTH.reshape(1, K, G * block, H),
            jnp.tile(own_position_T, G)[None, :],
            jax.lax.dynamic_slice_in_dim(loop.page_indices, row, 1),
            # Keys past the block's last token are of no use to it.
            jnp.max(own_position_T, keepdims=True) + 1,
        )
        block_TNH = out_BKMH.reshape(K, G, block, H).transpose(2, 0, 1, 3).reshape(block, N, H)
        return jax.lax.dynamic_update_slice_in_dim(
            out_TNH, block_TNH.astype(out_TNH.dtype), first, axis=0
        )

    out_TNH = jax.lax.fori_loop(
        0, cu_blocks[-1], attend_query_block, jnp.zeros_like(q_TNH, shape=(T + block, N, H))
    )
    return out_TNH[:T]


def _einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Contract to float32; operands are read in their own dtype, as converting them costs more."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(
        subscripts, left, right, precision=precision, preferred_element_type=jnp.float32
    )
