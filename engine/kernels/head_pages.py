"""The KV cache with heads before positions, and attention over it, one shard of heads per device.

One pair of arrays a layer, `[num_pages, K, page_size, H]`: on CPUs a dot over `[K, S, H]` reads
keys several times faster than one over `[S, K, H]`, and a page is one contiguous copy. Knows
nothing of how scores are computed: that is the function it is given.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.metadata import AttentionMetadata

LayerPages = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each [num_pages, K, page_size, H]."""

ScoreFunction = Callable[..., jax.Array]
"""`f(q_TNH, k_pages, v_pages, metadata, *, sm_scale, sliding_window) -> out_TNH`."""


class HeadPagesAttention:
    """Attention over pages of `[K, page_size, H]`; an `AttentionBackend`.

    Args:
        mesh: Heads are sharded over its axis "tp".
        score_function: Attends the queries of one shard to the pages of that shard.
    """

    def __init__(self, mesh: Mesh, score_function: ScoreFunction) -> None:
        self._mesh = mesh
        self._score_function = score_function

    def cache_shapes(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> tuple[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], ...]:
        """See `AttentionBackend.cache_shapes`."""
        pages = jax.ShapeDtypeStruct(
            (num_pages, num_kv_heads, page_size, head_dim),
            jnp.dtype(dtype),
            sharding=NamedSharding(self._mesh, P(None, "tp")),
        )
        return ((pages, pages),) * num_layers

    def init_cache(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> tuple[LayerPages, ...]:
        """See `AttentionBackend.init_cache`."""
        shapes = self.cache_shapes(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
        )

        def zeros() -> tuple[LayerPages, ...]:
            return jax.tree.map(lambda pages: jnp.zeros(pages.shape, pages.dtype), shapes)

        shardings = jax.tree.map(lambda pages: pages.sharding, shapes)
        return jax.jit(zeros, out_shardings=shardings)()

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: tuple[LayerPages, ...],
        layer: ArrayLike,
        metadata: AttentionMetadata,
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, tuple[LayerPages, ...]]:
        """See `AttentionBackend.attend`; `layer` must be an int, as layers are unrolled."""
        if not isinstance(layer, int):
            raise TypeError(f"layer must be an int, because layers are unrolled; got {layer!r}")
        heads = P(None, "tp")
        attend_shard = jax.shard_map(
            partial(
                _store_and_attend,
                self._score_function,
                sm_scale=sm_scale,
                sliding_window=sliding_window,
            ),
            mesh=self._mesh,
            in_specs=(heads, heads, heads, (heads, heads), P()),
            out_specs=(heads, (heads, heads)),
            check_vma=False,
        )
        out_TNH, pages = attend_shard(q_TNH, k_TKH, v_TKH, cache[layer], metadata)
        return out_TNH, (*cache[:layer], pages, *cache[layer + 1 :])


def _store_and_attend(
    score_function: ScoreFunction,
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    pages: LayerPages,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None,
) -> tuple[jax.Array, LayerPages]:
    k_pages, v_pages = store_tokens(pages, k_TKH, v_TKH, metadata)
    out_TNH = score_function(
        q_TNH, k_pages, v_pages, metadata, sm_scale=sm_scale, sliding_window=sliding_window
    )
    return out_TNH, (k_pages, v_pages)


def store_tokens(
    pages: LayerPages, k_TKH: jax.Array, v_TKH: jax.Array, metadata: AttentionMetadata
) -> LayerPages:
    """Write each token's keys and values into its page; padding tokens go to page 0."""
    k_pages, v_pages = pages
    position_T = metadata.position_T
    is_token_T = position_T >= 0
    entry_T = jnp.maximum(position_T, 0) // metadata.page_size
    page_T = jnp.where(is_token_T, metadata.page_indices[metadata.row_T, entry_T], 0)
    offset_T = jnp.where(is_token_T, position_T % metadata.page_size, 0)
    with jax.named_scope("store_kv"):
        k_pages = k_pages.at[page_T, :, offset_T].set(k_TKH.astype(k_pages.dtype))
        v_pages = v_pages.at[page_T, :, offset_T].set(v_TKH.astype(v_pages.dtype))
    return k_pages, v_pages
