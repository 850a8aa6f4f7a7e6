"""The load benchmark's clients against the real router with a fake engine, without Ray."""

import asyncio
from pathlib import Path

from fake_engine import make_service, serve_on_loopback

from benchmarks.bench_load import Phase, judge
from benchmarks.streaming.client import MODEL, make_request, send
from benchmarks.streaming.flood import flood
from engine.text.tokenizer import load_tokenizer

TEXT = "Once upon a time"


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


async def test_what_is_beyond_the_bound_is_refused_politely_and_what_waits_is_not(tmp_path: Path):
    service, engine = make_service(tmp_path, served_model_name=MODEL, max_queued_requests=4)
    engine.steps = asyncio.Semaphore(0)
    async with serve_on_loopback(service) as url:
        waiting = [await send(make_request(3), port_of(url)) for _ in range(4)]
        async with asyncio.timeout(30):
            while len(engine.requests) < 4:
                await asyncio.sleep(0)
        done = await flood(200, 200, port_of(url))
        for _ in range(4 * 3):
            engine.steps.release()
        await asyncio.wait_for(asyncio.gather(*(each.ended for each in waiting)), 30)
    assert (done.polite, done.statuses, done.failures) == (200, {429: 200}, {})
    assert min(done.retry_after_s) >= 1
    assert [judge(each, 3, "", []) for each in waiting] == [(False, False)] * 4


async def test_a_flood_that_is_served_or_finds_nobody_counts_as_no_polite_refusal(tmp_path: Path):
    service, _ = make_service(tmp_path, served_model_name=MODEL)
    async with serve_on_loopback(service) as url:
        served = await flood(2, 2, port_of(url))
    assert (served.polite, served.statuses) == (0, {200: 2})
    nobody = await flood(2, 2, port_of(url))
    assert (nobody.polite, nobody.statuses) == (0, {})
    assert sum(nobody.failures.values()) == 2


async def test_a_stream_is_judged_by_its_tokens_and_its_text(tmp_path: Path):
    service, engine = make_service(tmp_path, served_model_name=MODEL)
    engine.answer = lambda _: TEXT
    phase = Phase("whole", start_s=0.0, end_s=float("inf"))
    async with serve_on_loopback(service) as url:
        stream = await send(make_request(100), port_of(url))
        await asyncio.wait_for(stream.ended, 30)
    num_tokens = len(load_tokenizer(tmp_path).encode(TEXT)) + 1  # And the one that ends it.
    assert judge(stream, num_tokens, TEXT, [phase]) == (False, False)
    assert phase.gaps_ms
    assert judge(stream, num_tokens, TEXT[:-1], []) == (False, True)
    assert judge(stream, num_tokens + 1, TEXT, []) == (True, False)
    stream.parts.pop()  # With the event that says that there are no more.
    assert judge(stream, num_tokens, TEXT, []) == (True, False)
