"""Break engines under load, and count what their clients notice.

    python tests/e2e/faults.py
    python tests/e2e/faults.py --faults rank-killed leader-killed --injections 3 --json out.json

Starts a Ray of its own with engines of several hosts, in float32, where a stream that was broken
must be the very one that was not: processes of this machine, or network namespaces (as root, with
iproute2) where whole hosts and their links are broken. Clients stream all the while; every so often
a fault hits something by chance, and the next one waits until all serve again. For each fault the
table has the requests that ran meanwhile, how often a client whose connection broke asked for the
rest of its stream or for its whole answer again, the requests that ended in an error or too early,
those with other text than the unbroken one, and the longest pauses within streams.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aiohttp
import httpx
import psutil
from host_cluster import HostCluster, host_cluster
from own_ray import own_ray  # before Ray, whose environment it sets
from processes import descendants
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from tiny_checkpoint import tiny_checkpoint

import serve_app
from cluster.addresses import free_port
from tests.e2e.patient_client import AnswerError, PatientClient, asking

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
MODEL = "fault-test"
START_TIMEOUT_S = 400
RECOVERY_TIMEOUT_S = 240
NOTICE_TIMEOUT_S = 30
BETWEEN_FAULTS_S = (1.0, 3.0)
PROMPTS = (
    "Why is the sky blue?",
    "Tell me a story about a lighthouse.",
    "List the planets and say something of each.",
    "How does one bake bread?",
)


@dataclass(frozen=True, slots=True)
class Work:
    """One request, of which the answer is known."""

    prompt: str
    seed: int | None
    num_tokens: int
    is_stream: bool


@dataclass(slots=True)
class Stream:
    """What a client saw of one request.

    Attributes:
        num_breaks: How often its connection broke, and it was asked for again, or its rest.
    """

    work: Work
    started_s: float
    error: str | None = None
    is_wrong: bool = False
    pause_s: float = 0.0
    num_breaks: int = 0

    def count_break(self) -> None:
        self.num_breaks += 1


@dataclass(slots=True)
class Outcome:
    """What one kind of fault did.

    Attributes:
        requests: That ran meanwhile, whether or not their engine was hit.
        rests: How often a stream's client had to ask for the rest of it.
        repeats: How often a whole answer's client had to ask for it again.
        pauses_s: Each stream's longest pause, that before its first text included.
        recoveries_s: From each injection until all engines served again.
    """

    fault: str
    injections: int = 0
    requests: int = 0
    rests: int = 0
    repeats: int = 0
    lost: int = 0
    wrong: int = 0
    pauses_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to break something.

    Attributes:
        inject: Does it, to one of several by chance.
        stops_engine: An engine cannot serve until it is mended.
        needs_hosts: Hosts of their own, not processes on this machine, are what it breaks.
    """

    inject: Callable[[HostCluster | None], None]
    stops_engine: bool = True
    needs_hosts: bool = False


def rank_killed(_: HostCluster | None) -> None:
    os.kill(chance(ranks()).pid, signal.SIGKILL)


def rank_frozen(_: HostCluster | None) -> None:
    os.kill(chance(ranks()).pid, signal.SIGSTOP)


def leader_killed(_: HostCluster | None) -> None:
    os.kill(chance(leaders()).pid, signal.SIGKILL)


def leader_frozen(_: HostCluster | None) -> None:
    os.kill(chance(leaders()).pid, signal.SIGSTOP)


def router_killed(_: HostCluster | None) -> None:
    # The one that was there first: clients keep their connections, so a new one has few of them.
    oldest = min(routers(), key=psutil.Process.create_time)
    os.kill(oldest.pid, signal.SIGKILL)


def host_killed(cluster: HostCluster | None) -> None:
    assert cluster is not None
    cluster.kill_host()


def link_cut(cluster: HostCluster | None) -> None:
    assert cluster is not None
    cluster.cut_link()


