"""What one step attends: the layout of its token axis and where each sequence's pages lie.

Apart from the implementations' choice so that these can import it. Knows no cache layout.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

Cache = Any
"""A pytree of arrays that only the attention implementation which made it understands."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Which tokens one step computes, and where their sequences' keys and values lie.

    The token axis is decode rows first, chunk tokens after, both padded to the bucket:

        token   0 .. num_decodes-1 | padding | chunk 0 | chunk 1 | .. | padding
                <--- num_decode_rows ------->  <----- num_chunk_tokens ------->
        row     0 .. num_decode_rows-1         num_decode_rows + chunk index

    Attributes:
        position_T: int32, position of each token in its sequence; -1 = padding.
        row_T: int32, sequence row of each token; any valid row for padding.
        page_indices: int32 [R, pages_per_seq], pages of each row; entries past `kv_lens` may be
            anything and are never attended.
        kv_lens: int32 [R], cached tokens per row, this step's included; 0 = padding row.
        cu_chunk_lens: int32 [num_chunks + 1], offsets of the chunks within the chunk tokens.
        num_decodes: int32 [], real decode rows.
        page_size: Tokens in a page (static).
        num_decode_rows: Decode rows, padding included (static).
    """

    position_T: jax.Array
    row_T: jax.Array
    page_indices: jax.Array
    kv_lens: jax.Array
    cu_chunk_lens: jax.Array
    num_decodes: jax.Array
    page_size: int = field(metadata={"static": True})
    num_decode_rows: int = field(metadata={"static": True})

    def places(self) -> tuple[jax.Array, jax.Array]:
        """Each token's page and its offset in it, int32 [T]; padding goes to page 0."""
        is_token_T = self.position_T >= 0
        entry_T = jnp.maximum(self.position_T, 0) // self.page_size
        page_T = jnp.where(is_token_T, self.page_indices[self.row_T, entry_T], 0)
        return page_T, jnp.where(is_token_T, self.position_T % self.page_size, 0)

    def without_chunks(self) -> "AttentionMetadata":
        """The same step's decode rows alone."""
        rows = self.num_decode_rows
        return replace(
            self,
            position_T=self.position_T[:rows],
            row_T=self.row_T[:rows],
            page_indices=self.page_indices[:rows],
            kv_lens=self.kv_lens[:rows],
            cu_chunk_lens=self.cu_chunk_lens[:1],
        )

    @property
    def num_chunk_tokens(self) -> int:
        """Chunk tokens, padding included (static)."""
        return self.position_T.shape[0] - self.num_decode_rows

    @property
    def num_chunks(self) -> int:
        """Chunk rows, padding included (static)."""
        return self.cu_chunk_lens.shape[0] - 1
