"""Measures a running server through HTTP: output tokens per second at some concurrencies.

    scripts/quickstart &
    python benchmarks/bench_quick.py --url http://127.0.0.1:8000

Every request streams a fixed number of tokens from a prompt of its own, so that neither an early
end nor the prefix cache flatters. TTFT is the time to the first token, TPOT the mean time per token
after it; both as medians over the requests.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass

import httpx

WORDS = ("river", "stone", "window", "market", "engine", "garden", "winter", "letter", "bridge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One request's figures."""

    num_tokens: int
    ttft_s: float
    total_s: float

    @property
    def tpot_s(self) -> float:
        return (self.total_s - self.ttft_s) / max(1, self.num_tokens - 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server listens")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="per concurrent stream")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    asyncio.run(run(arguments))
    return 0


async def run(arguments: argparse.Namespace) -> None:
    timeout = httpx.Timeout(600.0)
    limits = httpx.Limits(max_connections=max(arguments.concurrency))
    async with httpx.AsyncClient(base_url=arguments.url, timeout=timeout, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        await request(client, model, make_prompt(0, arguments.prompt_words), 8)
        first = 1
        for concurrency in arguments.concurrency:
            numbers = range(first, first + concurrency * arguments.requests)
            first = numbers.stop
            start_s = time.monotonic()
            timings = await run_round(client, model, numbers, concurrency, arguments)
            figures = summarise(timings, time.monotonic() - start_s)
            print(json.dumps({"concurrency": concurrency} | figures), flush=True)


async def run_round(
    client: httpx.AsyncClient,
    model: str,
    numbers: range,
    concurrency: int,
    arguments: argparse.Namespace,
) -> list[Timing]:
    """Send one request per number, so many of them at once."""
    remaining = iter(numbers)
    timings = []

    async def stream() -> None:
        for number in remaining:
            prompt = make_prompt(number, arguments.prompt_words)
            timings.append(await request(client, model, prompt, arguments.max_tokens))

    await asyncio.gather(*(stream() for _ in range(concurrency)))
    return timings


def summarise(timings: list[Timing], seconds: float) -> dict[str, float]:
    num_tokens = sum(timing.num_tokens for timing in timings)
    return {
        "requests": len(timings),
        "output_tokens_per_s": round(num_tokens / seconds, 1),
        "ttft_ms": round(statistics.median(timing.ttft_s for timing in timings) * 1e3, 1),
        "tpot_ms": round(statistics.median(timing.tpot_s for timing in timings) * 1e3, 2),
    }


def make_prompt(number: int, num_words: int) -> str:
    """Make a prompt that shares no beginning with those of other numbers."""
    chosen = (WORDS[(number * 7 + index * 3) % len(WORDS)] for index in range(num_words))
    return f"Story {number}: " + " ".join(chosen)


async def request(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Timing:
    """Stream one completion.

    Raises:
        RuntimeError: The stream ended in an error event, or without usage.
        httpx.HTTPStatusError: The server refused.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start_s = time.monotonic()
    first_s = 0.0
    num_tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"the stream broke off: {event['error']['message']}")
            if event["choices"] and not first_s:
                first_s = time.monotonic() - start_s
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    if not num_tokens:
        raise RuntimeError("the stream ended without usage")
    return Timing(num_tokens=num_tokens, ttft_s=first_s, total_s=time.monotonic() - start_s)


if __name__ == "__main__":
    sys.exit(main())
