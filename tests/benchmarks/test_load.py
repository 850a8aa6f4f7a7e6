"""When requests are sent, and how many at once."""

import asyncio
import math

import numpy as np
import pytest

from benchmarks.serving.load import arrival_times, run_load
from benchmarks.serving.results import BenchRequest, RequestResult

REQUESTS = [BenchRequest(prompt=[number], prompt_len=1, output_len=1) for number in range(12)]


def times(rate: float, burstiness: float = 1.0, count: int = 40_000) -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.array(arrival_times(count, request_rate=rate, burstiness=burstiness, rng=rng))


def test_an_infinite_rate_sends_all_at_once():
    assert times(math.inf, count=3).tolist() == [0.0, 0.0, 0.0]


def test_a_poisson_process_has_exponential_intervals_of_the_rate():
    intervals = np.diff(times(5.0))
    assert intervals.mean() == pytest.approx(0.2, rel=0.05)
    assert intervals.std() == pytest.approx(intervals.mean(), rel=0.05)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_changes_the_spread_and_not_the_rate(burstiness):
    intervals = np.diff(times(5.0, burstiness))
    assert intervals.mean() == pytest.approx(0.2, rel=0.05)
    assert intervals.std() == pytest.approx(0.2 / math.sqrt(burstiness), rel=0.05)


async def run(max_concurrency: int | None) -> tuple[int, list[RequestResult]]:
    """Let each request wait until no more can start; returns the most that ran at once."""
    num_running = num_most = 0
    results: list[RequestResult] = []

    async def send(request: BenchRequest) -> RequestResult:
        nonlocal num_running, num_most
        num_running += 1
        num_most = max(num_most, num_running)
        for _ in range(len(REQUESTS)):
            await asyncio.sleep(0)
        num_running -= 1
        return RequestResult(request=request, start_s=0.0, latency_s=0.0)

    await run_load(
        REQUESTS,
        send,
        times_s=[0.0] * len(REQUESTS),
        max_concurrency=max_concurrency,
        on_result=results.append,
    )
    return num_most, results


@pytest.mark.parametrize(("max_concurrency", "expected"), [(None, 12), (1, 1), (5, 5)])
async def test_as_many_run_at_once_as_may(max_concurrency, expected):
    num_most, results = await run(max_concurrency)
    assert num_most == expected
    assert sorted(result.request.prompt for result in results) == [[n] for n in range(12)]
