"""What the TPU's own compiler makes of our programs; no TPU is needed for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.compile_ahead import compile_some
from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.step import Bucket
from engine.topology import compile_environment
from engine.tpu_slice import Slice

HERE = Path(__file__).parent
CACHED_TOKENS = 65536
SHAPES: dict[str, dict[str, Any]] = {
    # Narrow enough to compile in seconds; heads as the real ones have them.
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
}
SHAPES["Qwen3MoeForCausalLM"] = SHAPES["Qwen3ForCausalLM"] | {
    "model_type": "qwen3_moe",
    "num_experts": 64,
    "num_experts_per_tok": 2,
    # A quarter does not fill a register's lanes.
    "moe_intermediate_size": 768,
}
EXPERT_BYTES = 2 * 3 * 64 * 768 * 512 * 2 // 4
"""Of a chip of four."""


def make_config(directory: Path, architecture: str, tpu: str, **flags: object) -> EngineConfig:
    config = {"architectures": [architecture], **SHAPES[architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    defaults = {
        "model_path": str(directory),
        "device": "tpu",
        "tp_size": Slice.parse(tpu).num_devices,
        "max_running_requests": 16,
        "chunked_prefill_size": 128,
        "context_length": 2048,
        "max_total_tokens": CACHED_TOKENS,
    }
    return EngineConfig.model_validate(defaults | flags)


@pytest.mark.parametrize(
    ("tpu", "architecture", "flags"),
    [
        ("v6e:2x2", "Qwen3ForCausalLM", {}),
        # Heads of 64, and fewer of them than chips.
        pytest.param("v6e:2x2", "Qwen2ForCausalLM", {"page_size": 1}, marks=pytest.mark.long),
        pytest.param("v5e:1x1", "Qwen3ForCausalLM", {"page_size": 128}, marks=pytest.mark.long),
    ],
)
def test_steps_compile_with_our_kernels_and_update_the_cache_in_place(
    tmp_path: Path, tpu: str, architecture: str, flags: dict[str, Any]
) -> None:
    config = make_config(tmp_path, architecture, tpu, **flags)
    engine, (decode, mixed) = compile_some(
        config, Slice.parse(tpu), [Bucket(16), Bucket(16, 128, 8)]
    )
    cache_bytes = engine.num_pages * engine.page_bytes
    assert decode.num_kernels == 2  # one a layer
    assert mixed.num_kernels == 4
    for program in (decode, mixed):
        # The slots' state is updated in place, too.
        assert program.alias_bytes >= cache_bytes
        assert program.temporary_bytes < cache_bytes / 2


@pytest.mark.parametrize(
    ("quantization", "expert_bytes"),
    [
        ("none", EXPERT_BYTES),
        # And a scale of four bytes for each output: those of the last map are on every chip.
        pytest.param(
            "int8",
            EXPERT_BYTES // 2 + 2 * 64 * 4 * (2 * 768 // 4 + 512),
            marks=pytest.mark.long,
        ),
    ],
)
def test_experts_are_multiplied_where_they_lie(
    tmp_path: Path, quantization: str, expert_bytes: int
) -> None:
    config = make_config(tmp_path, "Qwen3MoeForCausalLM", "v6e:2x2", quantization=quantization)
    engine, (decode, mixed) = compile_some(
        config, Slice.parse("v6e:2x2"), [Bucket(16), Bucket(16, 128, 8)]
    )
    assert engine.expert_bytes == expert_bytes
    # Beside those of attention three a layer.
    assert decode.num_kernels == 2 + 6
    assert mixed.num_kernels == 4 + 6
    # No copy of one of a layer's three weights.
    assert decode.temporary_bytes < expert_bytes / 6
    # Two sums a layer and the sampler's, none for each expert; and a layer's three scales that all
    # chips agree on, where there are some.
    assert decode.collectives["all-reduce"] < 2 * 2 + 8 + (3 * 2 if quantization == "int8" else 0)


def test_too_little_memory_is_said_in_a_sentence_with_the_flag(tmp_path: Path) -> None:
    config = make_config(tmp_path, "Qwen3ForCausalLM", "v5e:1x1", mem_fraction_static=0.0001)
    with pytest.raises(CapacityError, match="--mem-fraction-static"):
        compile_some(config, Slice.parse("v5e:1x1"), [])


def test_a_program_that_needs_more_memory_than_there_is_does_not_compile(tmp_path: Path) -> None:
    # All but a gigabyte of the memory is pages; the queries of a step alone take more than that.
    flags = {
        "mem_fraction_static": 1.0,
        "max_total_tokens": 1_950_000,
        "max_running_requests": 64,
        "chunked_prefill_size": 2**17,
        "max_prefill_tokens": 2**17,
    }
    config = make_config(tmp_path, "Qwen3ForCausalLM", "v5e:1x1", **flags)
    largest = Bucket(64, 2**17)
    with pytest.raises(CapacityError, match=r"counts [\d.]+G of 15.75G.*--chunked-prefill-size"):
        compile_some(config, Slice.parse("v5e:1x1"), [largest])


def compile_attention(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(sys.executable, HERE / "compile_attention.py"), *map(str, arguments)],
        env=compile_environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_a_page_table_larger_than_scalar_memory_is_streamed() -> None:
    num_kv_heads, num_seqs, max_len, page_size = 8, 64, 8192, 1
    process = compile_attention("v6e", num_kv_heads, num_seqs, max_len, page_size)
    assert process.returncode == 0, process.stderr[-3000:]
    assert int(process.stdout) >= 2**18 * num_kv_heads * 128 * 4


def test_pages_too_large_for_the_chip_are_refused_in_our_words() -> None:
    process = compile_attention("v6e", 32, 64, 8192, 4096)
    assert process.returncode
    assert "CapacityError: Attention needs 192 MiB" in process.stderr, process.stderr[-3000:]
    assert (
        "for pages of 4096 tokens and 32 kv heads a chip, of which it may take 64 MiB. Lower "
        in (process.stderr)
    )
    assert "RESOURCE_EXHAUSTED" not in process.stderr
