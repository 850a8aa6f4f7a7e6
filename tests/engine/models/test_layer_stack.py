from dataclasses import replace

import jax
import numpy as np
import pytest
from model_harness import DATA, LoadedModel

from engine.models.config import load_model_config
from engine.models.layer_stack import MAX_SCANNED_LAYER_BYTES, LayerStack, lay_out_for_cpu

PROMPT = list(range(3, 20))


@pytest.mark.parametrize(
    "family", ["tiny-qwen1", "tiny-qwen2-tied", "tiny-qwen3", "tiny-qwen3-moe"]
)
def test_scanned_layers_give_the_logits_of_unrolled_ones(family):
    loaded = LoadedModel(DATA / family, tp_size=2, backend="xla")
    unrolled = loaded.logits(PROMPT)
    loaded.params = lay_out_for_cpu(loaded.config, loaded.params)
    assert [type(each) for each in loaded.params["layers"]] == [LayerStack]
    np.testing.assert_allclose(loaded.logits(PROMPT), unrolled, atol=1e-5)


def test_layers_are_stacked_as_far_as_their_windows_are_alike():
    config = replace(load_model_config(DATA / "tiny-qwen2"), sliding_windows=(None, 4, 4))
    loaded = LoadedModel(DATA / "tiny-qwen2", config, backend="xla")
    unrolled = loaded.logits(PROMPT)
    loaded.params = lay_out_for_cpu(config, loaded.params)
    assert [type(each) for each in loaded.params["layers"]] == [dict, LayerStack]
    np.testing.assert_allclose(loaded.logits(PROMPT), unrolled, atol=1e-5)


def test_layers_that_no_cache_holds_stay_unrolled():
    config = replace(load_model_config(DATA / "tiny-qwen2"), intermediate_size=24_000)
    loaded = LoadedModel(DATA, config, dummy_seed=0)
    layer_bytes = sum(array.nbytes for array in jax.tree.leaves(loaded.params["layers"][0]))
    assert layer_bytes > MAX_SCANNED_LAYER_BYTES
    layers = lay_out_for_cpu(config, loaded.params)["layers"]
    assert [type(each) for each in layers] == [dict] * config.num_layers
