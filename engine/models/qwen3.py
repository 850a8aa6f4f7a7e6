"""Qwen3ForCausalLM: Qwen3, dense.

Differs from Qwen2 in that q, k and v have no bias, each query and key head is normalised (RMS, one
weight of head_dim for all heads) before the rotation, and head_dim is given apart from the hidden
size.
"""

import jax
from flax import nnx
from jax.typing import ArrayLike

from engine.kernels.attention import Cache
from engine.models import qwen2
from engine.models.layers import (
    Build,
    DecoderLayer,
    GatedMLP,
    HeadAttention,
    Linear,
    RMSNorm,
    StepContext,
    apply_linears,
)
from engine.models.names import CheckpointTensor


class Qwen3Attention(nnx.Module):
    def __init__(self, build: Build) -> None:
        self.q_proj = Linear(build, "heads", "embed")
        self.k_proj = Linear(build, "kv_heads", "embed")
        self.v_proj = Linear(build, "kv_heads", "embed")
        self.o_proj = Linear(build, "embed", "heads")
        self.q_norm = RMSNorm(build, "head_dim")
        self.k_norm = RMSNorm(build, "head_dim")
        self._heads = HeadAttention(build)

    def __call__(
        self,
        x_TD: jax.Array,
        cache: Cache,
        layer: ArrayLike,
        step: StepContext,
        sliding_window: int | None,
    ) -> tuple[jax.Array, Cache]:
        q, k, v = apply_linears((self.q_proj, self.k_proj, self.v_proj), x_TD)
        q_TNH = self.q_norm(self._heads.split_query(q))
        k_TKH = self.k_norm(self._heads.split_kv(k))
        v_TKH = self._heads.split_kv(v)
        out, cache = self._heads(q_TNH, k_TKH, v_TKH, cache, layer, step, sliding_window)
        return self.o_proj(out), cache


def make_layer(build: Build) -> DecoderLayer:
    return DecoderLayer(build, Qwen3Attention(build), GatedMLP(build))


CHECKPOINT_NAMES = {
    **{name: tensor for name, tensor in qwen2.CHECKPOINT_NAMES.items() if "bias" not in name},
    "layers.*.self_attn.q_norm.weight": CheckpointTensor("model.layers.*.self_attn.q_norm.weight"),
    "layers.*.self_attn.k_norm.weight": CheckpointTensor("model.layers.*.self_attn.k_norm.weight"),
}
