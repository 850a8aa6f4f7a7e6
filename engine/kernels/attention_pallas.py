"""Attention over a paged KV cache on TPUs, by kernels of our own; an `AttentionBackend`.

Puts together what `engine.kernels.tpu` computes per shard: the layout of pages, one kernel for
decoding sequences and one for chunks. Never asks the device what it is: that is an argument, so
that programs for TPUs can be compiled where there are none.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.metadata import AttentionMetadata
from engine.kernels.tpu.block_sizes import choose_blocks
from engine.kernels.tpu.chunks import attend_chunks
from engine.kernels.tpu.decode import attend_decodes
from engine.kernels.tpu.kv_rows import LANES, RowLayout

_HEADS = P(None, "tp")
_ROWS_OF_PAGES = P(None, None, "tp")


def can_attend_by_pallas(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether the kernels take such keys and values."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and LANES % head_dim == 0


class PallasAttention:
    """Attention by TPU kernels; the cache is [L, num_pages, rows, page_size, 128].

    Args:
        mesh: Heads are sharded over its axis "tp".
        chip: What the kernels are cut to, as `pltpu.get_tpu_info_for_chip` gives it.
        soft_cap: Scores stay within ± it; None = as they are.
        interpret: Run on a CPU, for tests.
    """

    def __init__(
        self,
        mesh: Mesh,
        chip: pltpu.TpuInfo,
        *,
        soft_cap: float | None = None,
        interpret: bool | pltpu.InterpretParams = False,
    ) -> None:
        self._mesh = mesh
        self._chip = chip
        self._soft_cap = soft_cap
        self._interpret = interpret

    def cache_shapes(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> jax.ShapeDtypeStruct:
        """See `AttentionBackend.cache_shapes`."""
        shard_heads = num_kv_heads // self._mesh.size
        layout = _layout(shard_heads, shard_heads, head_dim, dtype)
        return jax.ShapeDtypeStruct(
            (num_layers, num_pages, layout.num_stored_rows * self._mesh.size, page_size, LANES),
            layout.stored_dtype,
            sharding=NamedSharding(self._mesh, _ROWS_OF_PAGES),
        )

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: jax.Array,
        layer: ArrayLike,
        metadata: AttentionMetadata,
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `AttentionBackend.attend`."""
        shard = _Shard(self._chip, sm_scale, sliding_window, self._soft_cap, self._interpret)
        layer = jnp.asarray(layer, jnp.int32)
        return _attend(shard, self._mesh, q_TNH, k_TKH, v_TKH, cache, layer, metadata)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What one device computes of a step's attention."""

    chip: pltpu.TpuInfo
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool | pltpu.InterpretParams

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: jax.Array,
        layer: jax.Array,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, jax.Array]:
        layout = _layout(q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2], k_TKH.dtype)
        blocks = choose_blocks(
            layout,
            page_size=metadata.page_size,
            max_len=metadata.page_indices.shape[1] * metadata.page_size,
            num_chunk_tokens=metadata.num_chunk_tokens,
            chip=self.chip,
        )
        # Merging the leading axes moves nothing.
        pages = cache.reshape(-1, *cache.shape[2:])
        first_page = layer * cache.shape[1]
        rows = metadata.num_decode_rows
        common = {
            "layout": layout,
            "sm_scale": self.sm_scale,
            "sliding_window": self.sliding_window,
            "soft_cap": self.soft_cap,
            "vmem_limit_bytes": blocks.vmem_limit_bytes,
            "interpret": self.interpret,
        }
        out_TNH = None
        if metadata.num_chunk_tokens:
            # Tokens third: whole registers of one head's queries, and the order in which they come
            # out of the product and the rotation.
            q = layout.split_queries(q_TNH).transpose(1, 2, 0, 3)
            out, pages = attend_chunks(
                q,
                layout.pack_kv(k_TKH, v_TKH).swapaxes(0, 1),
                pages,
                metadata.kv_lens[rows:],
                metadata.page_indices[rows:],
                metadata.cu_chunk_lens,
                first_page,
                first_token=rows,
                blocks=blocks.chunk,
                **common,
            )
            out_TNH = layout.join_outputs(out.transpose(2, 0, 1, 3))
        if rows:
            out, pages = attend_decodes(
                layout.tile_queries(q_TNH[:rows]),
                layout.pack_kv(k_TKH[:rows], v_TKH[:rows]),
                pages,
                metadata.kv_lens[:rows],
                metadata.page_indices[:rows],
                metadata.num_decodes,
                first_page,
                blocks=blocks.decode,
                **common,
            )
            decoded_BNH = layout.untile_outputs(out)
            out_TNH = decoded_BNH if out_TNH is None else out_TNH.at[:rows].set(decoded_BNH)
        assert out_TNH is not None, "a step has tokens"
        return out_TNH, pages.reshape(cache.shape)


@partial(jax.jit, static_argnums=(0, 1))
def _attend(shard: _Shard, mesh: Mesh, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    # Compiled as a part of the step; for itself, so that the kernels are traced for one layer and
    # not for each.
    return jax.shard_map(
        shard.attend,
        mesh=mesh,
        in_specs=(_HEADS, _HEADS, _HEADS, _ROWS_OF_PAGES, P(), P()),
        out_specs=(_HEADS, _ROWS_OF_PAGES),
        check_vma=False,
    )(*arrays)


def _layout(num_heads: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> RowLayout:
    return RowLayout(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        is_float32=jnp.dtype(dtype) == jnp.float32,
    )
