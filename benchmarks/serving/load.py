"""When requests are sent: arrival times and the limit on how many run at once."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from benchmarks.serving.results import BenchRequest, RequestResult


def arrival_times(
    num_requests: int, *, request_rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Draw when each request is sent, in seconds from the start.

    Args:
        request_rate: Requests per second on average; infinite sends all of them at once.
        burstiness: Shape of the gamma distribution of the intervals. 1 is a Poisson process;
            smaller sends in bursts, larger more evenly.
    """
    if math.isinf(request_rate):
        return [0.0] * num_requests
    scale_s = 1 / (request_rate * burstiness)
    intervals = rng.gamma(shape=burstiness, scale=scale_s, size=num_requests)
    intervals[:1] = 0.0
    return np.cumsum(intervals).tolist()


async def run_load(
    requests: Sequence[BenchRequest],
    send: Callable[[BenchRequest], Awaitable[RequestResult]],
    *,
    times_s: Sequence[float],
    max_concurrency: int | None,
    on_result: Callable[[RequestResult], None],
) -> None:
    """Send every request at its time, or later where `max_concurrency` are under way already.

    A request's clock starts when it is sent, so waiting here is not part of its latency.

    Args:
        send: Must not raise for a request that fails.
        on_result: Called as each request ends.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def run(request: BenchRequest) -> None:
        async with gate:
            result = await send(request)
        on_result(result)

    loop = asyncio.get_running_loop()
    start_s = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for request, time_s in zip(requests, times_s, strict=True):
            wait_s = start_s + time_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.create_task(run(request))
