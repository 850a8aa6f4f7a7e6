"""Holds many slow streams on one router, then asks for far more than it admits.

    python benchmarks/bench_load.py                            # 1,000 streams, 10,000 refused
    python benchmarks/bench_load.py --streams 100 --flood 500 --at-once 500 --seconds 6
    python benchmarks/bench_load.py --front router             # no proxy: the router's own port

Starts a Ray of its own with one real router, and a leader whose tokens come from a clock and are
sent by the code that the real leader sends with. The streams begin within --ramp-s, or more slowly
where the waiting room would be full; then a few more requests fill it. After a quiet time another
process sends --flood requests, --at-once at a time, each over a connection of its own, and all of
them should be refused: by status 429 or 503, with OpenAI's error object and a Retry-After. Streams
have to last beyond that, or there is room again: --seconds.

Printed for the quiet time, the flood, and the time after it: milliseconds between a stream's tokens
(median, p99, largest), and the share of a core that each role took; the client is this process.
Lost is a stream that ended early; wrong, one with other text than the engine's.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np
import psutil
from ray import serve

import serve_app
from benchmarks.serving.answer import Answer
from benchmarks.streaming.client import HOST, MODEL, HeldRequest, make_request, send
from benchmarks.streaming.fake_leader import CONTEXT_LENGTH, FakeEngine, Pace
from benchmarks.streaming.flood import FloodBeside
from benchmarks.streaming.processes import CpuMeter, find_processes
from benchmarks.streaming.server import (
    QUIET,
    proxy_variables,
    ray_and_serve,
    read_pairs,
    server_beside,
    tell_port_and_wait,
)
from cluster.ray_node import raise_file_limit
from engine.config import EngineConfig
from engine.text.tokenizer import load_tokenizer
from scripts.demo_model import ensure_demo_model

# Plain letters: each token is text by itself, and so one event.
TEXT = "The sky looks blue because air scatters short waves of light more than long ones. "
TICK_S = 0.02
SETTLE_S = 3.0
RAMP_TIMEOUT_S = 120.0
MAX_LOSSES = 5
END_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Phase:
    """A time within the run, and what it was like.

    Attributes:
        cpu: Share of a core, by role.
        gaps_ms: Between tokens of a stream, of which the later one came in this time.
    """

    name: str
    start_s: float
    end_s: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    gaps_ms: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens-per-second", type=float, default=5.0, help="of each stream")
    parser.add_argument("--seconds", type=float, default=150.0, help="that each stream lasts")
    parser.add_argument("--ramp-s", type=float, default=5.0, help="within which streams begin")
    parser.add_argument("--flood", type=int, default=10_000, help="requests to be refused")
    parser.add_argument("--at-once", type=int, default=1000, help="of those, at one time")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait")
    parser.add_argument("--front", choices=("haproxy", "python", "router"), default="haproxy")
    parser.add_argument(
        "--node-env", nargs="+", default=[], metavar="NAME=VALUE", help="of Ray and all workers"
    )
    parser.add_argument("--json", action="store_true", help="one object, not a table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_file_limit()
    if arguments.serve:
        serve_until_stdin_ends(arguments)
        return 0
    environment = proxy_variables(arguments.front) | read_pairs(arguments.node_env)
    with server_beside(__file__, environment) as server:
        figures = asyncio.run(measure(arguments, server.pid, server.port))
    print(json.dumps(figures) if arguments.json else table(figures), flush=True)
    is_good = not (figures["lost"] or figures["wrong"])
    return 0 if is_good and figures["flood"]["polite"] == arguments.flood else 1


def serve_until_stdin_ends(arguments: argparse.Namespace) -> None:
    """Run Ray and Serve with the fake engine; tells the HTTP port."""
    directory = ensure_demo_model()
    tokenizer = load_tokenizer(directory)
    config = EngineConfig(
        model_path=str(directory),
        served_model_name=MODEL,
        context_length=CONTEXT_LENGTH,
        max_running_requests=arguments.streams,
        max_queued_requests=arguments.waiting,
    )
    pace = Pace(
        TICK_S,
        ticks_per_token=max(1, round(1 / (arguments.tokens_per_second * TICK_S))),
        max_running=arguments.streams,
    )
    with ray_and_serve() as port:
        engine = serve_app.engine_deployment(config, FakeEngine).bind(
            tokenizer.encode(TEXT), tokenizer.vocab_size, pace
        )
        router = serve_app.router_deployment(config).options(logging_config=QUIET)
        fields = config.model_dump(exclude_unset=True)
        serve.run(router.bind(fields, engine), name="load", route_prefix="/")
        tell_port_and_wait(port)


async def measure(arguments: argparse.Namespace, server_pid: int, port: int) -> dict[str, Any]:
    """Hold the streams, flood the router meanwhile, and count."""
    # HAProxy is started anew when Serve tells it of the router, and once more of its fallback.
    await asyncio.sleep(SETTLE_S)
    processes = find_processes(server_pid)
    if arguments.front == "router":
        port = await find_http_port(processes["router"][0])
    num_tokens = round(arguments.seconds * arguments.tokens_per_second)
    streams = await open_streams(arguments, make_request(num_tokens), port)
    waiting = [await send(make_request(1), port) for _ in range(arguments.waiting)]
    await asyncio.sleep(SETTLE_S)

    phases: list[Phase] = []
    meter = CpuMeter(processes)
    totals = meter.read()

    def begin(name: str) -> None:
        nonlocal totals
        now_s, before, totals = time.monotonic(), totals, meter.read()
        if phases:
            last = phases[-1]
            last.end_s = now_s
            seconds = now_s - last.start_s
            last.cpu = {role: (totals[role] - before[role]) / seconds for role in totals}
        phases.append(Phase(name, now_s))

    async with FloodBeside(arguments.flood, arguments.at_once, port) as flood:
        begin("quiet")
        await asyncio.sleep(arguments.seconds / 3)
        begin("flood")
        flooded = await flood.run()
    begin("after")
    ends = [stream.ended for stream in streams]
    async with asyncio.timeout(arguments.seconds + END_TIMEOUT_S):
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        begin("end")
        await asyncio.gather(*ends, *(each.ended for each in waiting))
    expected = expected_text(num_tokens)
    losses: Counter[str] = Counter()
    wrong = 0
    for stream in streams:
        is_lost, is_wrong = judge(stream, num_tokens, expected, phases)
        if is_lost:
            losses[describe_end(stream)] += 1
        wrong += is_wrong
    return {
        "streams": len(streams),
        "tokens_per_second": arguments.tokens_per_second,
        "front": arguments.front,
        "lost": losses.total(),
        "losses": dict(losses.most_common(MAX_LOSSES)),
        "wrong": wrong,
        "ended": meter.ended,
        "waiting": len(waiting),
        "waiting_lost": sum(judge(each, 1, "", [])[0] for each in waiting),
        "phases": [figures_of(phase) for phase in phases[:-1]],
        "flood": asdict(flooded)
        | {"answer_s": spread(flooded.answer_s), "retry_after_s": spread(flooded.retry_after_s)},
    }


async def open_streams(
    arguments: argparse.Namespace, request: bytes, port: int
) -> list[HeldRequest]:
    """Open all streams, never more at once than may wait for their first token; all have theirs."""
    room = asyncio.Semaphore(max(1, arguments.waiting // 2))

    async def open_one(number: int) -> HeldRequest:
        await asyncio.sleep(number * arguments.ramp_s / arguments.streams)
        async with room:
            stream = await send(request, port)
            await stream.has_begun.wait()
        return stream

    async with asyncio.timeout(arguments.ramp_s + RAMP_TIMEOUT_S):
        return await asyncio.gather(*map(open_one, range(arguments.streams)))


def judge(
    stream: HeldRequest, num_tokens: int, expected: str, phases: Sequence[Phase]
) -> tuple[bool, bool]:
    """Whether a stream is lost, and whether it is wrong; its gaps go to the phases."""
    answer = Answer(keeps_text=True)
    for at_s, part in stream.parts if stream.status == 200 else ():
        answer.feed(part, at_s)
    if not (stream.is_whole and answer.is_done and answer.usage):
        return True, False
    times_s = [arrival.at_s for arrival in answer.arrivals()]
    for before_s, at_s in pairwise(times_s):
        for phase in phases:
            if phase.start_s <= at_s < phase.end_s:
                phase.gaps_ms.append(1e3 * (at_s - before_s))
    has_all = answer.usage.completion_tokens == num_tokens
    return not has_all, bool(expected) and answer.text != expected


def describe_end(stream: HeldRequest) -> str:
    """How a stream ended that is lost, without what tells it from others."""
    if stream.status != 200:
        return f"status {stream.status}: {stream.body[:200]!r}"
    how = "ended without its end" if stream.is_whole else "broken"
    last = stream.parts[-1][1][-300:]
    # An event's id counts the stream's own tokens.
    return f"{how}: {re.sub(rb'(?m)^id: .*$', b'', last)!r}"


def expected_text(num_tokens: int) -> str:
    """What the engine's tokens say."""
    tokenizer = load_tokenizer(ensure_demo_model())
    token_ids = tokenizer.encode(TEXT)
    repeated = (token_ids[index % len(token_ids)] for index in range(num_tokens))
    return b"".join(map(tokenizer.token_bytes, repeated)).decode()


