"""What is done once a token of a sparse layer: the way of TPUs equals the plain one and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.kernels import token_experts
from engine.kernels.token_experts import likeliest_experts, running_counts, sum_of_experts

PLATFORMS = ["cpu", "tpu"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_likeliest_experts_come_in_order_and_the_first_of_equal_ones(platform: str) -> None:
    rng = np.random.default_rng(0)
    # Few values, so that many are equal.
    probability_TE = rng.integers(0, 5, (300, 24)).astype(np.float32)
    expected = np.argsort(-probability_TE, axis=1, kind="stable")[:, :7]
    weight_TX, expert_TX = likeliest_experts(jnp.asarray(probability_TE), 7, platform=platform)
    np.testing.assert_array_equal(expert_TX, expected)
    np.testing.assert_array_equal(weight_TX, np.take_along_axis(probability_TE, expected, axis=1))


def test_what_is_no_number_spoils_its_own_token_only() -> None:
    probability_TE = np.tile(np.arange(6, dtype=np.float32), (3, 1))
    probability_TE[1] = np.nan
    _, expert_TX = likeliest_experts(jnp.asarray(probability_TE), 2, platform="tpu")
    assert expert_TX[0].tolist() == expert_TX[2].tolist() == [5, 4]
    assert all(0 <= expert < 6 for expert in expert_TX[1].tolist())


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("num_tokens", [1, 16, 128, 130, 1024])
def test_counts_run_over_all_tokens(platform: str, num_tokens: int) -> None:
    chosen_TE = np.random.default_rng(num_tokens).integers(0, 2, (num_tokens, 12)).astype(np.int32)
    # More than bfloat16 has numbers for.
    chosen_TE[:, 0] = 1
    counts_TE = running_counts(jnp.asarray(chosen_TE), platform=platform)
    assert counts_TE.dtype == jnp.int32
    np.testing.assert_array_equal(counts_TE, np.cumsum(chosen_TE, axis=0))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("most_bytes", [2**24, 2**13, 1])
def test_rows_of_a_token_are_weighed_and_summed(
    monkeypatch: pytest.MonkeyPatch, platform: str, dtype: jnp.dtype, most_bytes: int
) -> None:
    monkeypatch.setattr(token_experts, "MOST_GATHERED_BYTES", most_bytes)
    rng = np.random.default_rng(1)
    num_tokens, num_chosen, num_columns = 12, 3, 768
    out_PD = jnp.asarray(rng.normal(size=(num_tokens * num_chosen, num_columns)), dtype)
    place_TX = rng.permutation(num_tokens * num_chosen).reshape(num_tokens, num_chosen)
    weight_TX = rng.random((num_tokens, num_chosen), np.float32)
    found_TD = jax.jit(sum_of_experts, static_argnames="platform")(
        out_PD, jnp.asarray(place_TX, jnp.int32), jnp.asarray(weight_TX), platform=platform
    )
    rows_TXD = np.asarray(out_PD, np.float64)[place_TX]
    assert found_TD.dtype == jnp.float32
    np.testing.assert_allclose(found_TD, (rows_TXD * weight_TX[:, :, None]).sum(1), atol=1e-5)
