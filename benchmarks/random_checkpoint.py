"""Writes a checkpoint of a real model's shape with random weights, and Qwen's own tokenizer.

    python benchmarks/random_checkpoint.py /tmp/qwen3-0.6b

For servers that are to be compared on one machine without a download: all of them load the same
files. The tokenizer's 151,643 byte pairs come out of the package dashscope.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers.convert_slow_tokenizer import TikTokenConverter

from engine.text.tokenizer import QWEN_PATTERN

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(directory: Path, *, seed: int = 0) -> Path:
    """Write config, weights and tokenizer; a directory that is whole is left as it is."""
    marker = directory / "tokenizer_config.json"
    if marker.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN3_0_6B, indent=1))
    _write_weights(directory / "model.safetensors", QWEN3_0_6B, seed)
    _make_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    marker.write_text(json.dumps(tokenizer_config, indent=1))
    return directory


def _write_weights(path: Path, config: dict[str, Any], seed: int) -> None:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    norms = {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": head_dim,
        "self_attn.k_norm": head_dim,
    }
    numbers = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = numbers.standard_normal((rows, columns), np.float32)
        return (values * columns**-0.5).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    for number in tqdm(range(config["num_hidden_layers"]), desc="random layers"):
        prefix = f"model.layers.{number}."
        tensors |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in layer.items()}
        tensors |= {
            f"{prefix}{name}.weight": np.ones(size, ml_dtypes.bfloat16)
            for name, size in norms.items()
        }
    save_file(tensors, path, metadata={"format": "pt"})


def _make_tokenizer() -> Tokenizer:
    package = find_spec("dashscope")
    assert package is not None
    assert package.origin is not None, "dashscope is a package with files"
    vocabulary = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    converter = TikTokenConverter(
        vocab_file=str(vocabulary), pattern=QWEN_PATTERN, extra_special_tokens=list(SPECIAL_TOKENS)
    )
    return converter.converted()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.directory, seed=arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