async def find_http_port(router: psutil.Process) -> int:
    """Where the router itself answers HTTP; it listens for Ray, too."""
    timeout = aiohttp.ClientTimeout(total=2)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for connection in router.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            port = connection.laddr.port
            try:
                async with session.get(f"http://{HOST}:{port}/health") as response:
                    if (await response.json()).get("status") == "ready":
                        return port
            except (aiohttp.ClientError, TimeoutError, OSError):
                continue
    raise RuntimeError("the router has no HTTP port of its own; HAProxy has to be there")


def figures_of(phase: Phase) -> dict[str, Any]:
    gaps = phase.gaps_ms or [float("nan")]
    return {
        "phase": phase.name,
        "seconds": phase.end_s - phase.start_s,
        "gap_p50_ms": float(np.percentile(gaps, 50)),
        "gap_p99_ms": float(np.percentile(gaps, 99)),
        "gap_max_ms": max(gaps),
        "tokens_per_second": len(phase.gaps_ms) / (phase.end_s - phase.start_s),
        "cpu": phase.cpu,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(figures: dict[str, Any]) -> str:
    flooded = figures["flood"]
    lines = [
        f"{figures['streams']} streams of {figures['tokens_per_second']:g} tokens/s through "
        f"{figures['front']}: {figures['lost']} lost, {figures['wrong']} wrong; of "
        f"{figures['waiting']} that waited, {figures['waiting_lost']} lost",
        "",
        "| time | seconds | tokens/s | ms between tokens: median, p99, max | "
        "share of a core: router, leader, proxy, client |",
        "|---|---|---|---|---|",
    ]
    for each in figures["phases"]:
        gaps = ", ".join(f"{each[name]:.0f}" for name in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms"))
        shares = ", ".join(
            f"{each['cpu'][role]:.2f}" for role in ("router", "leader", "proxy", "client")
        )
        lines.append(
            f"| {each['phase']} | {each['seconds']:.1f} | {each['tokens_per_second']:.0f} | "
            f"{gaps} | {shares} |"
        )
    lines += [
        "",
        f"{flooded['requests']} more at once: {flooded['polite']} refused politely; statuses "
        f"{flooded['statuses']}, failures {flooded['failures']}, seconds to the answer "
        f"{rounded(flooded['answer_s'])}, Retry-After {rounded(flooded['retry_after_s'])}, "
        f"{flooded['cpu_s']:.1f} s of CPU in their client",
        *flooded["odd"],
        *(f"{count} lost: {end}" for end, count in figures["losses"].items()),
        *(f"a {role} ended meanwhile" for role in figures["ended"]),
    ]
    return "\n".join(lines)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
