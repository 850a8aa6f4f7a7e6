import json
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from plan_driver import GREEDY, PlanDriver, start_runner

from engine.errors import CapacityError, ConfigError, EngineError
from engine.request import SamplingParams
from engine.step import (
    NO_INTS,
    StepMasks,
    StepPlan,
    decode_masks,
    decode_plan,
    decode_result,
    encode,
)

DATA = Path(__file__).parents[2] / "data"
GOLDEN = json.loads((DATA / "tiny-qwen2" / "golden.json").read_text())
PROMPT: list[int] = GOLDEN["ids"]
EXPECTED: list[int] = GOLDEN["greedy"]
NUM_TOKENS = min(len(EXPECTED), 16)


@pytest.fixture(scope="module")
def started():
    return start_runner(model_path=str(DATA / "tiny-qwen2"))


@pytest.fixture
def driver(started):
    return PlanDriver(*started)


def test_greedy_continuation_is_the_reference_implementations(driver):
    sequence = driver.admit(0, PROMPT)
    assert driver.generate(sequence, NUM_TOKENS) == EXPECTED[:NUM_TOKENS]


@pytest.mark.parametrize("chunk", [1, 5, 31])
def test_chunked_prefill_continues_as_a_whole_one(driver, chunk):
    sequence = driver.admit(2, PROMPT)
    assert driver.generate(sequence, 4, chunk=chunk) == EXPECTED[:4]


def test_sequences_that_come_and_go_do_not_change_one_another(driver):
    first = driver.admit(3, PROMPT)
    driver.step([], [(first, 20)])
    second = driver.admit(0, PROMPT[:7])
    third = driver.admit(1, PROMPT)
    driver.step([], [(second, 7), (first, len(PROMPT) - 20), (third, 3)])
    driver.step([first, second], [(third, 9)])
    driver.step([second, first], [(third, len(PROMPT) - 12)])
    for _ in range(6):
        driver.step([third, first, second])
    assert first.output == EXPECTED[: len(first.output)]
    assert third.output == EXPECTED[: len(third.output)]
    alone = driver.admit(2, PROMPT[:7])
    assert second.output == driver.generate(alone, len(second.output))


def test_steps_may_be_dispatched_before_their_input_tokens_are_known(driver):
    sequence = driver.admit(1, PROMPT)
    pending = [driver.dispatch([], [(sequence, len(PROMPT))])]
    pending += [driver.dispatch([sequence]) for _ in range(NUM_TOKENS - 1)]
    assert [int(step.wait().token_ids[0]) for step in pending] == EXPECTED[:NUM_TOKENS]


def test_a_recomputed_sequence_continues_with_the_same_tokens(driver):
    sampling = SamplingParams(
        temperature=1.2, top_p=0.9, seed=5, repetition_penalty=1.2, frequency_penalty=0.3
    )
    whole = driver.generate(driver.admit(0, PROMPT, sampling), 12)
    resumed = driver.admit(3, PROMPT + whole[:5], sampling, num_output_tokens=5)
    assert driver.generate(resumed, 12) == whole
    other_seed = driver.admit(2, PROMPT, SamplingParams(temperature=1.2, top_p=0.9, seed=6))
    assert driver.generate(other_seed, 12) != whole


def test_logprobs_are_the_reference_implementations(driver):
    sequence = driver.admit(0, PROMPT)
    driver.step([], [(sequence, len(PROMPT))], has_logprobs=True)
    logits_V = np.array(GOLDEN["logits_last"], np.float64)
    if logits_V.ndim > 1:
        logits_V = logits_V[-1]
    logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
    logprob, top_ids, top_logprobs = sequence.results[0]
    order = np.argsort(-logprobs_V)[:20]
    np.testing.assert_allclose(top_logprobs, logprobs_V[order], atol=1e-4)
    np.testing.assert_allclose(logprobs_V[top_ids], logprobs_V[order], atol=1e-4)
    assert logprob == pytest.approx(logprobs_V[EXPECTED[0]], abs=1e-4)


