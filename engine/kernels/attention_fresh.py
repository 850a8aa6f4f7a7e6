"""Attention of prompts that begin in this step: all their keys come with it, none from pages.

So it is one dense product with a mask, which GPUs have a library for, cuDNN, behind a public
function of JAX. Chunks that continue a prompt are not for this file.
"""

import logging
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.kernels.metadata import AttentionMetadata

logger = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Of a step's chunks together: the mask takes the square of it, and so does the time."""

Library = Literal["cudnn", "xla"]
"""What `jax.nn.dot_product_attention` calls an implementation; "xla" is for tests of the rest."""

_PROBE_TOKENS = 64
_PROBE_TOLERANCE = 0.05


def has_fresh_chunks_only(metadata: AttentionMetadata) -> jax.Array:
    """Whether every chunk of the step begins its sequence: bool []."""
    chunk_lens = jnp.diff(metadata.cu_chunk_lens)
    return jnp.all(metadata.kv_lens[metadata.num_decode_rows :] == chunk_lens)


def fresh_attention(
    q_TNH: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    metadata: AttentionMetadata,
    *,
    sm_scale: float,
    sliding_window: int | None,
    library: Library,
) -> jax.Array:
    """Attend the step's chunk tokens to each other, causally and within their sequences.

    Args:
        q_TNH: Queries of the chunk tokens of one shard, decode rows left out.
        k_TKH: Their keys.
        v_TKH: Their values.
        metadata: The step's; `has_fresh_chunks_only` holds for it.
        sm_scale: Factor on the scores.
        sliding_window: Positions attended, the token's own included; None = all.
        library: Whose code computes it.

    Returns:
        [T, N, H] in the dtype of `q_TNH`; padding rows are zero.
    """
    position_T = metadata.position_T[metadata.num_decode_rows :]
    row_T = metadata.row_T[metadata.num_decode_rows :]
    is_token_T = position_T >= 0
    is_seen_TT = (row_T[:, None] == row_T[None, :]) & is_token_T[None, :]
    is_seen_TT &= position_T[None, :] <= position_T[:, None]
    if sliding_window is not None:
        is_seen_TT &= position_T[None, :] > position_T[:, None] - sliding_window
    # Padding sees the first token, because a row that sees nothing has no softmax.
    is_first_T = jnp.arange(len(position_T)) == 0
    is_seen_TT |= ~is_token_T[:, None] & is_first_T[None, :]
    out_TNH = jax.nn.dot_product_attention(
        q_TNH, k_TKH, v_TKH, mask=is_seen_TT[None, None], scale=sm_scale, implementation=library
    )
    return jnp.where(is_token_T[:, None, None], out_TNH, 0)


def find_library(*, head_dim: int, dtype: DTypeLike) -> Library | None:
    """The GPU's library for `fresh_attention`, if it takes such heads and computes them rightly.

    Args:
        head_dim: H.
        dtype: Of queries, keys and values.
    """
    rng = np.random.default_rng(0)
    metadata = AttentionMetadata(
        position_T=jnp.arange(_PROBE_TOKENS, dtype=jnp.int32),
        row_T=jnp.zeros(_PROBE_TOKENS, jnp.int32),
        page_indices=jnp.zeros((1, 1), jnp.int32),
        kv_lens=jnp.full(1, _PROBE_TOKENS, jnp.int32),
        cu_chunk_lens=jnp.array([0, _PROBE_TOKENS], jnp.int32),
        num_decodes=jnp.int32(0),
        page_size=1,
        num_decode_rows=0,
    )
    query, key, value = (
        jnp.asarray(rng.standard_normal((_PROBE_TOKENS, heads, head_dim)), dtype)
        for heads in (4, 2, 2)
    )

    def attend(library: Library) -> np.ndarray:
        out_TNH = fresh_attention(
            query,
            key,
            value,
            metadata,
            sm_scale=head_dim**-0.5,
            sliding_window=None,
            library=library,
        )
        return np.asarray(out_TNH, np.float32)

    try:
        difference = float(np.max(np.abs(attend("cudnn") - attend("xla"))))
    # What JAX, XLA and cuDNN each raise for what they do not support.
    except (RuntimeError, ValueError, NotImplementedError) as error:
        logger.info("prompts are attended without cuDNN: %s", error)
        return None
    if not difference <= _PROBE_TOLERANCE:
        logger.warning("prompts are attended without cuDNN: it is off by %.3g", difference)
        return None
    return "cudnn"
