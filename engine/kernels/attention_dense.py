"""Attention with the whole score matrix: slow, plain, and the flash loop's oracle in JAX."""

import jax
import jax.numpy as jnp

from engine.kernels.head_pages import gather_pages
from engine.kernels.metadata import AttentionMetadata


def dense_attention(
    q_TNH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None,
) -> jax.Array:
    """Attend every token to all page-table entries of its sequence, masked to what it may see.

    Costs time and memory by the page table's capacity, not by the sequences' lengths.

    Args:
        q_TNH: Queries of one shard's heads.
        k_pages: [num_pages, K, page_size, H], this step's keys included.
        v_pages: The same of values.
        metadata: The step's.
        sm_scale: Factor on the scores.
        sliding_window: Positions attended, the token's own included; None = all.

    Returns:
        [T, N, H] in the dtype of `q_TNH`; padding rows are zero.
    """
    pages_per_seq = metadata.page_indices.shape[1]
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    num_tokens, num_heads, _ = q_TNH.shape
    seq_len = pages_per_seq * page_size

    position_T = metadata.position_T[:, None]
    key_position_S = jnp.arange(seq_len)[None, :]
    is_seen_TS = key_position_S <= position_T
    if sliding_window is not None:
        is_seen_TS &= key_position_S > position_T - sliding_window
    is_cached_RS = jnp.arange(seq_len)[None, :] < metadata.kv_lens[:, None]
    k_RKSH = gather_pages(k_pages, metadata.page_indices).astype(jnp.float32)
    v_RKSH = gather_pages(v_pages, metadata.page_indices).astype(jnp.float32)
    # What lies in pages that no token was written to yet may be anything, not-a-number included.
    k_RKSH = jnp.where(is_cached_RS[:, None, :, None], k_RKSH, 0.0)
    v_RKSH = jnp.where(is_cached_RS[:, None, :, None], v_RKSH, 0.0)

    q_TKGH = q_TNH.reshape(num_tokens, num_kv_heads, -1, head_dim).astype(jnp.float32)
    k_TKSH = k_RKSH[metadata.row_T]
    v_TKSH = v_RKSH[metadata.row_T]
    highest = jax.lax.Precision.HIGHEST
    score_TKGS = jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, k_TKSH, precision=highest) * sm_scale
    score_TKGS = jnp.where(is_seen_TS[:, None, None, :], score_TKGS, -jnp.inf)
    best_TKG1 = jnp.maximum(jnp.max(score_TKGS, axis=-1, keepdims=True), -1e30)
    weight_TKGS = jnp.exp(score_TKGS - best_TKG1)
    total_TKG1 = jnp.maximum(jnp.sum(weight_TKGS, axis=-1, keepdims=True), 1e-30)
    out_TKGH = jnp.einsum("TKGS,TKSH->TKGH", weight_TKGS / total_TKG1, v_TKSH, precision=highest)
    return out_TKGH.reshape(num_tokens, num_heads, head_dim).astype(q_TNH.dtype)