def test_no_feature_compiles_a_program_after_the_start(started):
    runner, limits = started
    driver = PlanDriver(runner, limits)
    everything = SamplingParams(
        temperature=0.9,
        top_p=0.8,
        top_k=300,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={3: 5.0},
        min_tokens=9,
        seed=2**62,
    )
    sequences = [driver.admit(slot, PROMPT, everything, end_token_ids=(1, 2)) for slot in range(3)]
    driver.step([], [(sequence, 5) for sequence in sequences], has_logprobs=True)
    driver.step([], [(sequences[0], len(PROMPT) - 5)])
    driver.step(sequences[:1], [(sequences[1], 3)], has_logprobs=True)
    driver.step(sequences[:1])
    assert runner.num_compiles_since_ready == 0
    assert limits.buckets


def test_a_mask_holds_for_its_row_and_step_only(started):
    runner, limits = started
    driver = PlanDriver(runner, limits)
    only_7 = np.array([1 << 7], np.int32)
    masked, free = driver.admit(0, PROMPT), driver.admit(1, PROMPT)
    driver.step([], [(masked, len(PROMPT))], masks={0: only_7})
    driver.step([masked], [(free, len(PROMPT))], masks={0: only_7})
    assert masked.output == [7, 7]
    driver.step([free, masked], masks={1: np.array([1 << 9], np.int32)})
    assert masked.output[-1] == 9
    driver.step([masked, free], masks={0: np.empty(0, np.int32)})
    driver.step([masked, free])
    assert not {7, 9} & set(masked.output[-2:])
    assert free.output == EXPECTED[:4]
    assert runner.num_compiles_since_ready == 0


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(seed=3, repetition_penalty=1.3, logit_bias={5: 2.0}, min_tokens=4)],
    ids=["greedy", "seeded"],
)
def test_masks_that_allow_all_change_nothing(started, sampling):
    runner, limits = started
    anything = np.full(-(-limits.vocab_size // 32), -1, np.int32)
    outputs, logprobs = [], []
    for masks in (None, {0: anything}, {0: np.empty(0, np.int32)}):
        driver = PlanDriver(runner, limits)
        sequence = driver.admit(0, PROMPT, sampling, end_token_ids=(1, 2))
        driver.step([], [(sequence, len(PROMPT))], has_logprobs=True, masks=masks)
        for _ in range(6):
            driver.step([sequence], has_logprobs=True, masks=masks)
        outputs.append(sequence.output)
        logprobs.append([result[0] for result in sequence.results])
    assert outputs[1] == outputs[2] == outputs[0]
    np.testing.assert_allclose(logprobs[1], logprobs[0], rtol=1e-6)


def test_a_step_whose_masks_did_not_come_is_an_error(started):
    runner, limits = started
    row = np.zeros(1, np.int32)
    plan = StepPlan(step=0, bucket=limits.buckets[0], decode_slots=row, decode_positions=row)
    with pytest.raises(EngineError, match="none were due"):
        runner.sample_masked(StepMasks(step=0, words=()))
    runner.dispatch(msgspec.structs.replace(plan, masked_rows=row))
    with pytest.raises(EngineError, match="before the masks of step 0"):
        runner.dispatch(msgspec.structs.replace(plan, step=1))
    with pytest.raises(EngineError, match="masks of step 1"):
        runner.sample_masked(StepMasks(step=1, words=(NO_INTS,)))
    runner.dispatch(plan).wait()


def test_banned_end_tokens_do_not_come_before_min_tokens(driver):
    ends = (EXPECTED[0], EXPECTED[2])
    sampling = SamplingParams(temperature=0, min_tokens=6)
    sequence = driver.admit(0, PROMPT, sampling, end_token_ids=ends)
    assert not set(driver.generate(sequence, 8)[:6]) & set(ends)


def test_plans_and_results_survive_the_wire(started):
    """What a remote host receives is bytes; arrays made of them must do as well."""
    runner, limits = started

    class Wire:
        def dispatch(self, plan):
            return runner.dispatch(decode_plan(encode(plan)))

        def sample_masked(self, masks):
            return runner.sample_masked(decode_masks(encode(masks)))

    driver = PlanDriver(Wire(), limits)  # pyright: ignore[reportArgumentType]
    sequence = driver.admit(0, PROMPT, SamplingParams(temperature=0, presence_penalty=1e-9))
    result = driver.step([], [(sequence, len(PROMPT))], has_logprobs=True)
    driver.generate(sequence, 3)
    assert sequence.output == EXPECTED[:3]
    assert decode_result(encode(result)).token_ids.tolist() == result.token_ids.tolist()


def test_bfloat16_tokens_and_logprobs_do_not_depend_on_the_batch_or_the_chunks():
    runner, limits = start_runner(model_path=str(DATA / "tiny-qwen3"), dtype="bfloat16")
    driver = PlanDriver(runner, limits)
    prompts = [PROMPT, PROMPT[4:9], PROMPT[::-1]]
    batch = [driver.admit(slot, prompt) for slot, prompt in enumerate(prompts)]
    driver.step([], [(batch[0], 9), (batch[1], 5)], has_logprobs=True)
    driver.step([batch[1]], [(batch[0], len(PROMPT) - 9)], has_logprobs=True)
    driver.step([batch[0], batch[1]], [(batch[2], 20)], has_logprobs=True)
    for _ in range(5):
        driver.step([batch[1], batch[0]], has_logprobs=True)
    for sequence in batch[:2]:
        alone = driver.admit(3, sequence.tokens[: sequence.prompt_len])
        driver.step([], [(alone, alone.prompt_len)], has_logprobs=True)
        while len(alone.output) < len(sequence.output):
            driver.step([alone], has_logprobs=True)
        assert alone.output == sequence.output
        for mine, theirs in zip(alone.results, sequence.results, strict=True):
            assert mine[0] == theirs[0]
            np.testing.assert_array_equal(mine[2], theirs[2])


@pytest.mark.parametrize("tp_size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_several_devices_give_the_same_tokens(tp_size):
    config = {"model_path": str(DATA / "tiny-qwen2"), "max_running_requests": 2}
    runner, limits = start_runner(**config, tp_size=tp_size, context_length=64)
    driver = PlanDriver(runner, limits)
    sequence = driver.admit(0, PROMPT)
    other = driver.admit(1, PROMPT[:3])
    driver.step([], [(sequence, len(PROMPT))])
    driver.step([sequence], [(other, 3)])
    pending = [driver.dispatch([other, sequence]) for _ in range(6)]
    tokens = [step.wait().token_ids.tolist() for step in pending]
    assert sequence.output + [pair[1] for pair in tokens] == EXPECTED[:8]
    assert runner.num_compiles_since_ready == 0


def test_programs_alias_the_cache_and_take_no_copy_of_it(started):
    runner, limits = started
    cache_bytes = sum(pages.nbytes for pages in jax.tree.leaves(runner._cache))
    for bucket in limits.buckets:
        memory = runner._programs[bucket].memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes


def test_a_context_longer_than_the_models_is_refused_by_flag():
    with pytest.raises(ConfigError, match=r"--context-length=4096 .* 512"):
        start_runner(model_path=str(DATA / "tiny-qwen2"), context_length=4096)


def test_too_small_a_share_of_memory_is_refused_with_what_to_do():
    with pytest.raises(CapacityError, match="Raise --mem-fraction-static"):
        start_runner(model_path=str(DATA / "tiny-qwen2"), mem_fraction_static=1e-9)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--device=tpu"):
        start_runner(model_path=str(DATA / "tiny-qwen2"), device="tpu")
