"""QWenLMHeadModel: the first generation of Qwen, without its remote code.

The layer is Qwen2's; what differs is the checkpoint (q, k and v fused in c_attn; w2 is the gate,
w1 the other branch) and what happens past the trained length: prompts beyond it raise the rope
base by a factor fixed for the request (dynamic NTK, `ModelConfig.rope_alpha`), and queries beyond
it are scaled by the logarithm of their position (`RopeConfig.log_n_len`).
"""

from engine.models.names import CheckpointTensor
from engine.models.qwen2 import make_layer

__all__ = ["CHECKPOINT_NAMES", "make_layer"]

CHECKPOINT_NAMES = {
    "embed_tokens.weight": CheckpointTensor("transformer.wte.weight"),
    "norm.weight": CheckpointTensor("transformer.ln_f.weight"),
    "lm_head.weight": CheckpointTensor("lm_head.weight"),
    "layers.*.input_layernorm.weight": CheckpointTensor("transformer.h.*.ln_1.weight"),
    "layers.*.self_attn.q_proj.weight": CheckpointTensor(
        "transformer.h.*.attn.c_attn.weight", 0, 3
    ),
    "layers.*.self_attn.q_proj.bias": CheckpointTensor("transformer.h.*.attn.c_attn.bias", 0, 3),
    "layers.*.self_attn.k_proj.weight": CheckpointTensor(
        "transformer.h.*.attn.c_attn.weight", 1, 3
    ),
    "layers.*.self_attn.k_proj.bias": CheckpointTensor("transformer.h.*.attn.c_attn.bias", 1, 3),
    "layers.*.self_attn.v_proj.weight": CheckpointTensor(
        "transformer.h.*.attn.c_attn.weight", 2, 3
    ),
    "layers.*.self_attn.v_proj.bias": CheckpointTensor("transformer.h.*.attn.c_attn.bias", 2, 3),
    "layers.*.self_attn.o_proj.weight": CheckpointTensor("transformer.h.*.attn.c_proj.weight"),
    "layers.*.post_attention_layernorm.weight": CheckpointTensor("transformer.h.*.ln_2.weight"),
    "layers.*.mlp.gate_proj.weight": CheckpointTensor("transformer.h.*.mlp.w2.weight"),
    "layers.*.mlp.up_proj.weight": CheckpointTensor("transformer.h.*.mlp.w1.weight"),
    "layers.*.mlp.down_proj.weight": CheckpointTensor("transformer.h.*.mlp.c_proj.weight"),
}
