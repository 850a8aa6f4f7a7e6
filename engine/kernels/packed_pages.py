"""The KV cache in the order in which a CPU's attention reads it, and that attention.

In a page, keys and values of a head lie in words of two bfloat16, as the product's weights do: of
keys, for each pair of dimensions a word per token; of values, for each pair of tokens a word per
dimension. So scores are a product with a page of keys, and sums one with a page of values.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.metadata import AttentionMetadata
from engine.kernels.native.arithmetic import InstructionSet, host_instruction_set
from engine.kernels.native.attention_source import PageShape, attention_source
from engine.kernels.native.xla_handler import register_handler

PackedPages = tuple[jax.Array, jax.Array]
"""uint16, all layers: keys [L, num_pages, K, H / 2, page_size, 2], values
[L, num_pages, K, page_size / 2, H, 2]."""

_HEADS = P(None, "tp")
_HEADS_OF_PAGES = P(None, None, "tp")
_LOG2_E = 1.4426950408889634
_NO_WINDOW = 2**30


def can_attend(dtype: DTypeLike, *, head_dim: int, page_size: int) -> bool:
    """Whether there is a kernel for this machine's processor and such a cache."""
    isa = host_instruction_set()
    if isa is None or jnp.dtype(dtype) != jnp.bfloat16:
        return False
    return head_dim % isa.lanes == 0 and page_size % isa.lanes == 0


class PackedPagesAttention:
    """Attention over packed pages; an `AttentionBackend`, for bfloat16.

    Args:
        mesh: Heads are sharded over its axis "tp".
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

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
        isa, page_shape = host_instruction_set(), PageShape(head_dim, page_size)
        assert isa is not None, "asked can_attend first"
        _register(isa, page_shape, _target(page_shape))
        leading = (num_layers, num_pages, num_kv_heads)
        sharding = NamedSharding(self._mesh, _HEADS_OF_PAGES)
        keys = (*leading, head_dim // 2, page_size, 2)
        values = (*leading, page_size // 2, head_dim, 2)
        return (
            jax.ShapeDtypeStruct(keys, jnp.uint16, sharding=sharding),
            jax.ShapeDtypeStruct(values, jnp.uint16, sharding=sharding),
        )

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: PackedPages,
        layer: ArrayLike,
        metadata: AttentionMetadata,
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> tuple[jax.Array, PackedPages]:
        """See `AttentionBackend.attend`."""
        window = np.int32(_NO_WINDOW if sliding_window is None else sliding_window)
        scale = np.float32(sm_scale * _LOG2_E)

        def attend_shard(
            q_TNH: jax.Array,
            k_TKH: jax.Array,
            v_TKH: jax.Array,
            cache: PackedPages,
            layer: jax.Array,
            metadata: AttentionMetadata,
        ) -> tuple[jax.Array, PackedPages]:
            cache = _store_tokens(cache, k_TKH, v_TKH, layer, metadata)
            target = _target(PageShape(q_TNH.shape[2], metadata.page_size))
            out_TNH = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype))(
                q_TNH,
                *cache,
                layer,
                metadata.position_T,
                metadata.row_T,
                metadata.page_indices,
                window,
                scale,
            )
            return out_TNH, cache

        return jax.shard_map(
            attend_shard,
            mesh=self._mesh,
            in_specs=(_HEADS, _HEADS, _HEADS, (_HEADS_OF_PAGES, _HEADS_OF_PAGES), P(), P()),
            out_specs=(_HEADS, (_HEADS_OF_PAGES, _HEADS_OF_PAGES)),
            check_vma=False,
        )(q_TNH, k_TKH, v_TKH, cache, jnp.asarray(layer, jnp.int32), metadata)


def _store_tokens(
    cache: PackedPages,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    layer: jax.Array,
    metadata: AttentionMetadata,
) -> PackedPages:
    """Write each token's keys and values into its page; padding tokens go to page 0."""
    keys, values = cache
    page_T, offset_T = metadata.places()
    k_TKH, v_TKH = (
        jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) for x in (k_TKH, v_TKH)
    )
    k_TKP2 = k_TKH.reshape(*k_TKH.shape[:2], -1, 2)
    with jax.named_scope("store_kv"):
        keys = keys.at[layer, page_T, :, :, offset_T].set(k_TKP2)
        values = values.at[layer, page_T, :, offset_T // 2, :, offset_T % 2].set(v_TKH)
    return keys, values


def _target(shape: PageShape) -> str:
    return f"qwen_on_ray_packed_attention_{shape.head_dim}_{shape.page_size}"


@cache
def _register(isa: InstructionSet, shape: PageShape, target: str) -> None:
    register_handler(target, attention_source(isa, shape), num_arguments=9)
