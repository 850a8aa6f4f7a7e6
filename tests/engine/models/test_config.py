"""Spellings of config.json, what is refused, and what a faulty one is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from model_harness import DATA, read_json

from engine.errors import CheckpointError
from engine.models.config import (
    QWEN1_IM_END_ID,
    load_model_config,
)
from engine.models.generation_config import load_generation_defaults
from engine.models.rope_config import RopeConfig

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
OLD_QWEN1 = {
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 151936,
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "ffn_hidden_size": 22016,
    "n_positions": 8192,
    "seq_length": 2048,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
}


QWEN2_MOE = QWEN2 | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_MOE = QWEN2_MOE | {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}


def write(directory: Path, values: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_old_spelling_of_rope_and_dtype_is_read(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, QWEN2))
    assert config.rope == RopeConfig(theta=1e6)
    assert (config.dtype, config.head_dim, config.context_length) == ("bfloat16", 128, 32768)
    assert config.has_qkv_bias
    assert not config.has_qk_norm
    assert config.sliding_windows == (None,) * 28
    assert config.eos_token_ids == (151645,)


def test_new_spelling_gives_the_same_config(tmp_path: Path) -> None:
    old = load_model_config(write(tmp_path, QWEN2))
    values = {
        key: value for key, value in QWEN2.items() if key not in ("rope_theta", "torch_dtype")
    }
    values |= {
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    assert load_model_config(write(tmp_path, values)) == old


def test_old_and_new_names_of_qwen1_give_the_same_config(tmp_path: Path) -> None:
    old = load_model_config(write(tmp_path, OLD_QWEN1))
    renames = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "n_positions": "max_position_embeddings",
    }
    new = {renames.get(key, key): value for key, value in OLD_QWEN1.items()}
    assert load_model_config(write(tmp_path, new)) == old
    assert (old.num_kv_heads, old.intermediate_size, old.head_dim) == (32, 11008, 128)


@pytest.mark.parametrize(
    ("prompt_len", "alpha"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7)]
)
def test_qwen1_alpha_follows_the_prompt(tmp_path: Path, prompt_len: int, alpha: float) -> None:
    assert load_model_config(write(tmp_path, OLD_QWEN1)).rope_alpha(prompt_len) == alpha


def test_qwen1_context_is_the_trained_length_without_dynamic_ntk(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, OLD_QWEN1)).context_length == 8192
    fixed = load_model_config(write(tmp_path, OLD_QWEN1 | {"use_dynamic_ntk": False}))
    assert fixed.context_length == 2048
    assert fixed.rope_alpha(2049) == 1.0


def test_other_families_have_no_alpha(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, QWEN2)).rope_alpha(30000) == 1.0


def test_qwen1_chat_models_also_end_at_im_end(tmp_path: Path) -> None:
    generation = {"chat_format": "chatml", "eos_token_id": 151643}
    config = load_model_config(write(tmp_path, OLD_QWEN1, generation))
    assert config.eos_token_ids == (151643, QWEN1_IM_END_ID)
    base = load_model_config(write(tmp_path, OLD_QWEN1, generation | {"chat_format": "raw"}))
    assert base.eos_token_ids == (151643,)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, QWEN2, {"eos_token_id": [151645, 151643]}))
    assert config.eos_token_ids == (151645, 151643)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_multiplies_the_trained_context(tmp_path: Path, name: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    kind = {"type": "yarn"} if name == "rope_scaling" else {"rope_type": "yarn", "rope_theta": 1e6}
    config = load_model_config(
        write(tmp_path, QWEN2 | {name: scaling | kind, "max_position_embeddings": 40960})
    )
    assert config.context_length == 131072
    assert config.rope.theta == 1e6
    assert config.rope.yarn is not None
    assert config.rope.yarn.attention_factor == pytest.approx(1.13863, abs=1e-5)


def test_windows_begin_at_max_window_layers(tmp_path: Path) -> None:
    values = QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 26}
    windows = load_model_config(write(tmp_path, values)).sliding_windows
    assert windows == (None,) * 26 + (4096,) * 2


def test_layer_types_say_which_layers_have_windows(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 14
    values = QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "layer_types": kinds}
    assert load_model_config(write(tmp_path, values)).sliding_windows == (64, None) * 14


def test_float16_is_computed_in_bfloat16(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, QWEN2 | {"torch_dtype": "float16"}))
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, ["AWQ", "quantized"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["GPTQ", "bfloat16 release"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["FP8"]),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual-chunk"]),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, ["vision", "Qwen2_5_VL"]),
        ({"vision_config": {"depth": 32}}, ["vision"]),
        ({"architectures": ["Qwen3NextForCausalLM"]}, ["Qwen3Next", "Qwen3MoeForCausalLM"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "QWenLMHeadModel"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "yarn"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"torch_dtype": "int8"}, ["int8", "float32"]),
    ],
)
def test_unsupported_checkpoints_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_config(write(tmp_path, QWEN2 | changes))
    for word in words:
        assert word in str(caught.value)


def test_a_vision_model_of_the_first_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vision"):
        load_model_config(write(tmp_path, OLD_QWEN1 | {"visual": {"heads": 16}}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "3584"}, "hidden_size is '3584'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"architectures": []}, "lacks architectures"),
        ({"use_sliding_window": "yes"}, "true or false"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"rope_scaling": [4]}, "rope_scaling is [4]"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"head_dim": 65}, "must be even"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "1 to 1000"),
    ],
)
def test_a_malformed_config_is_told_the_key_at_fault(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_config(write(tmp_path, QWEN2 | changes))
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


def test_every_missing_key_is_named_at_once(tmp_path: Path) -> None:
    values = {k: v for k, v in QWEN2.items() if k not in ("hidden_size", "vocab_size")}
    with pytest.raises(CheckpointError) as caught:
        load_model_config(write(tmp_path, values))
    assert "hidden_size, vocab_size" in str(caught.value)


def test_a_missing_qwen1_key_is_named_in_both_spellings(tmp_path: Path) -> None:
    values = {key: value for key, value in OLD_QWEN1.items() if key != "n_embd"}
    with pytest.raises(CheckpointError, match="hidden_size or n_embd"):
        load_model_config(write(tmp_path, values))


STRANGE_VALUES = [None, "x", -1, 0, 2, 2.5, 1e308, True, [], [1], {}, {"a": 1}, [[]]]


@pytest.mark.parametrize("base", [QWEN2, OLD_QWEN1, QWEN2_MOE], ids=["qwen2", "qwen1", "moe"])
def test_no_value_ends_in_anything_but_a_checkpoint_error(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    extra = ["layer_types", "rope_parameters", "rope_scaling", "quantization_config", "head_dim"]
    refusals = []
    for key in [*base, *extra]:
        for value in STRANGE_VALUES:
            directory = write(tmp_path, base | {"use_sliding_window": True, key: value})
            try:
                load_model_config(directory)
            except CheckpointError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert all("config.json" in refusal for refusal in refusals)


def test_experts_are_read(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, QWEN2_MOE))
    assert config.has_qkv_bias
    experts = config.experts
    assert experts is not None
    assert (experts.num_experts, experts.experts_per_token) == (60, 4)
    assert (experts.intermediate_size, experts.shared_intermediate_size) == (1408, 5632)
    assert not experts.has_normed_weights
    assert experts.sparse_layers == (True,) * 28
    config = load_model_config(write(tmp_path, QWEN2_MOE | {"qkv_bias": False}))
    assert not config.has_qkv_bias

    config = load_model_config(write(tmp_path, QWEN3_MOE))
    assert config.has_qk_norm
    assert not config.has_qkv_bias
    assert config.experts is not None
    assert config.experts.has_normed_weights
    # What other architectures say of shared experts does not concern it.
    assert config.experts.shared_intermediate_size == 0
    values = QWEN3_MOE | {"num_experts": None, "num_local_experts": 60}
    assert load_model_config(write(tmp_path, values)) == config


def test_dense_layers_stand_where_the_configuration_says(tmp_path: Path) -> None:
    changes = {"decoder_sparse_step": 3, "mlp_only_layers": [5, 8]}
    config = load_model_config(write(tmp_path, QWEN3_MOE | changes))
    assert [layer for layer in range(28) if config.is_sparse(layer)] == [2, 11, 14, 17, 20, 23, 26]
    assert not load_model_config(write(tmp_path, QWEN2)).is_sparse(2)


def test_windows_of_experts_are_where_transformers_has_them(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 5}
    config = load_model_config(write(tmp_path, QWEN3_MOE | window))
    assert config.sliding_windows == (64,) * 28
    config = load_model_config(write(tmp_path, QWEN2_MOE | window))
    assert config.sliding_windows == (64, None, 64, None, 64) + (None,) * 23


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": None}, "lacks num_experts or num_local_experts"),
        ({"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "lacks shared_expert_intermediate_size"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok 61 is more than num_experts 60"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers is [True]"),
        ({"mlp_only_layers": list(range(28))}, "leave none of 28 layers with experts"),
        ({"decoder_sparse_step": 29}, "leave none of 28 layers with experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    ],
)
def test_malformed_experts_are_told_the_key_at_fault(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_config(write(tmp_path, QWEN2_MOE | changes))
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model_config(tmp_path)


def test_generation_defaults_are_the_sampling_fields_that_are_set(tmp_path: Path) -> None:
    write(tmp_path, QWEN2, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 9})
    assert load_generation_defaults(tmp_path) == {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    write(tmp_path, QWEN2, {"do_sample": False, "temperature": 0.7})
    assert load_generation_defaults(tmp_path) == {"temperature": 0.0}
    write(tmp_path, QWEN2, {"temperature": "hot"})
    with pytest.raises(CheckpointError, match="temperature"):
        load_generation_defaults(tmp_path)


def test_a_checkpoint_without_generation_config_has_no_defaults(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    "name",
    [
        *("tiny-qwen1", "tiny-qwen2", "tiny-qwen2-tied", "tiny-qwen3"),
        *("tiny-qwen2-moe", "tiny-qwen3-moe"),
    ],
)
def test_the_goldens_are_read(name: str) -> None:
    config = load_model_config(DATA / name)
    assert config.architecture == read_json(DATA / name / "config.json")["architectures"][0]
    assert config.dtype == "float32"
