"""Both ways to the likeliest tokens, against a sort of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_oracle as oracle

from engine.request import SamplingParams
from engine.runner.likeliest import BY_SEARCH, BY_SORT, Likeliest, Limits

ways = pytest.mark.parametrize("likeliest", [BY_SORT, BY_SEARCH], ids=["sort", "search"])


def limits_of(rows: list[SamplingParams]) -> Limits:
    return Limits(
        top_k=jnp.array([row.top_k for row in rows], jnp.int32),
        top_p=jnp.array([row.top_p for row in rows], jnp.float32),
        min_p=jnp.array([row.min_p for row in rows], jnp.float32),
    )


def random_logits(rows: int, vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(vocab_size)
    return 4 * rng.standard_normal((rows, vocab_size)).astype(np.float32)


@ways
@pytest.mark.parametrize("vocab_size", [300, 20_000])
def test_limits_keep_exactly_the_oracles_tokens(vocab_size: int, likeliest: Likeliest) -> None:
    rows = [
        SamplingParams(top_k=5),
        SamplingParams(top_k=280, temperature=2.0),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.999, temperature=2.0),
        SamplingParams(min_p=0.05, top_p=0.9),
        SamplingParams(top_k=30, top_p=0.7, min_p=0.01),
    ]
    logits_RV = random_logits(len(rows), vocab_size)
    temperature_R1 = np.array([row.temperature for row in rows], np.float32)[:, None]
    score_RV = (logits_RV - logits_RV.max(-1, keepdims=True)) / temperature_R1
    lowest_R = np.asarray(jax.jit(likeliest.lowest_score)(score_RV, limits_of(rows)))
    for row, params in enumerate(rows):
        expected_V = oracle.allowed_probabilities(logits_RV[row], params, prompt=[], output=[])
        kept_V = score_RV[row] >= lowest_R[row]
        # A float32 sum may end one token earlier or later than a float64 one.
        assert abs(int(kept_V.sum()) - int((expected_V > 0).sum())) <= (params.top_p > 0.99)
        if params.top_p <= 0.99:
            np.testing.assert_array_equal(kept_V, expected_V > 0)


@ways
def test_equal_scores_at_the_limit_all_stay(likeliest: Likeliest) -> None:
    logits_RV = jnp.zeros((1, 600)).at[0, 3].set(1.0)
    limits = limits_of([SamplingParams(top_k=2)])
    assert float(likeliest.lowest_score(logits_RV - 1.0, limits)[0]) == -1.0


@ways
def test_rows_without_limits_are_not_limited_by_those_with(likeliest: Likeliest) -> None:
    score_RV = random_logits(3, 400)
    score_RV -= score_RV.max(-1, keepdims=True)
    rows = [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.3)]
    lowest_R = np.asarray(likeliest.lowest_score(jnp.asarray(score_RV), limits_of(rows)))
    assert lowest_R[0] < score_RV[0].min()
    assert (score_RV[1] >= lowest_R[1]).sum() == 3


@ways
@pytest.mark.parametrize(("vocab_size", "count"), [(7, 7), (40, 20), (5000, 20)])
def test_top_scores_come_in_order_and_equal_ones_in_that_of_their_ids(
    vocab_size: int, count: int, likeliest: Likeliest
) -> None:
    # Whole numbers, many of them equal, and no zero negative.
    score_RV = np.round(random_logits(3, vocab_size)) + 0.0
    scores_RC, ids_RC = likeliest.top_scores(jnp.asarray(score_RV), count)
    order_RV = np.argsort(-score_RV, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids_RC, order_RV)
    np.testing.assert_array_equal(scores_RC, np.take_along_axis(score_RV, order_RV, axis=1))
