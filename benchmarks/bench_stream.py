"""Measures what streaming costs: CPU per token in router, leader and proxy, with a fake model.

    python benchmarks/bench_stream.py
    python benchmarks/bench_stream.py --tick-ms 0 --streams 64     # as fast as it goes
    python benchmarks/bench_stream.py --proxy python               # Serve's own proxy in front

Starts a Ray of its own with the real router, and a leader whose tokens come from a clock: one for
each stream every --tick-ms, sent by the code that the real leader sends with. With --tick-ms 0 it
sends whenever the router's connection takes one more step, so that the router always lags.

Columns: CPU microseconds per token of each role and their sum, all of a round counted: opening and
ending its requests, and what idle processes take; idle, how much of the sum the latter is, measured
before the rounds; tokens per second by `usage`; tokens per event that has any; milliseconds to the
first token, median. The client is this process, and its CPU stands apart.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import psutil
from ray import serve

import serve_app
from benchmarks.streaming.client import HOST, MODEL, make_request
from benchmarks.streaming.fake_leader import CONTEXT_LENGTH, TEXT, FakeEngine, Pace
from benchmarks.streaming.processes import ROLES, CpuMeter, find_processes
from benchmarks.streaming.server import (
    Server,
    proxy_variables,
    ray_and_serve,
    read_pairs,
    server_beside,
    tell_port_and_wait,
)
from engine.config import EngineConfig
from engine.text.tokenizer import load_tokenizer
from scripts.demo_model import ensure_demo_model

ROUND_TIMEOUT_S = 300.0
IDLE_S = 3.0
WARM_UP_STREAMS = 4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--tokens", type=int, default=400, help="per stream")
    parser.add_argument("--tick-ms", type=float, default=20.0, help="0: as fast as it goes")
    parser.add_argument("--repeat", type=int, default=1, help="times that all rounds are run")
    parser.add_argument("--endpoint", choices=("chat", "text"), default="chat")
    parser.add_argument("--proxy", choices=("haproxy", "python"), default="haproxy")
    parser.add_argument(
        "--node-env", nargs="+", default=[], metavar="NAME=VALUE", help="of Ray and all workers"
    )
    parser.add_argument(
        "--router-env", nargs="+", default=[], metavar="NAME=VALUE", help="of the router alone"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="sample router and leader with py-spy"
    )
    parser.add_argument("--json", action="store_true", help="one object per round, not a table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_stdin_ends(arguments)
        return 0
    environment = proxy_variables(arguments.proxy) | read_pairs(arguments.node_env)
    with server_beside(__file__, environment) as server:
        asyncio.run(measure(arguments, server))
    return 0


def serve_until_stdin_ends(arguments: argparse.Namespace) -> None:
    """Run Ray and Serve with the fake engine; tells the HTTP port once it answers."""
    directory = ensure_demo_model()
    tokenizer = load_tokenizer(directory)
    with ray_and_serve() as port:
        most = max(WARM_UP_STREAMS, *arguments.streams)
        config = EngineConfig(
            model_path=str(directory),
            served_model_name=MODEL,
            context_length=CONTEXT_LENGTH,
            max_running_requests=most,
            max_queued_requests=most,
        )
        pace = Pace(arguments.tick_ms / 1000, ticks_per_token=1, max_running=most)
        engine = serve_app.engine_deployment(config, FakeEngine).bind(
            tokenizer.encode(TEXT), tokenizer.vocab_size, pace
        )
        router = serve_app.router_deployment(config, environment=read_pairs(arguments.router_env))
        fields = config.model_dump(exclude_unset=True)
        serve.run(router.bind(fields, engine), name="bench", route_prefix="/")
        tell_port_and_wait(port)


class StreamClient(asyncio.Protocol):
    """One streamed answer, read as cheaply as Python can; taken apart only after its end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parts: list[bytes] = []
        self._start_s = time.monotonic()
        self.first_s = 0.0
        self.ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._start_s = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if not self.first_s and b'"choices"' in data:
            self.first_s = time.monotonic() - self._start_s
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(b"".join(self._parts))


