"""Qwen2ForCausalLM: Qwen1.5, Qwen2 and Qwen2.5.

Llama's layer with biases on q, k and v. Small ones tie lm_head to the embedding; long-context ones
use a sliding window in their later layers, or YaRN.
"""

import jax
from flax import nnx
from jax.typing import ArrayLike

from engine.kernels.attention import Cache
from engine.models.layers import (
    Build,
    DecoderLayer,
    GatedMLP,
    HeadAttention,
    Linear,
    StepContext,
    apply_linears,
)
from engine.models.names import CheckpointTensor


class Qwen2Attention(nnx.Module):
    def __init__(self, build: Build) -> None:
        has_bias = build.config.has_qkv_bias
        self.q_proj = Linear(build, "heads", "embed", has_bias=has_bias)
        self.k_proj = Linear(build, "kv_heads", "embed", has_bias=has_bias)
        self.v_proj = Linear(build, "kv_heads", "embed", has_bias=has_bias)
        self.o_proj = Linear(build, "embed", "heads")
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
        q_TNH, k_TKH = self._heads.split_query(q), self._heads.split_kv(k)
        v_TKH = self._heads.split_kv(v)
        out, cache = self._heads(q_TNH, k_TKH, v_TKH, cache, layer, step, sliding_window)
        return self.o_proj(out), cache


def make_layer(build: Build) -> DecoderLayer:
    return DecoderLayer(build, Qwen2Attention(build), GatedMLP(build))


CHECKPOINT_NAMES = {
    "embed_tokens.weight": CheckpointTensor("model.embed_tokens.weight"),
    "norm.weight": CheckpointTensor("model.norm.weight"),
    "lm_head.weight": CheckpointTensor("lm_head.weight"),
    "layers.*.input_layernorm.weight": CheckpointTensor("model.layers.*.input_layernorm.weight"),
    "layers.*.self_attn.q_proj.weight": CheckpointTensor("model.layers.*.self_attn.q_proj.weight"),
    "layers.*.self_attn.q_proj.bias": CheckpointTensor("model.layers.*.self_attn.q_proj.bias"),
    "layers.*.self_attn.k_proj.weight": CheckpointTensor("model.layers.*.self_attn.k_proj.weight"),
    "layers.*.self_attn.k_proj.bias": CheckpointTensor("model.layers.*.self_attn.k_proj.bias"),
    "layers.*.self_attn.v_proj.weight": CheckpointTensor("model.layers.*.self_attn.v_proj.weight"),
    "layers.*.self_attn.v_proj.bias": CheckpointTensor("model.layers.*.self_attn.v_proj.bias"),
    "layers.*.self_attn.o_proj.weight": CheckpointTensor("model.layers.*.self_attn.o_proj.weight"),
    "layers.*.post_attention_layernorm.weight": CheckpointTensor(
        "model.layers.*.post_attention_layernorm.weight"
    ),
    "layers.*.mlp.gate_proj.weight": CheckpointTensor("model.layers.*.mlp.gate_proj.weight"),
    "layers.*.mlp.up_proj.weight": CheckpointTensor("model.layers.*.mlp.up_proj.weight"),
    "layers.*.mlp.down_proj.weight": CheckpointTensor("model.layers.*.mlp.down_proj.weight"),
}
