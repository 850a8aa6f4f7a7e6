"""Embeddings of an engine in one process, against the reference implementation's logits."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_engine import DATA, tiny_engine

from engine.request import SamplingParams

EMBEDDING = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, embedding=True)


def output_weights(checkpoint: str) -> np.ndarray:
    """The matrix [V, D] that makes logits of hidden states."""
    weights = load_file(DATA / checkpoint / "model.safetensors")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    return next(weights[name] for name in names if name in weights).astype(np.float64)


@pytest.mark.parametrize(
    "checkpoint",
    ["tiny-qwen2", pytest.param("tiny-qwen2-tied", marks=pytest.mark.long), "tiny-qwen3"],
)
def test_an_embedding_makes_the_logits_of_the_reference_implementation(checkpoint: str) -> None:
    golden = json.loads((DATA / checkpoint / "golden.json").read_text())
    weights_VD = output_weights(checkpoint)
    # Logits that are more than a hidden state has numbers leave no other state.
    assert np.linalg.matrix_rank(weights_VD) == weights_VD.shape[1]
    with tiny_engine(checkpoint) as llm:
        (completion,) = llm.generate([golden["ids"]], EMBEDDING)
    assert completion.embedding is not None
    np.testing.assert_allclose(
        weights_VD @ completion.embedding, golden["logits_last"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"disable_overlap_schedule": True},
        {"chunked_prefill_size": 32},
        pytest.param({"tp_size": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_embeddings_do_not_depend_on_what_runs_beside_them(fields: dict[str, object]) -> None:
    numbers = random.Random(3)
    start = [numbers.randrange(512) for _ in range(40)]
    # One row, several chunks, prompts that share their beginnings.
    prompts = [
        start[:7],
        [numbers.randrange(512) for _ in range(75)],
        [*start, 5],
        [*start, 6, 7],
        start,
        [9],
    ]
    with tiny_engine("tiny-qwen2", enable_prefix_caching=False) as llm:
        alone = [llm.generate([prompt], EMBEDDING)[0].embedding for prompt in prompts]
    with tiny_engine("tiny-qwen2", **fields) as llm:
        others = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)] * 3
        params = [*others, *[EMBEDDING] * len(prompts)]
        completions = llm.generate([*prompts[:3], *prompts], params)
        again = llm.generate(prompts, EMBEDDING)
        assert llm.num_compiles_since_ready == 0
    assert all(completion.embedding is None for completion in completions[:3])
    assert any(completion.num_cached_tokens for completion in again)
    for got, repeated, expected in zip(completions[3:], again, alone, strict=True):
        assert expected is not None
        for completion in (got, repeated):
            assert len(completion.token_ids) == 1
            assert completion.embedding is not None
            np.testing.assert_allclose(completion.embedding, expected, rtol=0, atol=1e-4)
