"""What the TPU's own compiler makes of our programs; no TPU is needed for it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.topology import Slice, compile_environment

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


def compile_for(
    tpu: str, directory: Path, architecture: str, *wanted: str, **flags: object
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a process that compiles says of an engine and of some of its programs."""
    config = {"architectures": [architecture], **SHAPES[architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    flags = {
        "model_path": str(directory),
        "device": "tpu",
        "tp_size": Slice.parse(tpu).num_devices,
        "max_running_requests": 16,
        "chunked_prefill_size": 128,
        "context_length": 2048,
        "max_total_tokens": CACHED_TOKENS,
    } | flags
    job = {"config": flags, "tpu": tpu, "store": None}
    engine = ask([job])[0]
    if "error" in engine:
        return engine, []
    places = [engine["programs"].index(name) for name in wanted]
    requests = [{"program": place, "num_pages": engine["num_pages"]} for place in places]
    return engine, ask([job, *requests])[1:]


def ask(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, "-m", "engine.compile_worker"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env=compile_environment(),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize(
    ("tpu", "architecture", "flags"),
    [
        ("v6e:2x2", "Qwen3ForCausalLM", {}),
        # Heads of 64, and fewer of them than chips.
        ("v6e:2x2", "Qwen2ForCausalLM", {"page_size": 1}),
        ("v5e:1x1", "Qwen3ForCausalLM", {"page_size": 128}),
    ],
)
def test_steps_compile_with_our_kernels_and_update_the_cache_in_place(
    tmp_path: Path, tpu: str, architecture: str, flags: dict[str, Any]
) -> None:
    names = "16 decodes", "16 decodes + 128 prefill tokens"
    engine, (decode, mixed) = compile_for(tpu, tmp_path, architecture, *names, **flags)
    cache_bytes = engine["num_pages"] * engine["page_bytes"]
    assert decode["num_kernels"] == 2  # one a layer
    assert mixed["num_kernels"] == 4
    for program in (decode, mixed):
        # The slots' state is updated in place, too.
        assert program["alias_bytes"] >= cache_bytes
        assert program["temporary_bytes"] < cache_bytes / 2


def test_too_little_memory_is_said_in_a_sentence_with_the_flag(tmp_path: Path) -> None:
    engine, _ = compile_for("v5e:1x1", tmp_path, "Qwen3ForCausalLM", mem_fraction_static=0.0001)
    assert engine["kind"] == "CapacityError"
    assert "--mem-fraction-static" in engine["error"]


def test_a_program_that_needs_more_memory_than_there_is_does_not_compile(tmp_path: Path) -> None:
    # All but a gigabyte of the memory is pages; the queries of a step alone take more than that.
    flags = {
        "mem_fraction_static": 1.0,
        "max_total_tokens": 1_950_000,
        "max_running_requests": 64,
        "chunked_prefill_size": 2**17,
        "max_prefill_tokens": 2**17,
    }
    name = f"64 decodes + {2**17} prefill tokens"
    _, (found,) = compile_for("v5e:1x1", tmp_path, "Qwen3ForCausalLM", name, **flags)
    assert found["kind"] == "CapacityError"
    assert "--chunked-prefill-size" in found["error"]
    assert re.search(r"counts [\d.]+G of 15.75G", found["error"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("v9:2x2", "v9"), ("v6e:4", "v6e:2x2"), ("v7x:2x2", "v7x:2x2x1"), ("v6e", "v6e:2x2")],
)
def test_what_is_no_slice_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Slice.parse(name)


@pytest.mark.parametrize(
    ("generation", "num_devices", "name"),
    [("v6e", 1, "v6e:1x1"), ("v6e", 8, "v6e:2x4"), ("v6e", 16, "v6e:4x4"), ("v7x", 8, "v7x:2x2x1")],
)
def test_a_number_of_devices_has_its_usual_slice(
    generation: str, num_devices: int, name: str
) -> None:
    tpu = Slice.of_devices(generation, num_devices)
    assert str(tpu) == name
    assert tpu.num_devices == num_devices
    with pytest.raises(ConfigError, match="--tp-size"):
        Slice.of_devices(generation, 3 * num_devices)
