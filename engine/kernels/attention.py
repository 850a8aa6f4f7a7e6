"""Ragged paged attention as the models see it: the interface, and who implements it.

Each implementation owns the layout of its KV cache; to everyone else the cache is an opaque pytree
that goes in donated and comes out. This file must not know any layout, nor what a request is.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from engine.errors import ConfigError
from engine.kernels.attention_dense import dense_attention
from engine.kernels.attention_fresh import find_library
from engine.kernels.attention_pallas import PallasAttention, can_attend_by_pallas
from engine.kernels.attention_xla import CPU_BLOCKS, DEVICE_BLOCKS, flash_attention
from engine.kernels.head_pages import HeadPagesAttention
from engine.kernels.metadata import AttentionMetadata, Cache
from engine.kernels.packed_pages import PackedPagesAttention, can_attend

__all__ = ["AttentionBackend", "AttentionMetadata", "Cache", "make_attention", "zeroed_cache"]


class AttentionBackend(Protocol):
    """One implementation of attention over a paged KV cache, for one mesh."""

    def cache_shapes(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
    ) -> Cache:
        """Describe the cache of all layers, sharded by kv heads over mesh axis "tp".

        Page 0 takes what padding tokens write; hand out pages from 1 on.

        Returns:
            `jax.ShapeDtypeStruct`s with shardings, for `zeroed_cache`.
        """
        ...

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: ArrayLike,
        metadata: AttentionMetadata,
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Store this step's keys and values, then attend each token to its sequence, causally.

        Args:
            q_TNH: Queries; N is K times the group size, kv head k serves queries k*G to k*G+G-1.
            k_TKH: Keys of this step's tokens, rotated already.
            v_TKH: Their values.
            cache: As `zeroed_cache` or the previous call returned it; donated in effect.
            layer: Which layer's pages: an int where layers are unrolled, traced in a scan.
            metadata: The step's.
            sm_scale: Factor on the scores, usually `H ** -0.5`.
            sliding_window: Attend to that many latest positions, the token's own included.

        Returns:
            [T, N, H] in the dtype of `q_TNH`, zero for padding tokens; and the cache.
        """
        ...


def zeroed_cache(shapes: Cache) -> Cache:
    """Make the arrays that `jax.ShapeDtypeStruct`s describe, of zeros, each where it belongs."""

    def zeros() -> Cache:
        return jax.tree.map(lambda pages: jnp.zeros(pages.shape, pages.dtype), shapes)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda pages: pages.sharding, shapes))()


def make_attention(
    platform: str,
    flag: str,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    head_dim: int,
    page_size: int,
    chip: pltpu.TpuInfo | None = None,
) -> AttentionBackend:
    """Choose an implementation.

    Args:
        platform: "cpu", "tpu" or "gpu", as JAX names it.
        flag: The value of --attention-backend.
        mesh: Has the axis "tp", over which heads are sharded.
        dtype: Of keys and values.
        head_dim: The model's.
        page_size: Tokens in a page.
        chip: Which TPU, where the platform is one.

    Raises:
        ConfigError: No such implementation.
    """
    can_pack = platform == "cpu" and can_attend(dtype, head_dim=head_dim, page_size=page_size)
    if can_pack and flag in ("auto", "fa"):
        return PackedPagesAttention(mesh)
    if platform == "tpu" and flag in ("auto", "fa") and can_attend_by_pallas(dtype, head_dim):
        assert chip is not None, "a TPU's kernels are cut to its kind"
        return PallasAttention(mesh, chip)
    if flag in ("auto", "fa", "xla"):
        blocks = CPU_BLOCKS if platform == "cpu" else DEVICE_BLOCKS
        has_library = platform == "gpu" and flag != "xla"
        library = find_library(head_dim=head_dim, dtype=dtype) if has_library else None
        return HeadPagesAttention(mesh, partial(flash_attention, blocks=blocks), library)
    if flag == "dense":
        return HeadPagesAttention(mesh, dense_attention)
    raise ConfigError(
        f"--attention-backend={flag} is unknown. Use auto, fa, xla or dense (platform {platform})."
    )