@dataclass(slots=True)
class Round:
    """What one round counted; CPU in seconds by role."""

    num_streams: int
    seconds: float = 0.0
    num_tokens: int = 0
    num_events: int = 0
    ttft_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    idle_s: float = 0.0

    def figures(self) -> dict[str, float]:
        per_token = {role: 1e6 * seconds / self.num_tokens for role, seconds in self.cpu_s.items()}
        return {
            "streams": self.num_streams,
            **per_token,
            "sum": sum(per_token[role] for role in ROLES),
            "idle": 1e6 * self.idle_s / self.num_tokens,
            "tokens/s": self.num_tokens / self.seconds,
            "tokens/event": self.num_tokens / max(1, self.num_events),
            "ttft_ms": 1e3 * statistics.median(self.ttft_s),
        }


async def measure(arguments: argparse.Namespace, server: Server) -> None:
    """Run all rounds and print them."""
    await run_round(server.port, WARM_UP_STREAMS, 20, arguments.endpoint, CpuMeter({}))
    # HAProxy is started anew when Serve tells it of the router, and once more of its fallback.
    await asyncio.sleep(IDLE_S)
    processes = find_processes(server.pid)
    meter = CpuMeter(processes)
    before = meter.read()
    await asyncio.sleep(IDLE_S)
    after = meter.read()
    idle_share = sum(after[role] - before[role] for role in ROLES) / IDLE_S
    profilers = start_profilers(arguments, processes) if arguments.profile else []
    for index in range(arguments.repeat * len(arguments.streams)):
        num_streams = arguments.streams[index % len(arguments.streams)]
        done = await run_round(
            server.port, num_streams, arguments.tokens, arguments.endpoint, meter
        )
        done.idle_s = idle_share * done.seconds
        print_round(done.figures(), has_heading=index == 0, as_json=arguments.json)
    for profiler in profilers:
        profiler.send_signal(2)
        profiler.wait()


async def run_round(
    port: int,
    num_streams: int,
    num_tokens: int,
    endpoint: str,
    meter: CpuMeter,
) -> Round:
    """Stream `num_tokens` to each of `num_streams` clients at once."""
    request = make_request(num_tokens, endpoint=endpoint)
    loop = asyncio.get_running_loop()
    done = Round(num_streams)
    before, start_s = meter.read(), time.monotonic()
    connections = [
        loop.create_connection(lambda: StreamClient(request), HOST, port)
        for _ in range(num_streams)
    ]
    clients = [client for _, client in await asyncio.gather(*connections)]
    async with asyncio.timeout(ROUND_TIMEOUT_S):
        answers = await asyncio.gather(*(client.ended for client in clients))
    done.seconds = time.monotonic() - start_s
    after = meter.read()
    done.cpu_s = {role: after[role] - before[role] for role in after}
    done.ttft_s = [client.first_s for client in clients]
    for answer in answers:
        if not (usage := re.search(rb'"completion_tokens":\s?(\d+)', answer)):
            raise RuntimeError(f"a stream ended early: {answer[-500:]!r}")
        done.num_tokens += int(usage[1])
        texts = rb'"content":\s?"[^"]' if endpoint == "chat" else rb'"text":\s?"[^"]'
        done.num_events += len(re.findall(texts, answer))
    return done


def start_profilers(
    arguments: argparse.Namespace, processes: dict[str, list[psutil.Process]]
) -> "list[subprocess.Popen[bytes]]":
    """Sample router and leader into FOLDER/ROLE.txt, one line per stack and its count."""
    arguments.profile.mkdir(parents=True, exist_ok=True)
    return [
        subprocess.Popen(
            [
                str(Path(sys.executable).with_name("py-spy")),
                *("record", "--format", "raw", "--rate", "250", "--nonblocking"),
                *("--pid", str(processes[role][0].pid)),
                *("--output", str(arguments.profile / f"{role}.txt")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for role in ("router", "leader")
    ]


def print_round(figures: dict[str, float], *, has_heading: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
        return
    if has_heading:
        print("".join(f"{name:>13}" for name in figures), flush=True)
    print("".join(f"{value:>13.1f}" for value in figures.values()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
