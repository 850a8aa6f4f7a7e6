"""Weights of 8 bits: how far from those of 16 and 32, and the same on any number of devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_harness import DATA, LoadedModel, read_json

from engine.models.checkpoint import dummy_weights, weight_shapes
from engine.models.config import load_model_config
from engine.models.layer_stack import LayerStack, lay_out_for_cpu
from engine.models.quantization import Quantization, dequantize, quantize_rows, quantized_product
from engine.sharding import make_mesh

ITEMS = read_json(DATA / "smollm2_golden.json")["items"]


def random_matrix(rows: int, columns: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns), jnp.float32)


def test_rows_are_rounded_to_half_a_step_of_their_own_scale():
    x = random_matrix(5, 64, 0) * jnp.array([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    quantized, scale = quantize_rows(x)
    assert quantized.dtype == jnp.int8
    error = jnp.abs(quantized * scale[:, None] - x)
    assert bool(jnp.all(error <= 0.5001 * scale[:, None]))
    assert bool(jnp.all(jnp.abs(quantized[jnp.array([0, 1, 2, 4])]).max(axis=1) == 127))
    assert bool(jnp.all(quantized[3] == 0))


def test_a_product_is_as_exact_as_its_rounded_factors():
    x, weight = random_matrix(3, 128, 1), random_matrix(40, 128, 2)
    quantized_weight, weight_scale = quantize_rows(weight)
    quantized_x, x_scale = quantize_rows(x)
    product, scale = quantized_product(x, quantized_weight, make_mesh(1, jax.devices()[:1]))
    got = dequantize(product, scale, weight_scale, jnp.float32)
    factors = np.asarray(quantized_x, np.int64) @ np.asarray(quantized_weight, np.int64).T
    np.testing.assert_array_equal(product, factors)
    rounded = (quantized_x * x_scale[:, None]) @ (quantized_weight * weight_scale[:, None]).T
    np.testing.assert_allclose(got, rounded, rtol=1e-3, atol=1e-3)


# Each family once: a tensor-parallel size more costs a compilation, and tells nothing new of it.
@pytest.mark.parametrize(
    ("family", "tp_size"),
    [("qwen1", 2), ("qwen2", 4), ("qwen2-tied", 3), ("qwen3", 2), ("qwen2-moe", 3)],
)
def test_tensor_parallel_sizes_agree(family: str, tp_size: int):
    directory = DATA / f"tiny-{family}"
    ids = list(range(3, 40))
    one = LoadedModel(directory, quantization="int8")
    several = LoadedModel(directory, quantization="int8", tp_size=tp_size)
    np.testing.assert_allclose(several.logits(ids), one.logits(ids), atol=5e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_stacked_layers_compute_what_listed_ones_do(family: str):
    model = LoadedModel(DATA / f"tiny-{family}", quantization="int8")
    ids = list(range(3, 40))
    listed = np.asarray(model.logits(ids))
    model.params = lay_out_for_cpu(model.config, model.params)
    assert [type(each) for each in model.params["layers"]] == [LayerStack]
    np.testing.assert_allclose(model.logits(ids), listed, atol=1e-4)


def test_the_demo_model_stays_close_to_float32(demo_checkpoint: Path):
    model = LoadedModel(demo_checkpoint, dtype="bfloat16", quantization="int8")
    errors, num_same, num_tokens = [], 0, 0
    for item in ITEMS:
        ids = item["prompt_ids"] + item["output_ids"][:-1]
        logits = model.logits(ids, padded_to=128)[len(item["prompt_ids"]) - 1 :]
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        num_same += int((logprobs.argmax(-1) == item["output_ids"]).sum())
        num_tokens += len(item["output_ids"])
        for row, expected in zip(logprobs, item["logprobs"], strict=True):
            errors += [abs(float(row[i]) - logprob) for i, logprob in expected["top5"]]
    median, p99 = np.quantile(errors, [0.5, 0.99])
    print(f"int8: {median:.3f} median, {p99:.2f} p99, {num_same} of {num_tokens} the same")
    # Eight bits on both sides of every product: a 135M model, the hardest case, loses this much.
    assert median < 0.3
    assert p99 < 2.5
    assert num_same > 0.85 * num_tokens


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen2-moe"])
def test_shapes_are_told_without_a_weight(name: str, quantization: Quantization) -> None:
    config, mesh = load_model_config(DATA / name), make_mesh(2, jax.devices()[:2])
    weights = dummy_weights(config, mesh, "bfloat16", 0, quantization=quantization)
    told = weight_shapes(config, mesh, "bfloat16", quantization=quantization)
    assert jax.tree.structure(told) == jax.tree.structure(weights)
    for shape, weight in zip(jax.tree.leaves(told), jax.tree.leaves(weights), strict=True):
        assert (shape.shape, shape.dtype) == (weight.shape, weight.dtype)
        assert shape.sharding.is_equivalent_to(weight.sharding, weight.ndim)
