"""The demo model against transformers: ten prompts in float32, and bfloat16's distance from it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from model_harness import DATA, LoadedModel, read_json

from engine.models.config import load_model_config
from engine.models.layer_stack import lay_out_for_cpu

ITEMS = read_json(DATA / "smollm2_golden.json")["items"]
BFLOAT16_MEDIAN = 0.05
BFLOAT16_P99 = 0.5
PADDED = 128


def forced_logprobs(model: LoadedModel, item: dict) -> np.ndarray:
    """[len(output), V]: log probabilities at each output position, the golden tokens fed in."""
    ids = item["prompt_ids"] + item["output_ids"][:-1]
    logits = model.logits(ids, padded_to=PADDED)[len(item["prompt_ids"]) - 1 :]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_all_ten_prompts_give_the_golden_tokens_in_float32(
    demo_checkpoint: Path, tp_size: int
) -> None:
    model = LoadedModel(demo_checkpoint, tp_size=tp_size)
    for item in ITEMS:
        logprobs = forced_logprobs(model, item)
        # Greedy decoding takes these very tokens if each is the likeliest after those before it.
        assert logprobs.argmax(-1).tolist() == item["output_ids"]
        for row, expected in zip(logprobs, item["logprobs"], strict=True):
            for token_id, logprob in expected["top5"]:
                assert row[token_id] == pytest.approx(logprob, abs=1e-3)


def test_bfloat16_is_no_further_from_float32_than_transformers_is(demo_checkpoint: Path) -> None:
    config = load_model_config(demo_checkpoint)
    model = LoadedModel(demo_checkpoint, config, dtype="bfloat16", backend="auto")
    model.params = lay_out_for_cpu(config, model.params)
    errors = [
        abs(float(row[token_id]) - logprob)
        for item in ITEMS
        for row, expected in zip(forced_logprobs(model, item), item["logprobs"], strict=True)
        for token_id, logprob in expected["top5"]
    ]
    median, p99 = np.quantile(errors, [0.5, 0.99])
    transformers = read_json(DATA / "smollm2_bfloat16.json")
    assert median < min(BFLOAT16_MEDIAN, 1.2 * transformers["median"])
    assert p99 < min(BFLOAT16_P99, 1.2 * transformers["p99"])
