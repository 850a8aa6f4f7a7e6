"""Let the number of engines follow a load, down to none and back, and count what clients notice.

    python tests/e2e/scaling.py
    python tests/e2e/scaling.py --long-tokens 0 --downscale-delay-s 6 --json out.json

Starts a Ray of its own with engines of a tiny model on this machine, in float32. Clients stream all
the while, first many, then few, then none, then one. Each answer is compared with the first one of
its length: a stream whose engine is stopped is finished there, or if it lasts longer than Serve
waits goes on with the other engine, which the long answers are for. Printed is when the number of
engines changed, and what became of the answers.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx
from own_ray import own_ray  # before Ray, whose environment it sets
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from tiny_checkpoint import tiny_checkpoint

import serve_app
from cluster.addresses import free_port
from tests.e2e.patient_client import asking

HOST = "127.0.0.1"
MODEL = "scaling-test"
TIMEOUT_S = 400
MAX_CONTEXT = 32_768
NUM_SLOTS = 8
NUM_LOW = 2
PROMPT = "Tell me a story about a lighthouse."
APP = "scaling"


@dataclass(slots=True)
class Answers:
    """What clients got.

    Attributes:
        errors: One for each answer that did not come whole.
        num_wrong: Answers with other text than the first one of their length.
    """

    num_answers: int = 0
    num_wrong: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Stream:
    """What a client saw of one answer; pauses are those before or between two pieces of text."""

    num_comments: int = 0
    first_comment_s: float = 0.0
    first_text_s: float = 0.0
    longest_pause_s: float = 0.0
    text: str = ""


class Clients:
    """Clients that ask for one answer after another."""

    def __init__(self, base_url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, limits=limits)
        self._texts: dict[int, str] = {}
        self.answers = Answers()

    async def ask(self, num_tokens: int) -> Stream:
        """Ask for one answer, and count it."""
        try:
            stream = await self._stream(num_tokens)
        except (httpx.HTTPError, ValueError) as error:
            self.answers.errors.append(repr(error))
            return Stream()
        self.answers.num_answers += 1
        if self._texts.setdefault(num_tokens, stream.text) != stream.text:
            self.answers.num_wrong += 1
        return stream

    async def _stream(self, num_tokens: int) -> Stream:
        """Stream an answer; ValueError if it ends in any other way than by its length."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        seen = Stream()
        started_s = last_s = time.monotonic()
        finish_reason = None
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    seen.num_comments += 1
                    seen.first_comment_s = seen.first_comment_s or time.monotonic() - started_s
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "choices" not in event:
                    raise ValueError(line)
                (choice,) = event["choices"]
                if content := choice["delta"].get("content"):
                    now_s = time.monotonic()
                    seen.first_text_s = seen.first_text_s or now_s - started_s
                    seen.longest_pause_s = max(seen.longest_pause_s, now_s - last_s)
                    last_s = now_s
                    seen.text += content
                finish_reason = choice.get("finish_reason") or finish_reason
        if finish_reason != "length":
            raise ValueError(
                f"the stream ended with {finish_reason}, status {response.status_code}"
            )
        return seen

    def asking(self, num_clients: int, num_tokens: int) -> AbstractAsyncContextManager[None]:
        """Keep so many requests under way; at the end all are brought to their ends."""
        return asking(num_clients, lambda _: self.ask(num_tokens))

    async def close(self) -> None:
        await self._http.aclose()


async def wait_for_engines(count: int) -> None:
    """Wait until Serve runs so many engines, and has no other ones starting or stopping."""
    async with asyncio.timeout(TIMEOUT_S):
        while await asyncio.to_thread(_replica_states) != ({"RUNNING": count} if count else {}):
            await asyncio.sleep(0.2)


def _replica_states() -> dict[str, int]:
    states = serve.status().applications[APP].deployments["Engine"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items() if count}


