"""The tokens of a step in tiles, and which block of the chunk kernel attends which of them.

Tiles divide the whole token axis, wherever chunks begin, so that queries and outputs stay as they
lie; two chunks may share a tile. A block belongs to one chunk and is up to so many tiles that
follow each other, of which each has at least one token of the chunk. With two decodes, chunks of 5
and 2 tokens, tiles of 4 tokens and blocks of 2 tiles:

    tiles      | d d 0 1 | 2 3 4 5 | 6 - - - |
    blocks       0 . . .   . . .                  chunk 0: its own tokens 0 to 4
                             1 .     .            chunk 1

Knows nothing of keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTiles:
    """How a step's tokens lie in tiles.

    Attributes:
        tokens_per_tile: Of the last one some may be missing.
        num_tiles: Of a block, at most.
        first_token: Before it are tokens of no chunk.
        cu_chunk_lens: int32 [C + 1], offsets of the chunks among the tokens from there on.
        num_tokens: T, all of them.
    """

    tokens_per_tile: int
    num_tiles: int
    first_token: int
    cu_chunk_lens: jax.Array
    num_tokens: int

    @property
    def num_tiles_in_all(self) -> int:
        return -(-self.num_tokens // self.tokens_per_tile)

    @property
    def most_blocks(self) -> int:
        """However the tokens are divided among chunks: each may have two tiles that are not whole,
        and a block that is not."""
        num_chunks = min(len(self.cu_chunk_lens) - 1, self.num_tokens)
        whole = self.num_tokens // (self.tokens_per_tile * self.num_tiles)
        return whole + num_chunks + num_chunks // self.num_tiles + 1

    def blocks(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each block, int32 [most_blocks]: chunk, first tile, and how many tiles.

        Blocks behind the last one have none.
        """
        start = self.first_token + self.cu_chunk_lens[:-1]
        stop = self.first_token + self.cu_chunk_lens[1:]
        first_tile = start // self.tokens_per_tile
        tiles = jnp.where(stop > start, -(-stop // self.tokens_per_tile) - first_tile, 0)
        num_blocks = -(-tiles // self.num_tiles)
        cu_blocks = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_blocks)])
        cu_blocks = cu_blocks.astype(jnp.int32)
        number = jnp.arange(self.most_blocks, dtype=jnp.int32)
        # The chunk with that block among its own; the last one behind them all.
        chunk = jnp.searchsorted(cu_blocks[1:], number, side="right")
        chunk = jnp.minimum(chunk, len(tiles) - 1).astype(jnp.int32)
        done = (number - cu_blocks[chunk]) * self.num_tiles
        count = jnp.clip(tiles[chunk] - done, 0, self.num_tiles)
        count = jnp.where(number < cu_blocks[-1], count, 0)
        return chunk, (first_tile[chunk] + done).astype(jnp.int32), count.astype(jnp.int32)
