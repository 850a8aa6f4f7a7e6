"""Mixtures of experts: where their weights lie, who is routed where, and what padding costs."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_harness import DATA, LoadedModel, max_difference, read_json, tiny_model
from safetensors.numpy import load_file, save_file

from engine.errors import CheckpointError
from engine.kernels.packed_weight import can_pack
from engine.models.checkpoint import dummy_weights, load_weights
from engine.models.config import load_model_config
from engine.models.layer_stack import LayerStack, lay_out_for_cpu
from engine.models.moe import sort_pairs
from engine.sharding import make_mesh

QWEN2, QWEN3 = DATA / "tiny-qwen2-moe", DATA / "tiny-qwen3-moe"
PROMPT = list(range(3, 35))


def test_pairs_are_sorted_by_expert_and_padding_has_none() -> None:
    # The example of `Pairs`.
    pairs = sort_pairs(jnp.array([[2, 0], [0, 1], [3, 3]], jnp.int32), 3, platform="cpu")
    assert pairs.token_P[:4].tolist() == [0, 1, 1, 0]
    assert pairs.expert_of_pair[:4].tolist() == [0, 0, 1, 2]
    assert pairs.starts.tolist() == [0, 2, 3, 4]
    assert pairs.place_TX[:2].tolist() == [[3, 0], [1, 2]]
    assert pairs.is_real_T.tolist() == [True, True, False]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_pair_is_found_where_it_was_put(platform: str) -> None:
    num_experts, num_tokens = 7, 256
    generator = np.random.default_rng(0)
    expert_TX = np.stack([generator.permutation(num_experts)[:3] for _ in range(num_tokens)])
    expert_TX[generator.integers(0, num_tokens, 9)] = num_experts
    pairs = sort_pairs(jnp.asarray(expert_TX, jnp.int32), num_experts, platform=platform)
    starts, token_P = np.asarray(pairs.starts), np.asarray(pairs.token_P)
    found = []
    for token, (experts, places) in enumerate(zip(expert_TX, pairs.place_TX, strict=True)):
        for expert, place in zip(experts, places.tolist(), strict=True):
            if expert < num_experts:
                assert starts[expert] <= place < starts[expert + 1]
                assert token_P[place] == token
                assert pairs.expert_of_pair[place] == expert
                found.append(place)
    assert sorted(found) == list(range(starts[-1]))


@pytest.mark.parametrize("name", ["tiny-qwen2-moe", "tiny-qwen3-moe"])
def test_a_token_does_not_depend_on_those_beside_it(name: str) -> None:
    model = tiny_model(name)
    first = model.logits([*PROMPT, *range(100, 132)])
    other = model.logits([*PROMPT, *range(400, 432)])
    np.testing.assert_array_equal(first[: len(PROMPT)], other[: len(PROMPT)])
    assert max_difference(first[len(PROMPT) :], other[len(PROMPT) :]) > 0.1


def shapes(params: Any) -> Any:
    def shape(array: jax.Array) -> Any:
        return array.shape, array.dtype, array.sharding.shard_shape(array.shape)

    return jax.tree.map(shape, params)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("directory", [QWEN2, QWEN3])
def test_dummy_weights_lie_as_loaded_ones(directory: Path, quantization: Any) -> None:
    config, mesh = load_model_config(directory), make_mesh(3, jax.devices()[:3])
    loaded = load_weights(directory, config, mesh, "float32", quantization=quantization)
    dummy = dummy_weights(config, mesh, "float32", 1, quantization=quantization)
    assert shapes(dummy) == shapes(loaded)
    sparse = loaded["layers"][-1]["mlp"]
    # What routes stays as it is.
    assert sparse["gate"]["weight"].dtype == jnp.float32
    assert "scale" not in sparse["gate"]
    assert ("scale" in sparse["experts"]["up_proj"]) == (quantization == "int8")


def test_experts_are_stacked_in_order_and_shared_out_with_padding() -> None:
    config, mesh = load_model_config(QWEN2), make_mesh(3, jax.devices()[:3])
    tensors = load_file(QWEN2 / "model.safetensors")
    experts = load_weights(QWEN2, config, mesh, "float32")["layers"][5]["mlp"]["experts"]
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = experts[name]["weight"]
        # 40 wide, so 14 on each device, two of them on the last one zeros.
        assert {shard.data.shape[axis + 1] for shard in weight.addressable_shards} == {14}
        for expert in range(6):
            matrix = np.asarray(weight)[expert]
            stored = tensors[f"model.layers.5.mlp.experts.{expert}.{name}.weight"]
            np.testing.assert_array_equal(np.take(matrix, range(40), axis), stored)
            assert not np.take(matrix, [40, 41], axis).any()


def test_dummy_experts_are_the_same_at_every_tp_size() -> None:
    config = load_model_config(QWEN2)
    whole, sharded = (
        np.asarray(
            dummy_weights(config, make_mesh(tp, jax.devices()[:tp]), "float32", 3)["layers"][3][
                "mlp"
            ]["experts"]["down_proj"]["weight"]
        )
        for tp in (1, 3)
    )
    np.testing.assert_array_equal(sharded[:, :, :40], whole)
    assert len(np.unique(whole)) > 0.99 * whole.size
    assert whole.std() == pytest.approx(40**-0.5, rel=0.05)


def test_faults_among_experts_are_named(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(QWEN3, tmp_path / "copied"))
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    tensors["model.layers.0.mlp.experts.2.down_proj.weight"] = np.zeros((64, 47), np.float32)
    tensors["model.layers.2.mlp.experts.8.up_proj.weight"] = np.zeros((48, 64), np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(directory, load_model_config(directory), make_mesh(1), "float32")
    message = str(caught.value)
    assert "3 tensors" in message
    assert "missing: model.layers.1.mlp.experts.6.up_proj.weight [48, 64]" in message
    misshapen = "model.layers.0.mlp.experts.2.down_proj.weight is [64, 47], not [64, 48]"
    assert f"misshapen: {misshapen}" in message
    assert "surplus: model.layers.2.mlp.experts.8.up_proj.weight [48, 64]" in message


def test_layers_are_stacked_by_kind() -> None:
    model = LoadedModel(QWEN2, backend="xla")
    listed = model.logits(PROMPT)
    model.params = lay_out_for_cpu(model.config, model.params)
    # Layers 3 and 5 have experts.
    layers = model.params["layers"]
    assert [type(each) for each in layers] == [LayerStack, dict, dict, dict]
    assert layers[0].num_layers == 3
    np.testing.assert_allclose(model.logits(PROMPT), listed, atol=1e-5)


@pytest.mark.skipif(not can_pack(jnp.bfloat16), reason="no kernel for this processor")
def test_packed_experts_compute_what_listed_ones_do() -> None:
    model = LoadedModel(QWEN3, backend="xla", dtype="bfloat16", tp_size=3)
    listed = model.logits(PROMPT)
    model.params = lay_out_for_cpu(model.config, model.params)
    packed = model.logits(PROMPT)
    exact = tiny_model("tiny-qwen3-moe").logits(PROMPT)
    # Sums in another order: as far from each other as rounding makes both from float32.
    rounding = np.abs(listed - exact).mean()
    assert np.abs(packed - listed).mean() < 1.5 * rounding
    assert np.abs(packed - exact).mean() < 1.5 * rounding


def test_eight_bits_stay_close_to_float32() -> None:
    golden = read_json(QWEN3 / "golden.json")
    logits = LoadedModel(QWEN3, quantization="int8").logits(golden["ids"])
    exact = tiny_model("tiny-qwen3-moe").logits(golden["ids"])
    assert np.abs(logits - exact).mean() < 0.05 * np.abs(exact).mean()