@contextmanager
def serving(**fields: object) -> Iterator[str]:
    """Serve a tiny model with a Ray of our own; yields the URL."""
    with tempfile.TemporaryDirectory() as folder, own_ray(num_cpus=3):
        port = free_port(HOST)
        quiet = LoggingConfig(enable_access_log=False)
        serve.start(http_options=HTTPOptions(host=HOST, port=port), logging_config=quiet)
        application = serve_app.build(
            {
                "model_path": str(tiny_checkpoint(Path(folder), context_length=MAX_CONTEXT)),
                "served_model_name": MODEL,
                "device": "cpu",
                "dtype": "float32",
                "max_running_requests": NUM_SLOTS,
                "max_total_tokens": 2 * MAX_CONTEXT,
                "chunked_prefill_size": 64,
                "hold_timeout_s": TIMEOUT_S,
                **fields,
            }
        )
        serve.run(application, name=APP, route_prefix="/")
        yield f"http://{HOST}:{port}"
        serve.shutdown()


@dataclass(slots=True)
class Outcome:
    """What happened, and when.

    Attributes:
        up_s: From the load's rise until the second engine ran.
        down_s: From its fall until there was one engine again.
        zero_s: From its end until there was none.
        num_outliving: Long answers that still ran when the second engine was gone.
        longest_pause_s: Amid the long answers.
        held: The stream that was asked for when there was no engine.
    """

    answers: Answers
    up_s: float
    down_s: float
    zero_s: float
    num_outliving: int
    longest_pause_s: float
    held: Stream


async def scale(base_url: str, arguments: argparse.Namespace) -> Outcome:
    """Let the load rise, fall and end, and return from none."""
    clients = Clients(base_url)
    num_tokens = arguments.tokens
    await wait_for_engines(1)
    await clients.ask(num_tokens)
    started_s = time.monotonic()
    async with clients.asking(arguments.clients, num_tokens):
        await wait_for_engines(2)
        up_s = time.monotonic() - started_s
    print(f"1 → 2 engines {up_s:.1f} s after the load rose", flush=True)
    started_s = time.monotonic()
    # One of these goes to each engine, and so do the two of those who go on asking.
    num_long = 2 if arguments.long_tokens else 0
    long = [asyncio.create_task(clients.ask(arguments.long_tokens)) for _ in range(num_long)]
    async with clients.asking(NUM_LOW, num_tokens):
        await wait_for_engines(1)
        down_s = time.monotonic() - started_s
    print(f"2 → 1 engines {down_s:.1f} s after it fell", flush=True)
    num_outliving = sum(not task.done() for task in long)
    pauses_s = [stream.longest_pause_s for stream in await asyncio.gather(*long)]
    started_s = time.monotonic()
    await wait_for_engines(0)
    zero_s = time.monotonic() - started_s
    print(f"1 → 0 engines {zero_s:.1f} s after it ended", flush=True)
    held = await clients.ask(num_tokens)
    await clients.close()
    longest_s = max(pauses_s, default=0.0)
    return Outcome(clients.answers, up_s, down_s, zero_s, num_outliving, longest_s, held)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=24, help="while the load is high")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument(
        "--long-tokens",
        type=int,
        default=8_000,
        help="of two answers that should outlive their engine; 0: none",
    )
    parser.add_argument("--downscale-delay-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with serving(
        min_engines=0,
        max_engines=2,
        upscale_delay_s=4,
        downscale_delay_s=arguments.downscale_delay_s,
    ) as base_url:
        outcome = asyncio.run(scale(base_url, arguments))
    answers, held = outcome.answers, outcome.held
    if arguments.long_tokens:
        print(
            f"{outcome.num_outliving} long answers ran on when the second engine was gone; their "
            f"longest pause was {outcome.longest_pause_s:.1f} s"
        )
    print(
        f"0 → 1: first text after {held.first_text_s:.1f} s, {held.num_comments} comments, the "
        f"first after {held.first_comment_s:.1f} s"
    )
    print(f"answers {answers.num_answers}, lost {len(answers.errors)}, wrong {answers.num_wrong}")
    for error in answers.errors:
        print(error, file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(outcome), indent=1))
    return 1 if answers.errors or answers.num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
