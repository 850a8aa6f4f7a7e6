from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_oracle as oracle

from engine.request import MAX_LOGPROBS, SamplingParams
from engine.runner import sampler, slot_state
from engine.runner.likeliest import BY_SEARCH, BY_SORT, NEVER, Likeliest
from engine.runner.sampler import SamplingInputs
from engine.step import SlotParams

NUM_SLOTS = 8
sample = jax.jit(partial(sampler.sample, likeliest=BY_SORT))
admit = jax.jit(slot_state.admit)
record = jax.jit(slot_state.record_tokens)


def make_inputs(rows: list[SamplingParams], **changes: Any) -> SamplingInputs:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    count = len(rows)
    arrays: dict[str, Any] = {
        "slot": np.arange(count, dtype=np.int32),
        "temperature": column("temperature", np.float32),
        "top_k": column("top_k", np.int32),
        "top_p": column("top_p", np.float32),
        "min_p": column("min_p", np.float32),
        "presence_penalty": column("presence_penalty", np.float32),
        "frequency_penalty": column("frequency_penalty", np.float32),
        "repetition_penalty": column("repetition_penalty", np.float32),
        "has_penalties": column("has_penalties", np.bool_),
        "has_logit_bias": np.array([bool(row.logit_bias) for row in rows]),
        "bans_end_tokens": np.zeros(count, bool),
        "seed": np.array([(0, row.seed or 0) for row in rows], np.uint32),
        "choice_index": np.zeros(count, np.int32),
        "position": np.full(count, 11, np.int32),
        "has_logprobs": np.bool_(False),
    }
    return SamplingInputs(**(arrays | changes))


def slot_params(slot: int, params: SamplingParams, **changes: Any) -> SlotParams:
    fields: dict[str, Any] = {
        "slot": slot,
        "output_start": 0,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "seed": params.seed or 0,
        "choice_index": 0,
        "min_tokens": params.min_tokens,
        "end_token_ids": np.array([], np.int32),
        "logit_bias_ids": np.array(list(params.logit_bias), np.int32),
        "logit_bias": tuple(params.logit_bias.values()),
        "token_ids": np.array([], np.int32),
    }
    return SlotParams(**(fields | changes))


def random_logits(rows: int, vocab_size: int, scale: float = 3.0) -> jax.Array:
    rng = np.random.default_rng(rows * vocab_size)
    return jnp.asarray(rng.standard_normal((rows, vocab_size)) * scale, jnp.float32)


@pytest.mark.parametrize("vocab_size", [40, 700, 20_000])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 500},
        {"top_k": 10**9},
        {"top_p": 0.3},
        {"top_p": 0.97, "temperature": 2.0},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 0.001, "top_k": 300, "top_p": 0.9},
        {"top_k": 9, "top_p": 0.8, "temperature": 0.3},
        {"temperature": 0.0, "top_p": 0.5},
    ],
)
def test_draws_are_those_of_the_sorted_distribution(vocab_size, limits):
    """Every uniform number in a fine grid gives the id that the oracle's own CDF gives."""
    params = SamplingParams(**limits)
    logits_RV = random_logits(1, vocab_size)
    expected_V = oracle.allowed_probabilities(
        np.asarray(logits_RV[0]), params, prompt=[], output=[]
    )
    state = slot_state.init_slot_state(NUM_SLOTS, vocab_size)
    num_draws = 64
    tokens = []
    uniforms = []
    many = jnp.broadcast_to(logits_RV, (num_draws, vocab_size))
    inputs = make_inputs(
        [params] * num_draws,
        slot=np.zeros(num_draws, np.int32),
        position=np.arange(num_draws, dtype=np.int32),
    )
    tokens = np.asarray(sample(many, inputs, state)[0])
    uniforms = np.asarray(sampler._uniform(inputs), np.float64)
    assert (expected_V[tokens] > 0).all()
    if params.temperature > 0:
        cdf_V = np.cumsum(expected_V)
        before = cdf_V[tokens] - expected_V[tokens]
        assert (uniforms >= before - 1e-5).all()
        assert (uniforms <= cdf_V[tokens] + 1e-5).all()


