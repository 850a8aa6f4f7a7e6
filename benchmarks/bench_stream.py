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
import os
import re
import secrets
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import ray
import zmq
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

import serve_app
from cluster.addresses import free_port
from cluster.calls import CallTable
from cluster.engine_choice import Route
from cluster.journal import GenerateCall
from cluster.openai.engine_client import EngineInfo, RankStatus
from cluster.ray_node import RayNode, start_node
from cluster.status import StartStatus
from cluster.token_socket import GenerateEnd, TokenSender
from engine.config import EngineConfig
from engine.request import RequestOutput
from engine.text.tokenizer import load_tokenizer
from scripts.demo_model import ensure_demo_model

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
MODEL = "fake"
CONTEXT_LENGTH = 1 << 20
RAY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60.0
ROUND_TIMEOUT_S = 300.0
SILENCE_TIMEOUT_S = 30.0
IDLE_S = 3.0
FULL_PAUSE_S = 0.001
ROLES = ("router", "leader", "proxy")
WARM_UP_STREAMS = 4
TEXT = (
    "The sky looks blue because air scatters short waves of light more than long ones, and so blue "
    "reaches the eye from everywhere. Déjà vu, naïve café, 日本語, and some numbers: 1, 22, 333.\n"
)


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
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        **({"RAY_SERVE_ENABLE_HA_PROXY": "0"} if arguments.proxy == "python" else {}),
        **read_pairs(arguments.node_env),
    }
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", *sys.argv[1:]],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        # Ray prints there, too: of a server whose end is not over, say.
        port = next((int(line) for line in server.stdout if line.strip().isdigit()), None)
        if port is None:
            raise RuntimeError(f"the server ended with {server.wait()}")
        asyncio.run(measure(arguments, server.pid, port))
    finally:
        end(server)
    return 0


# The server, a process of its own because Ray reads its environment as it is imported ------------


class FakeEngine:
    """The leader's deployment without a gang: `cluster.calls` as the real one uses it, a clock.

    Args:
        token_ids: What every request is answered with, over and over.
    """

    async def __init__(self, token_ids: list[int], vocab_size: int, tick_s: float) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._tick_s = tick_s
        self._sequences: dict[str, Sequence] = {}
        self._senders: set[TokenSender] = set()
        self._has_work = asyncio.Event()
        context = serve.get_replica_context()
        self._engine_id: str = context.replica_id.unique_id
        StartStatus(context.app_name, self._engine_id).ready()
        self._calls = CallTable(
            engine_id=self._engine_id,
            on_abort=self._forget,
            silence_timeout_s=SILENCE_TIMEOUT_S,
        )
        self._tasks = [
            asyncio.create_task(self._run()),
            asyncio.create_task(self._calls.watch_routers()),
        ]

    async def describe(self, *, route: Route) -> bytes:
        del route
        info = EngineInfo(
            is_ready=True,
            engine_id=self._engine_id,
            status="ready",
            context_length=CONTEXT_LENGTH,
            vocab_size=self._vocab_size,
            fingerprint=MODEL,
            ranks=(RankStatus(rank=0, state="ready", seconds_since_answer=0.0),),
        )
        return msgspec.msgpack.encode(info)

    async def generate(self, payload: bytes, *, route: Route) -> bytes:
        del route
        call = msgspec.msgpack.decode(payload, type=GenerateCall)
        running = self._calls.open(call)
        self._senders.add(running.sender)
        try:
            for choice in running.journal.rest():
                request_id = running.request_ids[choice.index]
                max_tokens = cast(int, choice.sampling.max_tokens)
                self._sequences[request_id] = Sequence(request_id, max_tokens)
            self._has_work.set()
            await running.ended
        finally:
            self._calls.close(running)
            for request_id in running.request_ids.values():
                self._forget(request_id)
        return msgspec.msgpack.encode(GenerateEnd(running.num_tokens))

    def _forget(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)

    async def _run(self) -> None:
        next_s = time.monotonic()
        while True:
            if not self._sequences:
                self._has_work.clear()
                await self._has_work.wait()
                next_s = time.monotonic()
            next_s += self._tick_s
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            if not self._tick_s:
                for sender in self._senders:
                    # Not `poll`, behind which the sender's own beats would queue.
                    while not cast(int, sender._socket.get(zmq.EVENTS)) & zmq.POLLOUT:
                        await asyncio.sleep(FULL_PAUSE_S)
            self._calls.deliver([self._step(each) for each in list(self._sequences.values())])

    def _step(self, sequence: "Sequence") -> RequestOutput:
        index = sequence.num_tokens
        sequence.num_tokens += 1
        has_ended = sequence.num_tokens == sequence.max_tokens
        if has_ended:
            self._forget(sequence.request_id)
        return RequestOutput(
            request_id=sequence.request_id,
            first_index=index,
            token_ids=(self._token_ids[index % len(self._token_ids)],),
            finish_reason="length" if has_ended else None,
        )


@dataclass(slots=True)
class Sequence:
    """What the fake leader knows of a request."""

    request_id: str
    max_tokens: int
    num_tokens: int = 0


