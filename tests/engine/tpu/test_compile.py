"""What the TPU's own compiler makes of our programs; no TPU is needed for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.topology import chip_of, compile_environment, topology_devices

HERE = Path(__file__).parent
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


def compile_for(
    generation: str, shape: str, directory: Path, architecture: str, *buckets: str, **flags: object
) -> list[dict[str, int]]:
    config = {"architectures": [architecture], **SHAPES[architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    flags = {
        "model_path": str(directory),
        "device": "tpu",
        "max_running_requests": 16,
        "chunked_prefill_size": 128,
        "context_length": 2048,
    } | flags
    process = subprocess.run(
        [
            *(sys.executable, HERE / "compile_program.py"),
            *(generation, shape, json.dumps(flags), *buckets),
        ],
        env=compile_environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("generation", "shape", "architecture", "flags"),
    [
        ("v6e", "2x2", "Qwen3ForCausalLM", {}),
        # Heads of 64, and fewer of them than chips.
        ("v6e", "2x2", "Qwen2ForCausalLM", {"page_size": 1}),
        ("v5e", "1x1", "Qwen3ForCausalLM", {"page_size": 128}),
    ],
)
def test_steps_compile_with_our_kernels_and_update_the_cache_in_place(
    tmp_path: Path, generation: str, shape: str, architecture: str, flags: dict[str, Any]
) -> None:
    decode, mixed = compile_for(
        generation, shape, tmp_path, architecture, "16,0", "16,128", **flags
    )
    assert decode["kernels"] == 2  # one a layer
    assert mixed["kernels"] == 4
    for program in (decode, mixed):
        # The slots' state is updated in place, too.
        assert program["alias_bytes"] >= program["cache_bytes"]
        assert program["temporary_bytes"] < program["cache_bytes"] / 2


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


def test_what_is_no_slice_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="v9"):
        chip_of("v9")
    with pytest.raises(ConfigError, match="as in 2x2"):
        topology_devices("v6e", "4")