def test_a_seeded_row_draws_the_same_token_wherever_it_stands():
    logits_RV = jnp.broadcast_to(random_logits(1, 5000), (6, 5000))
    others = [SamplingParams(seed=1), SamplingParams(top_p=0.999, temperature=2.0, seed=2)]
    mine = SamplingParams(temperature=1.3, top_p=0.9, seed=77)
    state = slot_state.init_slot_state(NUM_SLOTS, 5000)
    alone_R, _ = sample(logits_RV[:2], make_inputs([mine, SamplingParams(temperature=0)]), state)
    batch_R, _ = sample(logits_RV, make_inputs([*others, *others, mine, others[0]]), state)
    assert int(alone_R[0]) == int(batch_R[4])


def test_seed_choice_and_position_each_change_the_draw():
    def uniform(seed: tuple[int, int], choice: int, position: int) -> float:
        inputs = make_inputs(
            [SamplingParams()],
            seed=np.array([seed], np.uint32),
            choice_index=np.array([choice], np.int32),
            position=np.array([position], np.int32),
        )
        return float(sampler._uniform(inputs)[0])

    drawn = {
        uniform((high, low), choice, position)
        for high in (0, 1)
        for low in (0, 2**32 - 1)
        for choice in (0, 1)
        for position in (0, 1)
    }
    assert len(drawn) == 16
    assert all(0 < number < 1 for number in drawn)


def test_penalties_bias_and_banned_ends_equal_numpy_over_a_whole_generation():
    vocab_size = 50
    logits_RV = random_logits(1, vocab_size)
    params = SamplingParams(
        temperature=0,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        min_tokens=6,
        logit_bias={4: 3.0, 9: -100.0},
    )
    prompt = [int(t) for t in np.argsort(-np.asarray(logits_RV[0]))[:3]] * 2
    ends = (int(np.argsort(-np.asarray(logits_RV[0]))[3]), 7)
    output = [11, 11]
    slot = 5
    admitted = slot_params(
        slot,
        params,
        output_start=len(prompt),
        end_token_ids=np.array(ends, np.int32),
        token_ids=np.array(prompt + output, np.int32),
    )
    state = slot_state.init_slot_state(NUM_SLOTS, vocab_size)
    stale = slot_params(slot, params, token_ids=np.arange(40, dtype=np.int32))
    for params_of_slot in (stale, admitted):
        for admission in slot_state.make_admissions(params_of_slot, vocab_size):
            state = admit(state, admission)
    for _ in range(12):
        expected_V = oracle.allowed_probabilities(
            np.asarray(logits_RV[0]), params, prompt=prompt, output=output, end_token_ids=ends
        )
        inputs = make_inputs(
            [SamplingParams(temperature=0), params],
            slot=np.array([0, slot], np.int32),
            bans_end_tokens=np.array([False, len(output) < params.min_tokens]),
        )
        two_rows = jnp.broadcast_to(logits_RV, (2, vocab_size))
        token_R, _ = sample(two_rows, inputs, state)
        state = record(state, inputs.slot, token_R, inputs.has_penalties)
        assert int(token_R[0]) == int(np.argmax(logits_RV[0]))
        assert int(token_R[1]) == int(np.argmax(expected_V))
        output.append(int(token_R[1]))
    assert len(set(output)) > 3
    assert state.last_token[slot] == output[-1]


def test_counts_of_a_long_prompt_are_admitted_in_several_calls():
    vocab_size = 30
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size - 1, 2 * slot_state.ADMISSION_TOKENS + 77).astype(np.int32)
    output_start = slot_state.ADMISSION_TOKENS + 5
    params = slot_params(
        2, SamplingParams(presence_penalty=1), output_start=output_start, token_ids=tokens
    )
    state = slot_state.init_slot_state(NUM_SLOTS, vocab_size)
    admissions = slot_state.make_admissions(params, vocab_size)
    assert len(admissions) == 3
    for admission in admissions:
        state = admit(state, admission)
    counts_V = np.asarray(state.token_counts[2])
    prompt, output = tokens[:output_start], tokens[output_start:]
    np.testing.assert_array_equal(
        counts_V // slot_state.ONE_OUTPUT, np.bincount(output, minlength=vocab_size)
    )
    np.testing.assert_array_equal(
        counts_V & slot_state.IN_PROMPT, np.bincount(prompt, minlength=vocab_size) > 0
    )
    assert not state.token_counts[1].any()


