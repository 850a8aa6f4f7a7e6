"""Plans out of figures that are made up, so that each can be worked out by hand."""

from typing import Any

import pytest
from plan_figures import PAGE_SIZE, STEPS, plan_for

from engine.planner import ServingPlan, StepPlan
from engine.tpu_slice import chip_kind


def test_memory_is_what_the_compiler_counts() -> None:
    plan = plan_for()
    assert plan.num_pages == 1000  # page 0 is nobody's
    assert plan.num_tokens == 16_000
    assert plan.kv_bytes == 1001 * 2**21
    assert plan.code_bytes == 4 * 2**26
    assert plan.temporary_bytes == 576 * 2**18
    assert plan.longest_context == 8192
    assert plan.most_sequences == 1000 // (640 // PAGE_SIZE)
    assert plan_for(num_pages=101).longest_context == 100 * PAGE_SIZE


def test_no_estimate_is_below_what_the_hardware_takes() -> None:
    plan = plan_for()
    for step in plan.steps:
        assert step.floor_s <= step.time_s.best <= step.time_s.worst
    # 8 sequences of 576 tokens on average, beside the weights, at 1.64 TB/s.
    (smallest,) = (step for step in plan.steps if step.shape.name.startswith("8 decodes"))
    assert smallest.bound == "memory"
    read_bytes = 3.5e9 + 8 * 576 * 2**21 / PAGE_SIZE
    assert smallest.floor_s == pytest.approx(read_bytes / 1.64e12)


def test_experts_are_read_as_far_as_tokens_choose_them() -> None:
    experts = {"expert_bytes": int(3e9), "num_experts": 128, "experts_per_token": 8}
    sparse = plan_for(experts=experts)

    def step(plan: ServingPlan, num_seqs: int, num_chunk_tokens: int) -> StepPlan:
        shape = (num_seqs, num_chunk_tokens)
        steps = {(each.shape.num_seqs, each.shape.num_chunk_tokens): each for each in plan.steps}
        return steps[shape]

    # 8 tokens of 8 experts each: 40 % of them.
    few = step(sparse, 8, 0)
    keys = 8 * 576 * 2**21 / PAGE_SIZE
    read_bytes = 0.5e9 + 3e9 * (1 - (120 / 128) ** 8) + keys
    assert few.floor_s == pytest.approx(read_bytes / 1.64e12)
    # The compiler's cycles say nothing of the experts' kernel.
    experts_s = 3e9 * (1 - (120 / 128) ** 8) / 1.64e12
    cycles_s = STEPS[8, 0] / chip_kind("v6e").clock_hz
    assert few.time_s.best == pytest.approx(cycles_s + keys / 1.64e12 + experts_s)
    # Of many tokens all are read, and each token is multiplied by a sixteenth of them.
    many = step(sparse, 64, 512)
    assert many.bound == "memory"
    assert many.floor_s == pytest.approx((3.5e9 + keys) / 1.64e12)
    for each in sparse.steps:
        assert each.floor_s <= each.time_s.best <= each.time_s.worst


def test_times_of_requests_are_those_of_their_steps() -> None:
    alone = plan_for(concurrency=1)
    times = {step.shape.name: step.time_s for step in alone.steps}
    assert alone.tpot_s == times["8 decodes, 0 prefill tokens"]
    assert alone.ttft_s.best == times["64 decodes, 512 prefill tokens"].best
    total_s = alone.ttft_s.best + 127 * alone.tpot_s.best
    assert alone.output_tokens_per_s.best == pytest.approx(128 / total_s)
    # A prompt of two chunks.
    longer = plan_for(concurrency=1, input_len=600)
    names = "64 decodes, 512 prefill tokens", "64 decodes, 128 prefill tokens"
    steps = {step.shape.name: step.time_s.best for step in longer.steps}
    assert longer.ttft_s.best == pytest.approx(sum(steps[name] for name in names))


def test_more_at_a_time_gives_more_tokens_and_makes_each_slower() -> None:
    few, many = plan_for(concurrency=4), plan_for(concurrency=24)
    assert many.output_tokens_per_s.best > few.output_tokens_per_s.best
    assert many.tpot_s.best > few.tpot_s.best
    # Those that do not fit wait; they make nobody faster.
    assert plan_for(concurrency=500).output_tokens_per_s.worst <= 25 * 128 / many.tpot_s.best


def test_a_plan_is_plain_json() -> None:
    found: dict[str, Any] = plan_for().as_json()
    assert found["tpu"] == "v6e:2x2"
    assert found["tpot_s"]["best"] < found["tpot_s"]["worst"]
    assert found["steps"][0]["facts"]["collectives"] == {"all-reduce": 65}