def connection_broken(_: HostCluster | None) -> None:
    """Every TCP connection between a router and a leader, whoever opened it."""
    pair = [chance(routers()), chance(leaders())]
    listening = [
        {each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"}
        for process in pair
    ]
    for process, ports in zip(pair, reversed(listening), strict=True):
        for each in process.net_connections("tcp"):
            if each.status == "ESTABLISHED" and each.raddr.port in ports:
                ends = ["sport", "=", f":{each.laddr.port}", "dport", "=", f":{each.raddr.port}"]
                subprocess.run(["ss", "--kill", "--tcp", *ends], check=True, capture_output=True)


FAULTS = {
    "rank-killed": Fault(rank_killed),
    "rank-frozen": Fault(rank_frozen),
    "leader-killed": Fault(leader_killed),
    "leader-frozen": Fault(leader_frozen),
    "router-killed": Fault(router_killed, stops_engine=False),
    "connection-broken": Fault(connection_broken, stops_engine=False),
    "host-killed": Fault(host_killed, needs_hosts=True),
    "link-cut": Fault(link_cut, needs_hosts=True),
}


def ranks() -> list[psutil.Process]:
    return processes_named("ray::HostWorker")


def leaders() -> list[psutil.Process]:
    return processes_named("ray::ServeReplica", ":Engine")


def routers() -> list[psutil.Process]:
    return processes_named("ray::ServeReplica", ":Router")


def processes_named(start: str, part: str = "") -> list[psutil.Process]:
    return [
        process
        for process, name in titles(descendants())
        if name.startswith(start) and part in name and is_running(process)
    ]


def is_running(process: psutil.Process) -> bool:
    """Not frozen by an earlier fault, and about to be replaced."""
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def titles(processes: dict[psutil.Process, str]) -> Iterator[tuple[psutil.Process, str]]:
    """Whole titles: a process's name is cut after 15 characters."""
    for process in processes:
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        yield process, title


def chance(choices: Sequence[psutil.Process]) -> psutil.Process:
    if not choices:
        raise RuntimeError("there is nothing to break")
    return random.choice(choices)


class Clients:
    """Clients that ask for one answer after another, and keep what they saw."""

    def __init__(self, base_url: str, works: Sequence[Work]) -> None:
        self._client = PatientClient(base_url)
        self._works = works
        self._answers: dict[Work, str] = {}
        self.streams: list[Stream] = []

    async def learn_answers(self) -> None:
        """Ask for each answer while nothing breaks."""
        streams = [Stream(work, started_s=0.0) for work in self._works]
        answers = await asyncio.gather(*(self._ask(each, lambda: None) for each in streams))
        self._answers = dict(zip(self._works, answers, strict=True))

    def asking(self, num_clients: int) -> AbstractAsyncContextManager[None]:
        """Keep so many requests under way; at the end all are brought to their ends."""
        return asking(num_clients, self._ask_one)

    async def _ask_one(self, turn: int) -> None:
        work = self._works[turn % len(self._works)]
        stream = Stream(work, started_s=time.monotonic())
        self.streams.append(stream)
        last_s = stream.started_s

        def on_text() -> None:
            nonlocal last_s
            now_s = time.monotonic()
            stream.pause_s = max(stream.pause_s, now_s - last_s)
            last_s = now_s

        try:
            text = await self._ask(stream, on_text)
        except (aiohttp.ClientError, AnswerError, TimeoutError) as error:
            stream.error = repr(error)
        else:
            stream.is_wrong = text != self._answers[work]

    async def _ask(self, stream: Stream, on_text: Callable[[], None]) -> str:
        work = stream.work
        options = {"temperature": 0.0} if work.seed is None else {"seed": work.seed}
        request = {
            "model": MODEL,
            "messages": [{"role": "user", "content": work.prompt}],
            "max_tokens": work.num_tokens,
            "ignore_eos": True,
            **options,
        }
        if work.is_stream:
            text = ""
            async with aclosing(self._client.events(request, stream.count_break)) as events:
                async for event in events:
                    if content := event["choices"][0]["delta"].get("content"):
                        text += content
                        on_text()
            return text
        answer = await self._client.whole(request, stream.count_break)
        on_text()
        return answer["choices"][0]["message"]["content"]

    async def close(self) -> None:
        await self._client.close()


async def wait_until(base_url: str, num_ranks: int, *, all_serve: bool, timeout_s: float) -> None:
    """Wait until every rank of every engine answers, or until some do not."""
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    response = await client.get("/health/ready")
                    ranks = response.json()["ranks"]
                except (httpx.TransportError, json.JSONDecodeError):
                    ranks = []  # of a router that is gone, or of the proxy in its place
                do_serve = len(ranks) == num_ranks and all(
                    rank["state"] == "ready" for rank in ranks
                )
                if do_serve == all_serve:
                    return
                await asyncio.sleep(0.1)


async def wait_for_processes(arguments: argparse.Namespace) -> None:
    """Wait until there are all routers, leaders and ranks again.

    A router that has not noticed a fault so far would say that all serve.
    """
    async with asyncio.timeout(RECOVERY_TIMEOUT_S):
        while (
            len(routers()) < arguments.routers
            or len(leaders()) < arguments.engines
            or len(ranks()) < arguments.engines * arguments.hosts
        ):
            await asyncio.sleep(0.25)


async def inject(
    arguments: argparse.Namespace,
    names: Sequence[str],
    base_url: str,
    cluster: HostCluster | None = None,
) -> list[Outcome]:
    """Inject faults one after the other; `cluster` is what those break that need hosts."""
    works = [
        Work(prompt, seed, arguments.tokens, is_stream)
        for prompt in PROMPTS
        for seed in (None, 11)
        for is_stream in (True, False)
    ]
    random.seed(arguments.seed)
    clients = Clients(base_url, works)
    num_ranks = arguments.engines * arguments.hosts
    outcomes = []
    await wait_until(base_url, num_ranks, all_serve=True, timeout_s=START_TIMEOUT_S)
    await clients.learn_answers()
    for name in names:
        fault, outcome = FAULTS[name], Outcome(name)
        outcomes.append(outcome)
        async with clients.asking(arguments.streams):
            for number in range(arguments.injections):
                await asyncio.sleep(random.uniform(*BETWEEN_FAULTS_S))
                hit_s = time.monotonic()
                fault.inject(cluster)
                outcome.injections += 1
                if fault.stops_engine:
                    await wait_until(
                        base_url, num_ranks, all_serve=False, timeout_s=NOTICE_TIMEOUT_S
                    )
                await wait_for_processes(arguments)
                await wait_until(base_url, num_ranks, all_serve=True, timeout_s=RECOVERY_TIMEOUT_S)
                outcome.recoveries_s.append(time.monotonic() - hit_s)
                if cluster is not None:
                    await asyncio.to_thread(cluster.mend)
                print(
                    f"{name} {number + 1} of {arguments.injections}: all serve again after "
                    f"{outcome.recoveries_s[-1]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
        judge(outcome, clients.streams)
        clients.streams.clear()
        print(table([outcome]), file=sys.stderr, flush=True)
    await clients.close()
    return outcomes


def judge(outcome: Outcome, streams: Sequence[Stream]) -> None:
    """Count what became of the streams under a fault."""
    outcome.requests = len(streams)
    for stream in streams:
        if stream.work.is_stream:
            outcome.rests += stream.num_breaks
        else:
            outcome.repeats += stream.num_breaks
        outcome.lost += stream.error is not None
        outcome.wrong += stream.is_wrong
        if stream.error is not None:
            outcome.errors.append(stream.error)
        if stream.work.is_stream and stream.pause_s:
            outcome.pauses_s.append(stream.pause_s)


@contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[str]:
    """Serve with a Ray of our own; yields the URL."""
    with tempfile.TemporaryDirectory() as folder, own_ray(num_cpus=8):
        http_port = free_port(HOST)
        quiet = LoggingConfig(enable_access_log=False)
        serve.start(http_options=HTTPOptions(host=HOST, port=http_port), logging_config=quiet)
        application = serve_app.build(application_args(arguments, Path(folder)))
        serve.run(application, name=MODEL, route_prefix="/")
        yield f"http://{HOST}:{http_port}"
        serve.shutdown()


@contextmanager
def serving_on_hosts(arguments: argparse.Namespace) -> Iterator[HostCluster]:
    """Serve on hosts of their own, one more than the engines take."""
    with tempfile.TemporaryDirectory() as name:
        folder, num_hosts = Path(name), arguments.engines * arguments.hosts + 1
        with host_cluster(num_hosts, folder, random.Random(arguments.seed)) as cluster:
            cluster.start(folder, MODEL, application_args(arguments, folder))
            yield cluster


def application_args(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is served; a checkpoint is made in `folder` if none is given."""
    return {
        "model_path": str(arguments.model or tiny_checkpoint(folder / "model")),
        "served_model_name": MODEL,
        "device": "cpu",
        "dtype": "float32",
        "num_engines": arguments.engines,
        "num_routers": arguments.routers,
        "nnodes": arguments.hosts,
        "tp_size": arguments.hosts,
        "context_length": 512,
        "max_total_tokens": 4096,
        "max_running_requests": max(4, arguments.streams),
        "chunked_prefill_size": 64,
        "hold_timeout_s": RECOVERY_TIMEOUT_S,
    }


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| fault | injections | requests | asked for the rest | asked again | lost | wrong "
        "| longest pause in a stream: median, max | all serve again after: median, max |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.fault} | {each.injections} | {each.requests} | {each.rests} | {each.repeats} "
        f"| {each.lost} | {each.wrong} | {spread(each.pauses_s)} | {spread(each.recoveries_s)} |"
        for each in outcomes
    ]
    return "\n".join(lines)


def spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "–"
    return f"{statistics.median(seconds):.2f} s, {max(seconds):.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--injections", type=int, default=20, help="of each fault")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=2, help="of each engine")
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=6, help="requests under way")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    if here := [name for name in arguments.faults if not FAULTS[name].needs_hosts]:
        with serving(arguments) as base_url:
            outcomes += asyncio.run(inject(arguments, here, base_url))
    if there := [name for name in arguments.faults if FAULTS[name].needs_hosts]:
        with serving_on_hosts(arguments) as cluster:
            outcomes += asyncio.run(inject(arguments, there, cluster.base_url, cluster))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    print(table(outcomes))
    for outcome in outcomes:
        for error in outcome.errors:
            print(f"{outcome.fault}: {error}", file=sys.stderr)
    return 1 if any(each.lost or each.wrong for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