def serve_until_stdin_ends(arguments: argparse.Namespace) -> None:
    """Run Ray and Serve with the fake engine; prints the HTTP port once it answers."""
    directory = ensure_demo_model()
    tokenizer = load_tokenizer(directory)
    host = ray.util.get_node_ip_address()
    node, address = start_head(host)
    try:
        python_path = f"{ROOT}:{Path(__file__).parent}"
        ray.init(
            address=address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        )
        port = free_port(HOST)
        serve.start(
            http_options=HTTPOptions(host=HOST, port=port),
            logging_config=LoggingConfig(enable_access_log=False),
        )
        most = max(WARM_UP_STREAMS, *arguments.streams)
        config = EngineConfig(
            model_path=str(directory),
            served_model_name=MODEL,
            context_length=CONTEXT_LENGTH,
            max_running_requests=most,
            max_queued_requests=most,
        )
        engine = serve_app.engine_deployment(config, FakeEngine).bind(
            tokenizer.encode(TEXT), tokenizer.vocab_size, arguments.tick_ms / 1000
        )
        router = serve_app.router_deployment(config, environment=read_pairs(arguments.router_env))
        fields = config.model_dump(exclude_unset=True)
        serve.run(router.bind(fields, engine), name="bench", route_prefix="/")
        print(port, flush=True)
        sys.stdin.read()
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        node.stop()


def start_head(host: str) -> tuple[RayNode, str]:
    """Start a Ray node, and wait until it is one; returns it and its address."""
    port = free_port(host)
    arguments = ["--head", "--node-ip-address", host, "--port", str(port), "--num-cpus", "2"]
    arguments += ["--object-store-memory", "100000000", "--include-dashboard", "false"]
    arguments += ["--ray-client-server-port", str(free_port(host))]
    deadline_s = time.monotonic() + RAY_TIMEOUT_S
    node = start_node(arguments, labels={}, what="Ray did not start", deadline_s=deadline_s)
    return node, f"{host}:{port}"


def read_pairs(pairs: list[str]) -> dict[str, str]:
    return dict(cast("tuple[str, str]", pair.split("=", 1)) for pair in pairs)


def end(server: "subprocess.Popen[bytes]") -> None:
    """Stop the server politely, then whatever it left."""
    family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        print(f"left behind: {process}", file=sys.stderr)
        process.kill()


# The client --------------------------------------------------------------------------------------


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


async def measure(arguments: argparse.Namespace, server_pid: int, port: int) -> None:
    """Run all rounds and print them."""
    await run_round(port, WARM_UP_STREAMS, 20, arguments.endpoint, {})
    # HAProxy is started anew when Serve tells it of the router, and once more of its fallback.
    await asyncio.sleep(IDLE_S)
    processes = find_processes(server_pid)
    before = cpu_seconds(processes)
    await asyncio.sleep(IDLE_S)
    after = cpu_seconds(processes)
    idle_share = sum(after[role] - before[role] for role in ROLES) / IDLE_S
    profilers = start_profilers(arguments, processes) if arguments.profile else []
    for index in range(arguments.repeat * len(arguments.streams)):
        num_streams = arguments.streams[index % len(arguments.streams)]
        done = await run_round(port, num_streams, arguments.tokens, arguments.endpoint, processes)
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
    processes: dict[str, list[psutil.Process]],
) -> Round:
    """Stream `num_tokens` to each of `num_streams` clients at once."""
    request = make_request(num_tokens, endpoint)
    loop = asyncio.get_running_loop()
    done = Round(num_streams)
    before, start_s = cpu_seconds(processes), time.monotonic()
    connections = [
        loop.create_connection(lambda: StreamClient(request), HOST, port)
        for _ in range(num_streams)
    ]
    clients = [client for _, client in await asyncio.gather(*connections)]
    async with asyncio.timeout(ROUND_TIMEOUT_S):
        answers = await asyncio.gather(*(client.ended for client in clients))
    done.seconds = time.monotonic() - start_s
    after = cpu_seconds(processes)
    done.cpu_s = {role: after[role] - before[role] for role in after}
    done.ttft_s = [client.first_s for client in clients]
    for answer in answers:
        if not (usage := re.search(rb'"completion_tokens":\s?(\d+)', answer)):
            raise RuntimeError(f"a stream ended early: {answer[-500:]!r}")
        done.num_tokens += int(usage[1])
        texts = rb'"content":\s?"[^"]' if endpoint == "chat" else rb'"text":\s?"[^"]'
        done.num_events += len(re.findall(texts, answer))
    return done


def make_request(num_tokens: int, endpoint: str) -> bytes:
    """A whole HTTP request for one streamed answer."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    question = "Why is the sky blue?"
    if endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": question}]
    else:
        path = "/v1/completions"
        body["prompt"] = question
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def find_processes(server_pid: int) -> dict[str, list[psutil.Process]]:
    """The processes of each role among the server's."""
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for process in psutil.Process(server_pid).children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        if title.startswith("ray::ServeReplica"):
            found["router" if title.endswith("Router") else "leader"].append(process)
        elif "haproxy" in title.lower() or "ProxyActor" in title:
            found["proxy"].append(process)
    if missing := [role for role, processes in found.items() if not processes]:
        raise RuntimeError(f"there is no process of {', '.join(missing)}")
    return found | {"client": [psutil.Process()]}


def cpu_seconds(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """CPU that each role has taken so far, in user and system mode."""
    totals = {}
    for role, members in processes.items():
        times = [process.cpu_times() for process in members]
        totals[role] = sum(each.user + each.system for each in times)
    return totals


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
