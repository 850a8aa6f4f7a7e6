"""The whole engine in one process: whatever runs beside a request, it gets the same tokens.

Float32 on CPU, tiny checkpoints. `alone` is the oracle: each prompt by itself, nothing cached,
nothing chunked, one step at a time.
"""

import gc
import json
import random

import jax
import numpy as np
import pytest
from tiny_engine import DATA, tiny_engine

from engine.errors import ContextLengthError, RequestError
from engine.llm import LLM, Completion
from engine.request import SamplingParams

VOCAB_SIZE = 512
LOGPROB_TOLERANCE = 5e-4

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=3)
SAMPLED = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    top_k=40,
    presence_penalty=0.5,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    seed=11,
    max_tokens=24,
    ignore_eos=True,
    logprobs=3,
)


def make_prompts(count: int = 6) -> list[list[int]]:
    """Prompts of many lengths; every second one begins like the first."""
    numbers = random.Random(5)
    prompts = []
    for index in range(count):
        tail = [numbers.randrange(VOCAB_SIZE) for _ in range(3 + 17 * index)]
        prompts.append((prompts[0] + tail) if index % 2 and prompts else tail)
    return prompts


PROMPTS = make_prompts()


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def sampling(request: pytest.FixtureRequest) -> SamplingParams:
    return request.param


@pytest.fixture(scope="module")
def alone(sampling: SamplingParams) -> list[Completion]:
    with tiny_engine(enable_prefix_caching=False, disable_overlap_schedule=True) as llm:
        return [llm.generate([prompt], sampling)[0] for prompt in PROMPTS]


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=LOGPROB_TOLERANCE)
            assert left.top_logprobs == pytest.approx(right.top_logprobs, abs=LOGPROB_TOLERANCE)


VARIATIONS: dict[str, dict[str, object]] = {
    "in one batch": {},
    "planned step by step": {"disable_overlap_schedule": True},
    "in chunks of 32": {"chunked_prefill_size": 32},
    "on pages of one token": {"page_size": 1},
    "on pages of 128 tokens": {"page_size": 128},
    "through dense attention": {"attention_backend": "dense"},
    "on two devices": {"tp_size": 2},
    "on three devices": {"tp_size": 3},
    "on four devices": {"tp_size": 4},
}


# Each compiles programs of its own.
LONG_VARIATIONS = (
    "on pages of one token",
    "on pages of 128 tokens",
    "through dense attention",
    "on two devices",
    "on three devices",
    "on four devices",
)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            overrides, id=name, marks=[pytest.mark.long] if name in LONG_VARIATIONS else []
        )
        for name, overrides in VARIATIONS.items()
    ],
)
def test_requests_get_the_tokens_that_each_gets_alone(alone, sampling, overrides):
    with tiny_engine(**overrides) as llm:
        assert_same(llm.generate(PROMPTS, sampling), alone)


@pytest.mark.long
def test_any_number_of_prompts_may_be_given_at_once():
    with tiny_engine(max_running_requests=2, max_queued_requests=1) as llm:
        completions = llm.generate(PROMPTS * 3, SamplingParams(max_tokens=2, ignore_eos=True))
        assert [len(completion.token_ids) for completion in completions] == [2] * len(PROMPTS) * 3


def test_a_cached_prompt_gets_the_tokens_of_a_cold_one(alone, sampling):
    with tiny_engine() as llm:
        llm.generate(PROMPTS, sampling)
        again = llm.generate(PROMPTS, sampling)
        assert_same(again, alone)
        assert all(
            completion.num_cached_tokens == (len(prompt) - 1) // 16 * 16
            for completion, prompt in zip(again, PROMPTS, strict=True)
        )


def test_preempted_requests_get_the_tokens_of_those_that_were_not(alone, sampling):
    # The longest needs 8 of 14 pages; all six together want 27. Admitted by their first chunks,
    # they find out later.
    with tiny_engine(
        max_total_tokens=14 * 16, chunked_prefill_size=32, enable_prefix_caching=False
    ) as llm:
        assert_same(llm.generate(PROMPTS, sampling), alone)
        assert llm.core.stats.preemptions_total > 0


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param("tiny-qwen1", marks=pytest.mark.long),
        pytest.param("tiny-qwen2-tied", marks=pytest.mark.long),
        "tiny-qwen3",
        pytest.param("tiny-qwen2-moe", marks=pytest.mark.long),
        pytest.param("tiny-qwen3-moe", marks=pytest.mark.long),
    ],
)
def test_every_family_serves_chunked_cached_and_preempted(checkpoint):
    with tiny_engine(checkpoint, enable_prefix_caching=False, disable_overlap_schedule=True) as llm:
        expected = [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    with tiny_engine(checkpoint, max_total_tokens=14 * 16, chunked_prefill_size=32) as llm:
        assert_same(llm.generate(PROMPTS, GREEDY), expected)
        assert_same(llm.generate(PROMPTS, GREEDY), expected)
        assert llm.core.stats.preemptions_total > 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_overlapped_and_serial_loops_agree_bit_for_bit(dtype, sampling):
    runs = []
    for is_serial in (False, True):
        with tiny_engine(dtype=dtype, disable_overlap_schedule=is_serial) as llm:
            # One by one, so that both loops make the same batches.
            runs.append([llm.generate([prompt], sampling)[0] for prompt in PROMPTS])
    assert [run.token_ids for run in runs[0]] == [run.token_ids for run in runs[1]]
    assert [run.logprobs for run in runs[0]] == [run.logprobs for run in runs[1]]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    def sampled(seed: int) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=16, ignore_eos=True)

    with tiny_engine() as llm:
        first = llm.generate([PROMPTS[1]] * 3, [sampled(1), sampled(1), sampled(2)])
    assert first[0].token_ids == first[1].token_ids != first[2].token_ids


