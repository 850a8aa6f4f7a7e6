"""Let the number of engines follow a load, down to none and back, and count what clients notice.

    python tests/e2e/scaling.py
    python tests/e2e/scaling.py --json out.json

Starts a Ray of its own with engines of a tiny model on this machine. Clients stream all the while,
first few, then many, then few, then none, then one. Printed is when the number of engines changed,
and that no answer was lost or differed from what one engine had said before: a stream whose engine
is stopped is finished there, or goes on with another one.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx
from own_ray import own_ray  # before Ray, whose environment it sets
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

import serve_app
from cluster.addresses import free_port
from tests.e2e.faults import tiny_checkpoint

HOST = "127.0.0.1"
MODEL = "scaling-test"
TIMEOUT_S = 240
CONTEXT_LENGTH = 512
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
class HeldStream:
    """What a client saw that asked while there was no engine."""

    num_comments: int = 0
    first_comment_s: float = 0.0
    first_text_s: float = 0.0
    text: str = ""


class Clients:
    """Clients that ask for one answer after another."""

    def __init__(self, base_url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, limits=limits)
        self._texts: dict[int, str] = {}
        self.answers = Answers()

    async def ask(self, num_tokens: int) -> None:
        """Ask for one answer, and see whether it comes whole."""
        try:
            stream = await self.stream(num_tokens)
        except (httpx.HTTPError, ValueError) as error:
            self.answers.errors.append(repr(error))
            return
        self.answers.num_answers += 1
        if self._texts.setdefault(num_tokens, stream.text) != stream.text:
            self.answers.num_wrong += 1

    async def stream(self, num_tokens: int) -> HeldStream:
        """Stream an answer; ValueError if it ends in any other way than by its length."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        seen = HeldStream()
        started_s = time.monotonic()
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
                    seen.first_text_s = seen.first_text_s or time.monotonic() - started_s
                    seen.text += content
                finish_reason = choice.get("finish_reason") or finish_reason
        if finish_reason != "length":
            raise ValueError(
                f"the stream ended with {finish_reason}, status {response.status_code}"
            )
        return seen

    @asynccontextmanager
    async def asking(self, num_clients: int, num_tokens: int) -> AsyncIterator[None]:
        """Keep so many requests under way; at the end all are brought to their ends."""
        is_over = asyncio.Event()

        async def ask_on() -> None:
            while not is_over.is_set():
                await self.ask(num_tokens)

        tasks = [asyncio.create_task(ask_on()) for _ in range(num_clients)]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

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
                "model_path": str(tiny_checkpoint(Path(folder))),
                "served_model_name": MODEL,
                "device": "cpu",
                "dtype": "float32",
                "context_length": CONTEXT_LENGTH,
                "max_total_tokens": 4096,
                "max_running_requests": 4,
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
        held: The stream that was asked for then.
    """

    answers: Answers
    up_s: float
    down_s: float
    zero_s: float
    held: HeldStream


async def scale(base_url: str, *, num_tokens: int, num_clients: int, tail_tokens: int) -> Outcome:
    """Let the load rise, fall and end, and return from none."""
    clients = Clients(base_url)
    await wait_for_engines(1)
    await clients.ask(num_tokens)
    await clients.ask(tail_tokens)
    started_s = time.monotonic()
    async with clients.asking(num_clients, num_tokens):
        await wait_for_engines(2)
        up_s = time.monotonic() - started_s
        # Asked while both engines are busy, so that some run on either of them as one is stopped.
        tails = [asyncio.create_task(clients.ask(tail_tokens)) for _ in range(4)]
    started_s = time.monotonic()
    async with clients.asking(1, num_tokens):
        await wait_for_engines(1)
        down_s = time.monotonic() - started_s
    await asyncio.gather(*tails)
    started_s = time.monotonic()
    await wait_for_engines(0)
    zero_s = time.monotonic() - started_s
    held = await clients.stream(num_tokens)
    await clients.ask(num_tokens)
    await clients.close()
    return Outcome(clients.answers, up_s, down_s, zero_s, held)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=12, help="while the load is high")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--downscale-delay-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with serving(
        min_engines=0,
        max_engines=2,
        upscale_delay_s=5,
        downscale_delay_s=arguments.downscale_delay_s,
    ) as base_url:
        outcome = asyncio.run(
            scale(
                base_url,
                num_tokens=arguments.tokens,
                num_clients=arguments.clients,
                tail_tokens=CONTEXT_LENGTH - 100,
            )
        )
    answers, held = outcome.answers, outcome.held
    print(f"answers {answers.num_answers}, lost {len(answers.errors)}, wrong {answers.num_wrong}")
    print(f"1 → 2 engines {outcome.up_s:.1f} s after the load rose")
    print(f"2 → 1 engines {outcome.down_s:.1f} s after it fell")
    print(f"1 → 0 engines {outcome.zero_s:.1f} s after it ended")
    print(
        f"0 → 1: first text after {held.first_text_s:.1f} s, {held.num_comments} comments, the "
        f"first after {held.first_comment_s:.1f} s"
    )
    for error in answers.errors:
        print(error, file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(outcome), indent=1))
    return 1 if answers.errors or answers.num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
