from dataclasses import replace

import jax
import numpy as np
import pytest
from model_harness import DATA, LoadedModel

from engine.models.config import load_model_config
from engine.models.layer_stack import MAX_SCANNED_LAYER_BYTES, lay_out_for_cpu

PROMPT = list(range(3, 20))


@pytest.mark.parametrize("family", ["tiny-qwen1", "tiny-qwen2-tied", "tiny-qwen3"])
def test_scanned_layers_give_the_logits_of_unrolled_ones(family):
    loaded = LoadedModel(DATA / family, tp_size=2, backend="xla")
    unrolled = loaded.logits(PROMPT)
    loaded.params = lay_out_for_cpu(loaded.config, loaded.params)
    assert isinstance(loaded.params["layers"], dict)
    np.testing.assert_allclose(loaded.logits(PROMPT), unrolled, atol=1e-5)


def test_layers_with_unlike_windows_stay_unrolled():
    loaded = LoadedModel(DATA / "tiny-qwen2")
    windows = (None, *[4] * (loaded.config.num_layers - 1))
    stacked = lay_out_for_cpu(replace(loaded.config, sliding_windows=windows), loaded.params)
    assert isinstance(stacked["layers"], list)


def test_layers_that_no_cache_holds_stay_unrolled():
    config = replace(load_model_config(DATA / "tiny-qwen2"), intermediate_size=24_000)
    loaded = LoadedModel(DATA, config, dummy_seed=0)
    layer_bytes = sum(array.nbytes for array in jax.tree.leaves(loaded.params["layers"][0]))
    assert layer_bytes > MAX_SCANNED_LAYER_BYTES
    assert isinstance(lay_out_for_cpu(config, loaded.params)["layers"], list)