def test_min_tokens_and_ignore_eos_and_stop_tokens_are_honoured():
    with tiny_engine() as llm:
        free = llm.generate([PROMPTS[2]], GREEDY)[0].token_ids
        stop = free[4]
        first = free.index(stop)

        def run(**fields: object) -> Completion:
            params = {"temperature": 0.0, "max_tokens": 24, "stop_token_ids": (stop,), **fields}
            return llm.generate([PROMPTS[2]], SamplingParams(**params))[0]  # type: ignore[arg-type]

        stopped = run()
        assert stopped.token_ids == free[: first + 1]
        assert stopped.finish_reason == "stop"
        later = run(min_tokens=first + 5)
        assert stop not in later.token_ids[: first + 5]
        assert len(later.token_ids) > first + 5 or later.finish_reason == "length"


def test_logit_bias_forces_and_forbids():
    def run(llm: LLM, bias: dict[int, float]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=8, logit_bias=bias, ignore_eos=True)
        return llm.generate([PROMPTS[0]], params)[0].token_ids

    with tiny_engine() as llm:
        free = run(llm, {})
        assert run(llm, {77: 100.0}) == [77] * 8
        assert free[0] not in run(llm, {free[0]: -100.0})


def test_generation_fills_the_context_and_no_more():
    with tiny_engine(context_length=64, max_total_tokens=1024) as llm:
        prompt = [1] * 50
        completion = llm.generate([prompt], SamplingParams(temperature=0.0, ignore_eos=True))[0]
        assert len(completion.token_ids) == 14
        assert completion.finish_reason == "length"
        with pytest.raises(ContextLengthError, match="64"):
            llm.generate([[1] * 64])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"chunked_prefill_size": 32},
        pytest.param({"tp_size": 3}, marks=pytest.mark.long),
        {"max_total_tokens": 14 * 16, "chunked_prefill_size": 32},
    ],
    ids=["whole", "in chunks", "on three devices", "preempted"],
)
def test_prompt_logprobs_are_those_that_the_tokens_had_when_they_were_generated(overrides):
    with tiny_engine(**overrides) as llm:
        generated = llm.generate(PROMPTS, GREEDY)
        whole = [prompt + one.token_ids for prompt, one in zip(PROMPTS, generated, strict=True)]
        params = SamplingParams(temperature=0.0, max_tokens=9, prompt_logprobs=3, ignore_eos=True)
        again = llm.generate(whole, params)
        assert llm.core.stats.preemptions_total > 0 or "max_total_tokens" not in overrides
    for before, after, prompt in zip(generated, again, whole, strict=True):
        assert len(after.prompt_logprobs) == len(prompt) - 1
        # What lay in cached pages would have no logits.
        assert after.num_cached_tokens == 0
        latest = after.prompt_logprobs[-len(before.logprobs) :]
        for left, right in zip(before.logprobs, latest, strict=True):
            assert left.top_token_ids == right.top_token_ids
            assert left.rank == right.rank == 1
            assert left.logprob == pytest.approx(right.logprob, abs=LOGPROB_TOLERANCE)
            assert left.top_logprobs == pytest.approx(right.top_logprobs, abs=LOGPROB_TOLERANCE)


def test_prompt_logprobs_of_the_reference_implementation():
    golden = json.loads((DATA / "tiny-qwen2" / "golden.json").read_text())
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, logprobs=20)
    with tiny_engine() as llm:
        (got,) = llm.generate([golden["ids"]], params)
    likeliest = [one.top_token_ids[0] for one in got.prompt_logprobs]
    assert likeliest == golden["argmax"][:-1]
    for one, token_id in zip(got.prompt_logprobs, golden["ids"][1:], strict=True):
        assert (one.rank == 1) == (one.top_token_ids[0] == token_id)
        assert 1 <= one.rank <= len(golden["logits_last"])
    logits_V = np.array(golden["logits_last"], np.float64)
    expected_V = logits_V - np.log(np.exp(logits_V).sum())
    (last,) = got.logprobs
    assert last.logprob == pytest.approx(expected_V.max(), abs=1e-4)
    assert last.top_logprobs == pytest.approx(np.sort(expected_V)[:-21:-1], abs=1e-4)


def test_a_bad_prompt_disturbs_nobody(alone, sampling):
    with tiny_engine() as llm:
        with pytest.raises(RequestError, match="vocabulary"):
            llm.generate([PROMPTS[0], [VOCAB_SIZE + 100]], sampling)
        assert_same(llm.generate(PROMPTS, sampling), alone)


def test_requests_of_all_kinds_compile_nothing_after_the_start():
    with tiny_engine() as llm:
        some = SamplingParams(min_p=0.1, max_tokens=3, prompt_logprobs=20)
        for params in (GREEDY, SAMPLED, some):
            llm.generate(PROMPTS, params)
        assert llm.num_compiles_since_ready == 0


def test_an_engine_that_starts_beside_another_does_not_count_as_its_compiling():
    with tiny_engine() as llm, tiny_engine():
        llm.generate(PROMPTS, GREEDY)
        assert llm.num_compiles_since_ready == 0


def test_a_closed_engine_holds_no_weights_and_no_pages():
    def live_bytes() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = live_bytes()
    with tiny_engine() as llm:
        llm.generate(PROMPTS, GREEDY)
        weights_and_pages = live_bytes() - before
    left = live_bytes() - before
    assert weights_and_pages > 1_000_000
    assert left < weights_and_pages / 100
    llm.close()
