"""Break engines under load, and count what their clients notice.

    python tests/e2e/faults.py
    python tests/e2e/faults.py --faults rank-killed leader-killed --injections 3 --json out.json

Starts a Ray of its own with engines of several hosts on this machine, in float32, where a stream
that was broken must be the very one that was not. Clients stream all the while; every so often a
fault hits a process by chance, and the next one waits until all engines serve again. For each fault
the table has the requests that ran meanwhile, those that ended in an error or too early, those with
other text than the unbroken one, and the longest pauses within streams.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx
import openai
import psutil
from own_ray import own_ray  # before Ray, whose environment it sets
from processes import descendants
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from tiny_tokenizer import write_tiny_tokenizer

import serve_app
from cluster.addresses import free_port

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
MODEL = "fault-test"
START_TIMEOUT_S = 400
RECOVERY_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 400
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
    """What a client saw of one request."""

    work: Work
    started_s: float
    error: str | None = None
    is_wrong: bool = False
    pause_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What one kind of fault did.

    Attributes:
        requests: That ran meanwhile, whether or not their engine was hit.
        pauses_s: Each stream's longest pause, that before its first text included.
        recoveries_s: From each injection until all engines served again.
    """

    fault: str
    injections: int = 0
    requests: int = 0
    lost: int = 0
    wrong: int = 0
    pauses_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def rank_killed() -> None:
    os.kill(chance(processes_named("ray::HostWorker")).pid, signal.SIGKILL)


def rank_frozen() -> None:
    os.kill(chance(processes_named("ray::HostWorker")).pid, signal.SIGSTOP)


def leader_killed() -> None:
    os.kill(chance(processes_named("ray::ServeReplica", ":Engine")).pid, signal.SIGKILL)


