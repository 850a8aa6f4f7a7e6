"""How keys and values lie in a TPU's KV cache: in rows of 128 lanes of 32 bits.

Heads come before positions: a page is `[rows, page_size, 128]`, so that one head's keys of
consecutive tokens are whole vector registers, whatever the number of heads, and one page is one
copy. A bfloat16 row holds a key in the low half of each lane and its value in the high half: both
come with one load, and a token's row can be written by itself, which a packed register of bfloat16
does not allow. In float32 keys and values are rows of their own, all keys first.

Heads narrower than a row share one, side by side:

    head_dim 64     lanes   0 .. 63    64 .. 127
                    row 0   head 0     head 1
                    row 1   head 2     zeros       (3 heads)

Queries of such heads are zero in the other heads' lanes, so that a product over all 128 lanes is
theirs alone, and of its output each takes its own lanes. The rest need not know of narrow heads.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Sizes of one shard's cache rows and of the queries that meet them.

    Attributes:
        num_heads: N, query heads.
        num_kv_heads: K.
        head_dim: H, a divisor of 128.
        is_float32: Whether the cache holds float32, else bfloat16.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_float32: bool

    @property
    def heads_per_row(self) -> int:
        return LANES // self.head_dim

    @property
    def num_rows(self) -> int:
        """Rows that are attended: of a head, or of the narrow heads that share one."""
        return -(-self.num_kv_heads // self.heads_per_row)

    @property
    def num_stored_rows(self) -> int:
        """Rows of a token in the cache."""
        return self.num_rows * (2 if self.is_float32 else 1)

    @property
    def queries_per_row(self) -> int:
        """Query vectors of one token that meet the same row."""
        return self.num_heads // self.num_kv_heads * self.heads_per_row

    @property
    def queries_in_tile(self) -> int:
        """Query vectors of a token that are multiplied together: whole registers.

        Those of several rows, where a row's own fill no register: a product of one query vector
        takes as long as one of eight.
        """
        own = self.queries_per_row
        return SUBLANES if SUBLANES % own == 0 else -(-own // SUBLANES) * SUBLANES

    @property
    def num_query_tiles(self) -> int:
        return -(-self.num_rows // self._rows_per_tile)

    def query_tile(self, row: int) -> tuple[int, int]:
        """Of a row: its tile, and where in it its own queries begin."""
        tile, place = divmod(row, self._rows_per_tile)
        return tile, place * self.queries_per_row

    @property
    def stored_dtype(self) -> DTypeLike:
        return jnp.float32 if self.is_float32 else jnp.uint32

    def pack_kv(self, k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
        """Lay keys and values out as the cache has them: [T, num_stored_rows, 128]."""
        k, v = (self._in_rows(x_TKH) for x_TKH in (k_TKH, v_TKH))
        if self.is_float32:
            return jnp.concatenate([k, v], axis=1).astype(jnp.float32)
        low, high = (
            jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
            for x in (k, v)
        )
        return low | (high << 16)

    def split_queries(self, q_TNH: jax.Array) -> jax.Array:
        """Queries by the row that they meet: [T, num_rows, queries_per_row, 128]."""
        T, N, H = q_TNH.shape
        K, P, R = self.num_kv_heads, self.heads_per_row, self.num_rows
        if P == 1:
            return q_TNH.reshape(T, R, N // K, H)
        q_TKGH = q_TNH.reshape(T, K, N // K, H)
        q_TKGH = jnp.pad(q_TKGH, ((0, 0), (0, R * P - K), (0, 0), (0, 0)))
        q = q_TKGH.reshape(T, R, P, N // K, H)
        own = jnp.eye(P, dtype=q.dtype)[None, None, :, None, :, None]
        # [T, R, P, G, P, H]: zero where the lanes are another head's.
        return (q[:, :, :, :, None, :] * own).reshape(T, R, P * (N // K), LANES)

    def join_outputs(self, out: jax.Array) -> jax.Array:
        """[T, num_rows, queries_per_row, 128] back to [T, N, H]: of each query its head's lanes."""
        T, R = out.shape[:2]
        K, P, H = self.num_kv_heads, self.heads_per_row, self.head_dim
        G = self.num_heads // K
        if P == 1:
            return out.reshape(T, self.num_heads, H)
        split = out.reshape(T, R, P, G, P, H)
        own = jnp.stack([split[:, :, head, :, head] for head in range(P)], axis=2)
        return own.reshape(T, R * P, G, H)[:, :K].reshape(T, self.num_heads, H)

    def tile_queries(self, q_TNH: jax.Array) -> jax.Array:
        """Queries by tile: [T, num_query_tiles * queries_in_tile, 128].

        Where a row's queries fill a register, or eight heads do, these are the queries as they are.
        """
        split = self.split_queries(q_TNH)
        T, R = split.shape[:2]
        padded_rows = self.num_query_tiles * self._rows_per_tile
        missing = self.queries_in_tile // self._rows_per_tile - self.queries_per_row
        split = jnp.pad(split, ((0, 0), (0, padded_rows - R), (0, missing), (0, 0)))
        return split.reshape(T, -1, LANES)

    def untile_outputs(self, out: jax.Array) -> jax.Array:
        """What comes out for `tile_queries`, as [T, N, H]."""
        per_row = self.queries_in_tile // self._rows_per_tile
        split = out.reshape(out.shape[0], -1, per_row, LANES)
        return self.join_outputs(split[:, : self.num_rows, : self.queries_per_row])

    @property
    def _rows_per_tile(self) -> int:
        own = self.queries_per_row
        return SUBLANES // own if SUBLANES % own == 0 else 1

    def _in_rows(self, x_TKH: jax.Array) -> jax.Array:
        T, K, _ = x_TKH.shape
        padded = jnp.pad(x_TKH, ((0, 0), (0, self.num_rows * self.heads_per_row - K), (0, 0)))
        return padded.reshape(T, self.num_rows, LANES)
