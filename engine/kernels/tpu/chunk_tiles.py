"""Chunks' queries in tiles of a fixed number of rows, and which block of the kernel has which.

A tile belongs to one chunk, a block to one, too, and is up to so many tiles that follow each other.
With chunks of 5 and 2 tokens, tiles of 2 tokens and blocks of 2 tiles:

    block 0           block 1           block 2
    | 0 1 | 2 3 |     | 4 - |           | 5 6 |

Knows nothing of keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from engine.kernels.tpu.kv_rows import LANES


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTiles:
    """How the queries of a step's chunks lie in tiles.

    Attributes:
        num_queries: Rows of a tile; those that no whole token fills are empty.
        num_tiles: Of a block.
        queries_per_token: That meet the same row of the cache.
        cu_chunk_lens: int32 [C + 1], offsets of the chunks among the tokens.
        num_tokens: T, padding included.
    """

    num_queries: int
    num_tiles: int
    queries_per_token: int
    cu_chunk_lens: jax.Array
    num_tokens: int

    @property
    def tokens_per_tile(self) -> int:
        return self.num_queries // self.queries_per_token

    @property
    def most_tiles(self) -> int:
        """Of all chunks together, however the tokens are divided among them."""
        return -(-self.num_tokens // self.tokens_per_tile) + min(self._num_chunks, self.num_tokens)

    @property
    def most_blocks(self) -> int:
        return -(-self.most_tiles // self.num_tiles) + min(self._num_chunks, self.num_tokens)

    def tile(self, q: jax.Array) -> jax.Array:
        """[T, num_rows, queries, 128] as [most_tiles, num_rows, num_queries, 128]."""
        number = jnp.arange(self.most_tiles, dtype=jnp.int32)
        chunk = _owner(self._cu_tiles, number)
        in_chunk = (number - self._cu_tiles[chunk]) * self.tokens_per_tile
        in_tile = jnp.arange(self.tokens_per_tile, dtype=jnp.int32)
        token = (self.cu_chunk_lens[chunk] + in_chunk)[:, None] + in_tile[None]
        rows = q[jnp.minimum(token, self.num_tokens - 1)].transpose(0, 2, 1, 3, 4)
        rows = rows.reshape(self.most_tiles, q.shape[1], -1, LANES)
        empty = self.num_queries - rows.shape[2]
        return jnp.pad(rows, ((0, 0), (0, 0), (0, empty), (0, 0)))

    def untile(self, out: jax.Array) -> jax.Array:
        """The tokens of tiles in their own order; anything for tokens of no chunk."""
        used = self.tokens_per_tile * self.queries_per_token
        by_token = out[:, :, :used].reshape(
            *(self.most_tiles, out.shape[1], self.tokens_per_tile, self.queries_per_token, LANES)
        )
        token = jnp.arange(self.num_tokens, dtype=jnp.int32)
        chunk = _owner(self.cu_chunk_lens, token)
        offset = token - self.cu_chunk_lens[chunk]
        tile = self._cu_tiles[chunk] + offset // self.tokens_per_tile
        place = offset % self.tokens_per_tile
        return by_token[jnp.minimum(tile, self.most_tiles - 1), :, place]

    def blocks(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of each block, int32 [most_blocks]: chunk, first tile, offset in the chunk, tokens.

        Blocks behind the last one have no tokens.
        """
        cu_blocks = _cumulative(-(-jnp.diff(self._cu_tiles) // self.num_tiles))
        number = jnp.arange(self.most_blocks, dtype=jnp.int32)
        chunk = _owner(cu_blocks, number)
        tile = (number - cu_blocks[chunk]) * self.num_tiles
        offset = tile * self.tokens_per_tile
        left = jnp.diff(self.cu_chunk_lens)[chunk] - offset
        count = jnp.clip(left, 0, self.num_tiles * self.tokens_per_tile)
        count = jnp.where(number < cu_blocks[-1], count, 0)
        return chunk, self._cu_tiles[chunk] + tile, offset, count

    @property
    def _num_chunks(self) -> int:
        return len(self.cu_chunk_lens) - 1

    @property
    def _cu_tiles(self) -> jax.Array:
        return _cumulative(-(-jnp.diff(self.cu_chunk_lens) // self.tokens_per_tile))


def _cumulative(lengths: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])


def _owner(cumulative: jax.Array, number: jax.Array) -> jax.Array:
    """The chunk with that number among its own; the last one behind them all."""
    found = jnp.searchsorted(cumulative[1:], number, side="right")
    return jnp.minimum(found, len(cumulative) - 2).astype(jnp.int32)