def leader_frozen() -> None:
    os.kill(chance(processes_named("ray::ServeReplica", ":Engine")).pid, signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {
    "rank-killed": rank_killed,
    "rank-frozen": rank_frozen,
    "leader-killed": leader_killed,
    "leader-frozen": leader_frozen,
}


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
        self._client = openai.AsyncOpenAI(
            base_url=f"{base_url}/v1", api_key="EMPTY", timeout=REQUEST_TIMEOUT_S, max_retries=0
        )
        self._works = works
        self._answers: dict[Work, str] = {}
        self.streams: list[Stream] = []

    async def learn_answers(self) -> None:
        """Ask for each answer while nothing breaks."""
        answers = await asyncio.gather(*(self._ask(work, lambda: None) for work in self._works))
        self._answers = dict(zip(self._works, answers, strict=True))

    @asynccontextmanager
    async def asking(self, num_clients: int) -> AsyncIterator[None]:
        """Keep so many requests under way; at the end all are brought to their ends."""
        is_over = asyncio.Event()
        tasks = [
            asyncio.create_task(self._ask_on(number, is_over)) for number in range(num_clients)
        ]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

    async def _ask_on(self, number: int, is_over: asyncio.Event) -> None:
        turn = number
        while not is_over.is_set():
            work = self._works[turn % len(self._works)]
            turn += 1
            stream = Stream(work, started_s=time.monotonic())
            self.streams.append(stream)
            last_s = stream.started_s

            def on_text(stream: Stream = stream) -> None:
                nonlocal last_s
                now_s = time.monotonic()
                stream.pause_s = max(stream.pause_s, now_s - last_s)
                last_s = now_s

            try:
                text = await self._ask(work, on_text)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                stream.error = repr(error)
            else:
                stream.is_wrong = text != self._answers[work]

    async def _ask(self, work: Work, on_text: Callable[[], None]) -> str:
        options = {"temperature": 0.0} if work.seed is None else {"seed": work.seed}
        request = {
            "model": MODEL,
            "messages": [{"role": "user", "content": work.prompt}],
            "max_tokens": work.num_tokens,
            "extra_body": {"ignore_eos": True},
            **options,
        }
        if not work.is_stream:
            answer = await self._client.chat.completions.create(**request)
            on_text()
            return answer.choices[0].message.content or ""
        text, finish_reason = "", None
        async for chunk in await self._client.chat.completions.create(**request, stream=True):
            if content := chunk.choices[0].delta.content:
                text += content
                on_text()
            finish_reason = chunk.choices[0].finish_reason or finish_reason
        if finish_reason is None:
            raise openai.OpenAIError("the stream ended without a finish reason")
        return text

    async def close(self) -> None:
        await self._client.close()


async def wait_until(base_url: str, num_ranks: int, *, all_serve: bool, timeout_s: float) -> None:
    """Wait until every rank of every engine answers, or until some do not."""
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        async with asyncio.timeout(timeout_s):
            while True:
                ranks = (await client.get("/health/ready")).json()["ranks"]
                do_serve = len(ranks) == num_ranks and all(
                    rank["state"] == "ready" for rank in ranks
                )
                if do_serve == all_serve:
                    return
                await asyncio.sleep(0.1)


async def inject(arguments: argparse.Namespace, base_url: str) -> list[Outcome]:
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
    for name in arguments.faults:
        outcome = Outcome(name)
        outcomes.append(outcome)
        async with clients.asking(arguments.streams):
            for number in range(arguments.injections):
                await asyncio.sleep(random.uniform(*BETWEEN_FAULTS_S))
                hit_s = time.monotonic()
                FAULTS[name]()
                outcome.injections += 1
                await wait_until(base_url, num_ranks, all_serve=False, timeout_s=NOTICE_TIMEOUT_S)
                await wait_until(base_url, num_ranks, all_serve=True, timeout_s=RECOVERY_TIMEOUT_S)
                outcome.recoveries_s.append(time.monotonic() - hit_s)
                print(
                    f"{name} {number + 1} of {arguments.injections}: all serve again after "
                    f"{outcome.recoveries_s[-1]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
        judge(outcome, clients.streams)
        clients.streams.clear()
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    await clients.close()
    return outcomes


def judge(outcome: Outcome, streams: Sequence[Stream]) -> None:
    """Count what became of the streams under a fault."""
    outcome.requests = len(streams)
    for stream in streams:
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
        application = serve_app.build(
            {
                "model_path": str(arguments.model or tiny_checkpoint(Path(folder))),
                "served_model_name": MODEL,
                "device": "cpu",
                "dtype": "float32",
                "num_engines": arguments.engines,
                "nnodes": arguments.hosts,
                "tp_size": arguments.hosts,
                "context_length": 512,
                "max_total_tokens": 4096,
                "max_running_requests": max(4, arguments.streams),
                "chunked_prefill_size": 64,
                "hold_timeout_s": RECOVERY_TIMEOUT_S,
            }
        )
        serve.run(application, name=MODEL, route_prefix="/")
        yield f"http://{HOST}:{http_port}"
        serve.shutdown()


def tiny_checkpoint(folder: Path) -> Path:
    """A model that is fast enough to be hit amid many streams; its text means nothing."""
    shutil.copytree(ROOT / "tests" / "data" / "tiny-qwen2", folder, dirs_exist_ok=True)
    return write_tiny_tokenizer(folder)


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| fault | injections | requests | lost | wrong | longest pause in a stream: median, max "
        "| all engines serve again after: median, max |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.fault} | {each.injections} | {each.requests} | {each.lost} | {each.wrong} | "
        f"{spread(each.pauses_s)} | {spread(each.recoveries_s)} |"
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
    parser.add_argument("--streams", type=int, default=6, help="requests under way")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny one")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each fault")
    arguments = parser.parse_args()
    with serving(arguments) as base_url:
        outcomes = asyncio.run(inject(arguments, base_url))
    print(table(outcomes))
    for outcome in outcomes:
        for error in outcome.errors:
            print(f"{outcome.fault}: {error}", file=sys.stderr)
    return 1 if any(each.lost or each.wrong for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
