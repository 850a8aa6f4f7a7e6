"""What the core counts, against what a test knows to have happened."""

import asyncio

import pytest
from simulated_device import VOCAB_SIZE, SimulatedDevice, expected_output

from engine import accounting
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import FinishReason, Request, RequestOutput, SamplingParams
from engine.scheduling import scheduler
from engine.scheduling.buckets import bucket_table
from engine.stats import Histogram
from engine.step import EngineLimits, StepPlan, StepResult

CONFIG = EngineConfig(
    model_path="tiny", page_size=4, max_running_requests=2, chunked_prefill_size=8
)
LIMITS = EngineLimits(
    num_pages=33,
    page_size=4,
    context_length=64,
    max_running_requests=2,
    buckets=bucket_table(CONFIG, context_length=64, platform="cpu"),
    vocab_size=VOCAB_SIZE,
)
TIMEOUT_S = 20


class Clock:
    """Time that passes by a second a step.

    Attributes:
        now_s: As `time.monotonic` tells it.
    """

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accounting, "time", clock)
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


class Device(SimulatedDevice):
    """Each step takes a second of its `clock`, which is to be set."""

    clock: Clock

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        self.clock.now_s += 1
        return super().execute(plan)


async def run(clock: Clock, *requests: Request) -> tuple[EngineCore, list[RequestOutput]]:
    """Run requests to their ends; what each step gave them is in order."""
    device = Device(LIMITS)
    device.clock = clock
    outputs: list[RequestOutput] = []
    core = EngineCore(
        CONFIG.model_copy(update={"disable_overlap_schedule": True}),
        LIMITS,
        device,
        outputs.extend,
    )
    for request in requests:
        core.add(request)
    running = asyncio.create_task(core.run())
    async with asyncio.timeout(TIMEOUT_S):
        await core.wait_until_idle()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return core, outputs


def request(name: str, max_tokens: int, num_before: int = 0) -> Request:
    prompt = [1, 2, 3, 4]
    return Request(
        request_id=name,
        prompt_token_ids=prompt + expected_output(prompt, num_before),
        num_prompt_output_tokens=num_before,
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
    )


def figures(histogram: Histogram) -> tuple[int, float]:
    return histogram.num_figures, histogram.total


async def test_a_requests_time_is_divided_among_queue_prefill_and_decode(clock: Clock) -> None:
    core, outputs = await run(clock, request("a", 3))
    stats = core.stats
    # Steps: the prompt with the first token, then two decodes.
    assert figures(stats.queue_time_s) == (1, 0.0)
    assert figures(stats.prefill_time_s) == (1, 1.0)
    assert figures(stats.time_to_first_token_s) == (1, 1.0)
    assert figures(stats.decode_time_s) == (1, 2.0)
    assert figures(stats.inter_token_latency_s) == (2, 2.0)
    assert figures(stats.time_per_output_token_s) == (1, 1.0)
    assert figures(stats.latency_s) == (1, 3.0)
    assert figures(stats.prompt_len) == (1, 4)
    assert figures(stats.output_len) == (1, 3)
    assert figures(stats.step_tokens) == (3, 6)
    assert stats.scheduled_tokens_total == 6
    assert stats.finished_total == {"length": 1}
    timings = [output.timing for output in outputs]
    assert timings[1] is None
    assert timings[0] is not None
    assert timings[2] is not None
    assert (timings[0].prefill_s, timings[0].decode_s) == (1.0, 0.0)
    assert (timings[2].prefill_s, timings[2].decode_s) == (1.0, 2.0)


async def test_who_finds_no_slot_has_waited_in_the_queue(clock: Clock) -> None:
    core, _ = await run(clock, request("a", 3), request("b", 3), request("c", 1))
    # Two slots; the third request gets one when the others have had their three tokens.
    assert figures(core.stats.queue_time_s) == (3, 3.0)
    assert figures(core.stats.time_to_first_token_s) == (3, 1.0 + 1.0 + 4.0)


async def test_a_request_that_another_engine_began_has_no_first_token_here(clock: Clock) -> None:
    core, outputs = await run(clock, request("a", 3, num_before=2))
    stats = core.stats
    assert figures(stats.time_to_first_token_s) == (0, 0.0)
    assert figures(stats.queue_time_s) == (1, 0.0)
    assert stats.prompt_tokens_total == 0
    assert stats.generated_tokens_total == 1
    assert outputs[0].timing is not None


@pytest.mark.parametrize(("reason", "num_latencies"), [("stop", 1), ("abort", 0)])
async def test_a_request_that_is_ended_early_counts_by_its_reason(
    reason: FinishReason, num_latencies: int, clock: Clock
) -> None:
    device = Device(LIMITS)
    device.clock = clock
    core = EngineCore(CONFIG, LIMITS, device, lambda _: core.abort("a", reason))
    core.add(request("a", 50))
    running = asyncio.create_task(core.run())
    async with asyncio.timeout(TIMEOUT_S):
        await core.wait_until_idle()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert core.stats.finished_total == {reason: 1}
    assert core.stats.latency_s.num_figures == num_latencies


async def test_a_request_that_ends_in_the_queue_has_no_latency(clock: Clock) -> None:
    del clock
    core = EngineCore(CONFIG, LIMITS, SimulatedDevice(LIMITS), lambda _: None)
    core.add(request("a", 5))
    core.abort("a", "stop")
    assert core.stats.finished_total == {"stop": 1}
    assert core.stats.latency_s.num_figures == 0
