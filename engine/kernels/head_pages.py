"""The KV cache with heads before positions, and attention over it, one shard of heads per device.

Keys and values are two arrays `[L, num_pages, K, page_size, H]`: on CPUs a dot over `[K, S, H]`
reads keys several times faster than one over `[S, K, H]`, and a page is one contiguous copy. A step
sees one pool of L * num_pages pages, in which a layer's page ids are offset by layer * num_pages:
so the cache can be the carry of a scan over layers, which updates it in place. Knows nothing of how
scores are computed: that is the function it is given.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.attention_fresh import (
    MAX_TOKENS,
    Library,
    fresh_attention,
    has_fresh_chunks_only,
)
from engine.kernels.metadata import AttentionMetadata

Pages = tuple[jax.Array, jax.Array]
"""Keys and values, each [L, num_pages, K, page_size, H]; bfloat16 as its bits, uint16."""

# XLA CPU (of jax 0.10) gathers bfloat16 by converting the whole cache to float32 first. As bits
# it is moved as it is.
_STORED_BFLOAT16 = np.dtype(np.uint16)

_HEADS = P(None, "tp")
_HEADS_OF_PAGES = P(None, None, "tp")

ScoreFunction = Callable[..., jax.Array]
"""`f(q_TNH, k_pages, v_pages, metadata, *, sm_scale, sliding_window) -> out_TNH`."""


class HeadPagesAttention:
    """Attention over pages of `[K, page_size, H]`; an `AttentionBackend`.

    Args:
        mesh: Heads are sharded over its axis "tp".
        score_function: Attends the queries of one shard to the pages of that shard.
        fresh_library: Attends prompts that begin in a step without their pages; None = it does not.
    """

    def __init__(
        self, mesh: Mesh, score_function: ScoreFunction, fresh_library: Library | None = None
    ) -> None:
        self._mesh = mesh
        self._score_function = score_function
        self._fresh_library: Library | None = fresh_library

    def cache_shapes(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """See `AttentionBackend.cache_shapes`."""
        pages = jax.ShapeDtypeStruct(
            (num_layers, num_pages, num_kv_heads, page_size, head_dim),
            _stored_dtype(dtype),
            sharding=NamedSharding(self._mesh, _HEADS_OF_PAGES),
        )
        return pages, pages

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Pages,
        layer: ArrayLike,
        metadata: AttentionMetadata,
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, Pages]:
        """See `AttentionBackend.attend`."""
        attend_shard = jax.shard_map(
            partial(
                _store_and_attend,
                self._score_function,
                self._fresh_library,
                sm_scale=sm_scale,
                sliding_window=sliding_window,
            ),
            mesh=self._mesh,
            in_specs=(_HEADS, _HEADS, _HEADS, (_HEADS_OF_PAGES, _HEADS_OF_PAGES), P(), P()),
            out_specs=(_HEADS, (_HEADS_OF_PAGES, _HEADS_OF_PAGES)),
            check_vma=False,
        )
        layer = jnp.asarray(layer, jnp.int32)
        return attend_shard(q_TNH, k_TKH, v_TKH, cache, layer, metadata)


def _store_and_attend(
    score_function: ScoreFunction,
    fresh_library: Library | None,
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    cache: Pages,
    layer: jax.Array,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None,
) -> tuple[jax.Array, Pages]:
    shape = cache[0].shape
    # Merging the leading axes moves nothing.
    k_pages, v_pages = (pages.reshape(-1, *shape[2:]) for pages in cache)
    of_layer = replace(metadata, page_indices=metadata.page_indices + layer * shape[1])
    k_pages, v_pages = store_tokens((k_pages, v_pages), k_TKH, v_TKH, of_layer)
    score = partial(score_function, sm_scale=sm_scale, sliding_window=sliding_window)

    def attend_pages() -> jax.Array:
        return score(q_TNH, k_pages, v_pages, of_layer)

    def attend_fresh(library: Library) -> jax.Array:
        num_decodes = metadata.num_decode_rows
        fresh_TNH = fresh_attention(
            q_TNH[num_decodes:],
            k_TKH[num_decodes:],
            v_TKH[num_decodes:],
            metadata,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            library=library,
        )
        if not num_decodes:
            return fresh_TNH
        decodes_TNH = score(q_TNH[:num_decodes], k_pages, v_pages, of_layer.without_chunks())
        return jnp.concatenate([decodes_TNH, fresh_TNH])

    if fresh_library is None or not 0 < metadata.num_chunk_tokens <= MAX_TOKENS:
        out_TNH = attend_pages()
    else:
        out_TNH = jax.lax.cond(
            has_fresh_chunks_only(metadata), partial(attend_fresh, fresh_library), attend_pages
        )
    return out_TNH, (k_pages.reshape(shape), v_pages.reshape(shape))


def store_tokens(
    pages: Pages, k_TKH: jax.Array, v_TKH: jax.Array, metadata: AttentionMetadata
) -> Pages:
    """Write each token's keys and values into its page; padding tokens go to page 0.

    `pages` are [num_pages, K, page_size, H] here.
    """
    k_pages, v_pages = pages
    page_T, offset_T = metadata.places()
    with jax.named_scope("store_kv"):
        k_pages = k_pages.at[page_T, :, offset_T].set(_as_stored(k_TKH, k_pages.dtype))
        v_pages = v_pages.at[page_T, :, offset_T].set(_as_stored(v_TKH, v_pages.dtype))
    return k_pages, v_pages


def gather_pages(pages: jax.Array, page_ids: jax.Array) -> jax.Array:
    """Put the positions of consecutive pages in a row, in the dtype that they are computed in.

    Args:
        pages: [num_pages, K, page_size, H].
        page_ids: int32 [B, n], each of them valid.

    Returns:
        [B, K, n * page_size, H].
    """
    batch, pages_per_row = page_ids.shape
    _, num_kv_heads, page_size, head_dim = pages.shape
    gathered = pages.at[page_ids].get(mode="clip").swapaxes(1, 2)
    gathered = gathered.reshape(batch, num_kv_heads, pages_per_row * page_size, head_dim)
    if gathered.dtype == _STORED_BFLOAT16:
        gathered = jax.lax.bitcast_convert_type(gathered, jnp.bfloat16)
    return gathered


def _stored_dtype(dtype: DTypeLike) -> np.dtype:
    return _STORED_BFLOAT16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def _as_stored(x_TKH: jax.Array, stored: DTypeLike) -> jax.Array:
    if stored == _STORED_BFLOAT16:
        return jax.lax.bitcast_convert_type(x_TKH.astype(jnp.bfloat16), _STORED_BFLOAT16)
    return x_TKH.astype(stored)
