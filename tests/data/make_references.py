"""Makes references in float32: of sliding windows, YaRN, experts and log probabilities.

They are transformers'. A variation is a tiny checkpoint's config.json, changed, over the same
weights, so that only the configuration and the expected numbers are kept. Run in an environment of
its own, from this folder:

    pip install torch transformers safetensors
    python make_references.py [folder of the demo model]

tiny-qwen2-moe is made here too, with random weights: dense and sparse layers, by both of the ways
in which config.json says so, a shared expert, a tied head, sizes that no tensor-parallel size but
one and two divides. With the demo model's folder it also measures how far transformers in bfloat16
is from the float32 top-5 log probabilities in smollm2_golden.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
NUM_GREEDY = 24
NUM_TOP_LOGPROBS = 5
CHECKPOINTS = ("tiny-qwen2", "tiny-qwen2-tied", "tiny-qwen3")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIATIONS = {
    "window-all-layers": (
        "tiny-qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
    ),
    "window-from-layer-1": (
        "tiny-qwen2-tied",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "window-qwen3": (
        "tiny-qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "yarn-qwen2": (
        "tiny-qwen2",
        {"rope_parameters": YARN | {"rope_theta": 10000.0}, "max_position_embeddings": 128},
    ),
    "yarn-qwen3": (
        "tiny-qwen3",
        {"rope_parameters": YARN | {"rope_theta": 1000000.0}, "max_position_embeddings": 128},
    ),
    "yarn-own-attention-factor": (
        "tiny-qwen3",
        {
            "rope_parameters": YARN
            | {
                "rope_theta": 10000.0,
                "factor": 2.5,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
            },
            "max_position_embeddings": 80,
        },
    ),
    "experts-and-windows-qwen2": (
        "tiny-qwen2-moe",
        {
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 4,
            "layer_types": None,
        },
    ),
    "experts-and-windows-qwen3": (
        "tiny-qwen3-moe",
        {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 8},
    ),
}

QWEN2_MOE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "eos_token_id": 511,
    "pad_token_id": 510,
}


def main() -> None:
    torch.manual_seed(1)
    make_checkpoint(HERE / "tiny-qwen2-moe", AutoConfig.for_model("qwen2_moe", **QWEN2_MOE))
    torch.manual_seed(0)
    for name, (base, changes) in VARIATIONS.items():
        reference = make_reference(base, changes)
        (HERE / "variations" / f"{name}.json").write_text(json.dumps(reference) + "\n")
    logprobs = {name: make_logprobs(name) for name in CHECKPOINTS}
    (HERE / "logprobs.json").write_text(json.dumps(logprobs) + "\n")
    if len(sys.argv) > 1:
        errors = bfloat16_errors(Path(sys.argv[1]))
        (HERE / "smollm2_bfloat16.json").write_text(json.dumps(errors, indent=1) + "\n")


@torch.no_grad()
def make_checkpoint(directory: Path, config: Any) -> None:
    """Write random weights, biases and norms among them, and what they make of a prompt."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0.0, 0.15)
        elif "norm" in name:
            parameter.uniform_(0.7, 1.3)
    model.save_pretrained(directory)
    prompt = torch.randint(0, config.vocab_size - 2, (32,)).tolist()
    expected = answer(model, prompt) | {"ids": prompt}
    (directory / "golden.json").write_text(json.dumps(expected) + "\n")


@torch.no_grad()
def make_reference(base: str, changes: dict) -> dict:
    values = json.loads((HERE / base / "config.json").read_text()) | changes
    config = AutoConfig.for_model(**values)
    if "moe" in base:
        # Experts are separate tensors on disk, and one in the model.
        model = AutoModelForCausalLM.from_pretrained(
            HERE / base, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    else:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        model.load_state_dict(load_file(HERE / base / "model.safetensors"), strict=False)
        model.tie_weights()
    model.eval()
    prompt = torch.randint(0, config.vocab_size - 2, (48,)).tolist()
    return {"base": base, "changes": changes, "ids": prompt} | answer(model, prompt)


@torch.no_grad()
def answer(model: Any, prompt: list[int]) -> dict:
    """Logits behind a prompt's last token, the likeliest token behind each, and greedy ones."""
    ids = list(prompt)
    for _ in range(NUM_GREEDY):
        # Without a cache: the plainest way, and the window's mask cannot go wrong with it.
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        ids.append(int(logits[-1].argmax()))
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
    return {
        "logits_last": [round(value, 5) for value in logits[-1].tolist()],
        "argmax": logits.argmax(-1).tolist(),
        "greedy": ids[len(prompt) :],
    }


@torch.no_grad()
def make_logprobs(name: str) -> dict[str, list]:
    """Of each token of the golden prompt but the first, and of each that followed greedily.

    An entry is the token's own log probability and the likeliest tokens with theirs.
    """
    golden = json.loads((HERE / name / "golden.json").read_text())
    config = AutoConfig.from_pretrained(HERE / name)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(load_file(HERE / name / "model.safetensors"), strict=False)
    model.tie_weights()
    model.eval()
    ids = golden["ids"] + golden["greedy"]
    rows = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0], -1)
    entries = []
    for token_id, row in zip(ids[1:], rows, strict=False):
        top = row.topk(NUM_TOP_LOGPROBS)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        entries.append([round(float(row[token_id]), 5), [[i, round(v, 5)] for i, v in pairs]])
    num_prompt = len(golden["ids"]) - 1
    return {"prompt": entries[:num_prompt], "greedy": entries[num_prompt:]}


@torch.no_grad()
def bfloat16_errors(directory: Path) -> dict[str, float]:
    """Median and 99th percentile of |log probability - golden|, teacher-forced."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    errors = []
    for item in json.loads((HERE / "smollm2_golden.json").read_text())["items"]:
        ids = torch.tensor([item["prompt_ids"] + item["output_ids"][:-1]])
        logits = model(ids).logits[0, len(item["prompt_ids"]) - 1 :].float()
        logprobs = torch.log_softmax(logits, -1)
        for row, expected in zip(logprobs, item["logprobs"], strict=True):
            errors += [abs(float(row[token]) - logprob) for token, logprob in expected["top5"]]
    quantiles = torch.tensor(errors).quantile(torch.tensor([0.5, 0.99])).tolist()
    return {"median": round(quantiles[0], 4), "p99": round(quantiles[1], 4)}


if __name__ == "__main__":
    main()
