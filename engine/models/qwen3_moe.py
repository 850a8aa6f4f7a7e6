"""Qwen3MoeForCausalLM: Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder.

Qwen3's layer with experts in place of its MLP; none of them is shared. Layers that config.json
names keep the MLP.
"""

from engine.models import qwen3
from engine.models.layers import Build, DecoderLayer
from engine.models.moe import SPARSE_NAMES, SparseMLP
from engine.models.qwen3 import Qwen3Attention


def make_sparse_layer(build: Build) -> DecoderLayer:
    return DecoderLayer(build, Qwen3Attention(build), SparseMLP(build))


CHECKPOINT_NAMES = {**qwen3.CHECKPOINT_NAMES, **SPARSE_NAMES}
