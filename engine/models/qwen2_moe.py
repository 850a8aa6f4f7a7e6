"""Qwen2MoeForCausalLM: Qwen1.5-MoE and Qwen2-57B-A14B.

Qwen2's layer with experts in place of its MLP, and beside them one that all tokens share, weighed
by the sigmoid of a map of its own. Layers that config.json names keep the MLP.
"""

from engine.models import qwen2
from engine.models.layers import Build, DecoderLayer
from engine.models.moe import SPARSE_NAMES, SparseMLP
from engine.models.names import CheckpointTensor
from engine.models.qwen2 import Qwen2Attention


def make_sparse_layer(build: Build) -> DecoderLayer:
    return DecoderLayer(build, Qwen2Attention(build), SparseMLP(build))


CHECKPOINT_NAMES = {
    **qwen2.CHECKPOINT_NAMES,
    **SPARSE_NAMES,
    "layers.*.mlp.shared_expert.gate_proj.weight": CheckpointTensor(
        "model.layers.*.mlp.shared_expert.gate_proj.weight"
    ),
    "layers.*.mlp.shared_expert.up_proj.weight": CheckpointTensor(
        "model.layers.*.mlp.shared_expert.up_proj.weight"
    ),
    "layers.*.mlp.shared_expert.down_proj.weight": CheckpointTensor(
        "model.layers.*.mlp.shared_expert.down_proj.weight"
    ),
    "layers.*.mlp.shared_expert_gate.weight": CheckpointTensor(
        "model.layers.*.mlp.shared_expert_gate.weight"
    ),
}
