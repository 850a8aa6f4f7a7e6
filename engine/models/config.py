"""What a Hugging Face checkpoint says of itself: config.json read into a `ModelConfig`.

With `rope_config`, `experts_config` and `generation_config` beside it, all that knows the spellings
of Hugging Face configurations. It must not import JAX: the leader and the routers read
configurations too.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from engine.errors import CheckpointError
from engine.models.experts_config import EXPERTS_REQUIRED, ExpertsConfig, read_experts_config
from engine.models.generation_config import read_generation_config
from engine.models.json_fields import JsonFields, read_json_object
from engine.models.rope_config import RopeConfig, read_rope_config

Architecture = Literal[
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
]

SUPPORTED_ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

# Qwen's tokenizer puts its specials behind 151,643 byte pairs: <|endoftext|>, <|im_start|>,
# <|im_end|>. A chat checkpoint of the first generation names only the first as its end, although
# a turn ends with the last.
QWEN1_IM_END_ID = 151645

_QWEN2_REQUIRED = (
    ("hidden_size",),
    ("vocab_size",),
    ("intermediate_size",),
    ("num_hidden_layers",),
    ("num_attention_heads",),
    ("max_position_embeddings",),
)
_REQUIRED: dict[Architecture, tuple[tuple[str, ...], ...]] = {
    "QWenLMHeadModel": (
        ("hidden_size", "n_embd"),
        ("vocab_size", "padded_vocab_size"),
        ("intermediate_size", "ffn_hidden_size"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("seq_length",),
    ),
    "Qwen2ForCausalLM": _QWEN2_REQUIRED,
    "Qwen3ForCausalLM": _QWEN2_REQUIRED,
    "Qwen2MoeForCausalLM": (
        *_QWEN2_REQUIRED,
        *EXPERTS_REQUIRED,
        ("shared_expert_intermediate_size",),
    ),
    "Qwen3MoeForCausalLM": (*_QWEN2_REQUIRED, *EXPERTS_REQUIRED),
}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that the engine needs to know of a model, in one spelling.

    Attributes:
        architecture: The class name in config.json, a key of the registry.
        intermediate_size: Width of the gated MLP (of one of its two branches).
        sliding_windows: Per layer, how many latest positions a token attends to, its own
            included; None for all.
        experts: Of the layers that have some in place of one MLP; None in dense models.
        context_length: Longest prompt plus output.
        dtype: "float32" or "bfloat16"; float16 checkpoints are computed in bfloat16, which has
            the range that their activations need.
        eos_token_ids: Any of these ends a sequence.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    experts: ExpertsConfig | None = None
    context_length: int
    dtype: str
    eos_token_ids: tuple[int, ...]

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.sparse_layers[layer]

    def rope_alpha(self, prompt_len: int) -> float:
        """Return the factor on the rope base for a prompt of that many tokens.

        Fixed at admission for the whole request. It is 1 for every model but Qwen1, which was
        published with dynamic NTK scaling: 2 ** ceil(log2(prompt_len / trained) + 1) - 1.
        """
        trained_len = self.rope.dynamic_ntk_len
        if trained_len is None or prompt_len <= trained_len:
            return 1.0
        return float(2 ** math.ceil(math.log2(prompt_len / trained_len) + 1) - 1)


def load_model_config(directory: Path) -> ModelConfig:
    """Read config.json, and generation_config.json for the end tokens.

    Raises:
        CheckpointError: The file is missing or malformed, or the model is not supported; names
            what is at fault and what is supported.
    """
    fields = read_json_object(directory / "config.json")
    generation = read_generation_config(directory)
    architecture = _checked_architecture(fields)
    _refuse_unsupported(fields)
    fields.require(_REQUIRED[architecture])
    if architecture == "QWenLMHeadModel":
        config = _qwen1_config(fields, generation)
    else:
        config = _qwen2_or_3_config(fields, generation, architecture)
    if config.head_dim % 2:
        raise CheckpointError(
            f"{fields.path}: heads of {config.head_dim} dimensions; rotary embedding turns pairs, "
            "so the number must be even."
        )
    return config


def _checked_architecture(fields: JsonFields) -> Architecture:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{fields.path} lacks architectures. Supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    name = names[0]
    if fields.values.get("vision_config") or fields.values.get("visual") or "VL" in name:
        raise CheckpointError(
            f"{fields.path} describes {name}, a vision model; only text models are supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    if name not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{fields.path} describes {name}, which is unknown here. Supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    return cast(Architecture, name)


def _refuse_unsupported(fields: JsonFields) -> None:
    quantization = fields.values.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise CheckpointError(
            f"{fields.path} has a quantization_config ({str(method).upper()}): quantized "
            "checkpoints are not supported. Use the float16 or bfloat16 release of the model."
        )
    if fields.values.get("dual_chunk_attention_config"):
        raise CheckpointError(
            f"{fields.path} has a dual_chunk_attention_config: dual-chunk attention (the 1M-token "
            "releases) is not supported. Use the release of the model without it."
        )
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(
            f"{fields.path}: hidden_act is {activation!r}; only silu is supported."
        )
    if fields.values.get("attention_bias"):
        raise CheckpointError(
            f"{fields.path}: attention_bias is true, which puts a bias on o_proj too; only biases "
            "on q_proj, k_proj and v_proj are supported."
        )


def _qwen1_config(fields: JsonFields, generation: dict[str, Any]) -> ModelConfig:
    if not fields.flag("no_bias", True):
        raise CheckpointError(
            f"{fields.path}: no_bias is false; only models with biases on c_attn alone work."
        )
    if fields.number("rotary_pct", default=1.0) != 1.0:
        raise CheckpointError(f"{fields.path}: rotary_pct must be 1.")
    num_heads = fields.integer("num_attention_heads", "n_head")
    hidden_size = fields.integer("hidden_size", "n_embd")
    num_layers = fields.integer("num_hidden_layers", "n_layer")
    trained_len = fields.integer("seq_length")
    has_dynamic_ntk = fields.flag("use_dynamic_ntk", True)
    vocab_size = fields.integer("vocab_size", "padded_vocab_size")
    eos_token_ids = _eos_token_ids(fields, generation)
    if generation.get("chat_format") == "chatml" and vocab_size > QWEN1_IM_END_ID:
        eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, QWEN1_IM_END_ID)))
    return ModelConfig(
        architecture="QWenLMHeadModel",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        # The checkpoint counts both branches of the gated MLP.
        intermediate_size=fields.integer("intermediate_size", "ffn_hidden_size") // 2,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.integer("kv_channels", default=hidden_size // num_heads),
        rms_norm_eps=fields.number("layer_norm_epsilon", default=1e-6),
        rope=RopeConfig(
            theta=fields.number("rotary_emb_base", default=10000.0),
            dynamic_ntk_len=trained_len if has_dynamic_ntk else None,
            log_n_len=trained_len if fields.flag("use_logn_attn", True) else None,
        ),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        has_qkv_bias=True,
        has_qk_norm=False,
        sliding_windows=(None,) * num_layers,
        context_length=(
            fields.integer("max_position_embeddings", "n_positions")
            if has_dynamic_ntk
            else trained_len
        ),
        dtype=_dtype(fields),
        eos_token_ids=eos_token_ids,
    )


def _qwen2_or_3_config(
    fields: JsonFields, generation: dict[str, Any], architecture: Architecture
) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{fields.path}: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}."
        )
    is_qwen2 = architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
    max_position = fields.integer("max_position_embeddings")
    rope = read_rope_config(fields, max_position)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", default=hidden_size // num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope=rope,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        has_qkv_bias=architecture == "Qwen2ForCausalLM"
        or (is_qwen2 and fields.flag("qkv_bias", True)),
        has_qk_norm=not is_qwen2,
        sliding_windows=_sliding_windows(fields, num_layers, architecture),
        experts=(
            read_experts_config(fields, num_layers, has_shared_expert=is_qwen2)
            if architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
            else None
        ),
        context_length=(
            int(rope.yarn.factor * rope.yarn.original_len) if rope.yarn else max_position
        ),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, generation),
    )


def _sliding_windows(
    fields: JsonFields, num_layers: int, architecture: Architecture
) -> tuple[int | None, ...]:
    if not fields.flag("use_sliding_window", False) or fields.values.get("sliding_window") is None:
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    if architecture == "Qwen3MoeForCausalLM":
        return (window,) * num_layers
    kinds = fields.values.get("layer_types")
    if kinds is None:
        limit = fields.integer("max_window_layers", default=28, minimum=0)
        if architecture == "Qwen2MoeForCausalLM":
            # Every second layer, and those before the limit: not as in its dense kin.
            has_window = [layer % 2 == 0 and layer < limit for layer in range(num_layers)]
        else:
            has_window = [layer >= limit for layer in range(num_layers)]
        return tuple(window if has else None for has in has_window)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(
            f"{fields.path}: layer_types must name one kind for each of {num_layers} layers."
        )
    windows = {"sliding_attention": window, "full_attention": None}
    unknown = sorted({str(kind) for kind in kinds} - windows.keys())
    if unknown:
        raise CheckpointError(
            f"{fields.path}: layer_types has {', '.join(unknown)}. Supported: {', '.join(windows)}."
        )
    return tuple(windows[kind] for kind in kinds)


def _dtype(fields: JsonFields) -> str:
    name = fields.values.get("dtype") or fields.values.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in _DTYPES:
        raise CheckpointError(
            f"{fields.path}: dtype is {name!r}. Supported: {', '.join(_DTYPES)} (float16 is "
            "computed in bfloat16)."
        )
    return _DTYPES[name]


def _eos_token_ids(fields: JsonFields, generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = fields.values.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise CheckpointError(f"{fields.path}: eos_token_id is {value!r}; it must be integers.")
    return tuple(ids)