@pytest.mark.parametrize("likeliest", [BY_SORT, BY_SEARCH], ids=["sort", "search"])
@pytest.mark.parametrize("vocab_size", [12, 5000])
def test_logprobs_are_of_the_models_own_distribution(vocab_size: int, likeliest: Likeliest):
    logits_RV = random_logits(3, vocab_size)
    rows = [SamplingParams(temperature=0.5, top_k=3)] * 3
    state = slot_state.init_slot_state(NUM_SLOTS, vocab_size)
    inputs = make_inputs(rows, has_logprobs=np.bool_(True))
    token_R, logprobs = jax.jit(partial(sampler.sample, likeliest=likeliest))(
        logits_RV, inputs, state
    )
    x_RV = np.asarray(logits_RV, np.float64)
    expected_RV = x_RV - np.log(np.exp(x_RV).sum(-1, keepdims=True))
    num_top = min(MAX_LOGPROBS, vocab_size)
    for row in range(3):
        order = np.argsort(-expected_RV[row])[:num_top]
        np.testing.assert_array_equal(logprobs.top_token_ids[row, :num_top], order)
        np.testing.assert_allclose(
            logprobs.top_logprobs[row, :num_top], expected_RV[row, order], atol=1e-5
        )
        np.testing.assert_allclose(
            logprobs.logprobs[row], expected_RV[row, int(token_R[row])], atol=1e-5
        )
        # The token is one of the likeliest three.
        assert order[int(logprobs.ranks[row]) - 1] == int(token_R[row])


@pytest.mark.parametrize("vocab_size", [40, 5003])
def test_masked_rows_choose_as_if_other_tokens_did_not_exist(vocab_size):
    rng = np.random.default_rng(vocab_size)
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(seed=5, temperature=1.5),
        SamplingParams(seed=6, top_k=4, presence_penalty=1.0),
        SamplingParams(seed=7, top_p=0.5),
    ]
    logits_RV = random_logits(len(rows), vocab_size)
    is_allowed_RV = rng.random((len(rows), vocab_size)) < 0.3
    is_allowed_RV[:, 3] = True
    padded = np.pad(is_allowed_RV, ((0, 0), (0, -vocab_size % 32)))
    words = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    state = slot_state.init_slot_state(NUM_SLOTS, vocab_size)
    got_R, _ = sample(logits_RV, make_inputs(rows), state, masks=words)
    cut_RV = jnp.where(is_allowed_RV, logits_RV, NEVER)
    expected_R, _ = sample(cut_RV, make_inputs(rows), state)
    np.testing.assert_array_equal(got_R, expected_R)
    assert is_allowed_RV[np.arange(len(rows)), np.asarray(got_R)].all()


def test_logits_are_kept_of_the_rows_that_are_named():
    logits_RV = random_logits(4, 40)
    state = slot_state.init_slot_state(NUM_SLOTS, 40)
    keep = jax.jit(slot_state.keep_logits)
    slot_R = np.array([2, 0, 3, 1], np.int32)
    state = keep(state, logits_RV, slot_R, np.array([3, 0, 0, 0], np.int32), np.int32(2))
    np.testing.assert_array_equal(state.logits[1], logits_RV[3])
    np.testing.assert_array_equal(state.logits[2], logits_RV[0])
    assert not np.asarray(state.logits[np.array([0, 3])]).any()


def test_rows_that_do_not_sample_change_no_slot():
    state = slot_state.init_slot_state(NUM_SLOTS, 20)
    padding = np.full(2, NUM_SLOTS, np.int32)
    after = record(state, padding, np.array([3, 4], np.int32), np.zeros(2, bool))
    np.testing.assert_array_equal(after.last_token[:NUM_SLOTS], state.last_token[:NUM_SLOTS])
    np.testing.assert_array_equal(after.token_counts, state.token_counts)
