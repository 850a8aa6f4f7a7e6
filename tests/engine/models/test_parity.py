"""Models against transformers' numbers for the same tiny checkpoints, in float32."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from model_harness import DATA, LoadedModel, max_difference, read_json, tiny_model

from engine.kernels.attention_pallas import PallasAttention
from engine.models.config import load_model_config

LOGITS_TOLERANCE = 1e-4
SHARDED_TOLERANCE = 5e-4
QWEN2_AND_3 = ["tiny-qwen2", "tiny-qwen2-tied", "tiny-qwen3", "tiny-qwen2-moe", "tiny-qwen3-moe"]
VARIATIONS = sorted(path.stem for path in (DATA / "variations").glob("*.json"))


@pytest.mark.parametrize("name", QWEN2_AND_3)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    golden = read_json(DATA / name / "golden.json")
    model = tiny_model(name)
    logits = model.logits(golden["ids"])
    assert max_difference(logits[-1], golden["logits_last"]) < LOGITS_TOLERANCE
    assert logits.argmax(-1).tolist() == golden["argmax"]
    assert model.greedy(golden["ids"], len(golden["greedy"])) == golden["greedy"]


@pytest.mark.parametrize(("platform", "backend"), [("gpu", "auto"), ("tpu", "xla")])
def test_what_other_platforms_run_equals_transformers(platform: str, backend: str) -> None:
    golden = read_json(DATA / "tiny-qwen3" / "golden.json")
    model = LoadedModel(DATA / "tiny-qwen3", platform=platform, backend=backend)
    logits = model.logits(golden["ids"])
    assert max_difference(logits[-1], golden["logits_last"]) < LOGITS_TOLERANCE
    assert model.greedy(golden["ids"], len(golden["greedy"])) == golden["greedy"]


def test_the_kernels_of_tpus_interpreted_equal_transformers() -> None:
    golden = read_json(DATA / "tiny-qwen3" / "golden.json")
    chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
    model = LoadedModel(
        DATA / "tiny-qwen3",
        make_backend=lambda mesh: PallasAttention(mesh, chip, interpret=pltpu.InterpretParams()),
    )
    logits = model.logits(golden["ids"])
    assert max_difference(logits[-1], golden["logits_last"]) < LOGITS_TOLERANCE
    assert model.greedy(golden["ids"], 3) == golden["greedy"][:3]


def test_a_gpus_step_is_lowered_without_one_and_calls_nothing_of_the_cpus() -> None:
    model = LoadedModel(DATA / "tiny-qwen3", platform="gpu", backend="auto", dtype="bfloat16")
    text = model.lowered_for("cuda", num_tokens=16)
    assert set(re.findall(r"stablehlo.custom_call @(\w+)", text)) <= {"Sharding"}


@pytest.mark.parametrize("length", [16, 64, 65, 128, 200])
def test_qwen1_logits_equal_the_original_past_the_trained_length_too(length: int) -> None:
    golden = read_json(DATA / "tiny-qwen1" / "golden.json")
    model = tiny_model("tiny-qwen1")
    logits = model.logits(golden["ids"][:length])
    assert max_difference(logits[-1], golden["logits_last"][str(length)]) < LOGITS_TOLERANCE


def test_qwen1_without_its_alpha_is_wrong_past_the_trained_length() -> None:
    golden = read_json(DATA / "tiny-qwen1" / "golden.json")
    model = tiny_model("tiny-qwen1")
    assert model.config.rope_alpha(200) == 7.0
    logits, _ = model.prefill(golden["ids"], model.make_cache(200), 1.0, capacity=200)
    assert max_difference(logits[-1], golden["logits_last"]["200"]) > 0.01


def test_tokens_of_different_rope_alphas_share_a_step() -> None:
    model = tiny_model("tiny-qwen1")
    ids = read_json(DATA / "tiny-qwen1" / "golden.json")["ids"][:100]
    whole = [
        model.prefill(ids, model.make_cache(100), alpha, capacity=100)[0][-1]
        for alpha in (1.0, 3.0)
    ]
    assert max_difference(*whole) > 0.01
    for alpha, expected in zip((1.0, 3.0), whole, strict=True):
        _, cache = model.prefill(ids[:-1], model.make_cache(100), alpha, capacity=100)
        # The other row of the step has another alpha.
        decoded, _ = model.decode(ids[-1], 99, cache, (alpha, 9.0), capacity=100)
        assert max_difference(decoded, expected) < LOGITS_TOLERANCE


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_of_the_configuration_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = read_json(DATA / "variations" / f"{name}.json")
    base = DATA / reference["base"]
    values = read_json(base / "config.json") | reference["changes"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = LoadedModel(base, load_model_config(tmp_path))
    logits = model.logits(reference["ids"])
    assert max_difference(logits[-1], reference["logits_last"]) < LOGITS_TOLERANCE
    assert logits.argmax(-1).tolist() == reference["argmax"]
    assert model.greedy(reference["ids"], len(reference["greedy"])) == reference["greedy"]
    # The variation is one that shows.
    unchanged = tiny_model(reference["base"]).logits(reference["ids"])
    assert max_difference(unchanged[-1], reference["logits_last"]) > 0.01


@pytest.mark.parametrize(
    "tp_size", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    "name", ["tiny-qwen1", "tiny-qwen2-tied", "tiny-qwen3", "tiny-qwen2-moe", "tiny-qwen3-moe"]
)
def test_sharded_model_gives_the_tokens_of_one_device(name: str, tp_size: int) -> None:
    ids = read_json(DATA / name / "golden.json")["ids"][:32]
    alone, sharded = tiny_model(name), tiny_model(name, tp_size)
    assert max_difference(sharded.logits(ids), alone.logits(ids)) < SHARDED_TOLERANCE
    assert sharded.greedy(ids, 12) == alone.greedy(ids, 12)


@pytest.mark.parametrize(
    "name", ["tiny-qwen3", pytest.param("tiny-qwen2-moe", marks=pytest.mark.long)]
)
def test_hidden_states_shared_out_over_tokens_give_the_tokens_of_one_device(name: str) -> None:
    ids = read_json(DATA / name / "golden.json")["ids"][:32]
    alone = tiny_model(name)
    sharded = LoadedModel(DATA / name, tp_size=4, parallel_from=16)
    assert max_difference(sharded.logits(ids), alone.logits(ids)) < SHARDED_TOLERANCE
    # Decodes are below the limit, and 30 tokens do not divide.
    assert sharded.greedy(ids, 4) == alone.greedy(ids, 4)
    assert max_difference(sharded.logits(ids[:30]), alone.logits(ids[:30])) < SHARDED_TOLERANCE


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tp_size"),
    [
        (9, 3, 2),
        pytest.param(9, 3, 3, marks=pytest.mark.long),
        (9, 3, 4),
        pytest.param(14, 2, 8, marks=pytest.mark.long),
        pytest.param(6, 1, 4, marks=pytest.mark.long),
        pytest.param(28, 4, 8, marks=pytest.mark.long),
    ],
)
def test_uneven_heads_give_the_tokens_of_one_device(
    num_heads: int, num_kv_heads: int, tp_size: int
) -> None:
    config = dataclasses.replace(
        load_model_config(DATA / "tiny-qwen2"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=509,
        intermediate_size=97,
        num_layers=2,
        sliding_windows=(None, None),
    )
    ids = np.random.default_rng(0).integers(0, 509, 24).tolist()
    alone = LoadedModel(DATA, config, dummy_seed=7)
    sharded = LoadedModel(DATA, config, tp_size=tp_size, dummy_seed=7)
    assert sharded.logits(ids).shape == (24, 509)
    assert max_difference(sharded.logits(ids), alone.logits(ids)) < SHARDED_TOLERANCE
    assert sharded.greedy(ids, 6) == alone.greedy(ids, 6)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen2-moe"])
def test_padding_tokens_change_nothing(name: str) -> None:
    ids = read_json(DATA / name / "golden.json")["ids"]
    model = tiny_model(name)
    assert max_difference(model.logits(ids, padded_to=64), model.logits(ids)) < 1e-5
