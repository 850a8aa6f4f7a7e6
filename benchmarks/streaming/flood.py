"""Far more requests than a router admits, many at once: what each was answered.

Runs as a process of its own beside a benchmark, so that whoever reads the streams is not held up.
Imports little, and sends nothing before it is told: `ready`, it says, and waits for a line.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import msgspec
import psutil

from benchmarks.streaming.client import HeldRequest, make_request, send
from cluster.openai.schema import ErrorResponse
from cluster.ray_node import raise_file_limit

ANSWER_TIMEOUT_S = 120.0
FLOOD_TIMEOUT_S = 600.0
START_TIMEOUT_S = 120.0
MAX_ODD = 3
POLITE = (429, 503)


@dataclass(slots=True)
class Flood:
    """What came of the requests.

    Attributes:
        polite: Refused as OpenAI refuses, and told when to come again.
        statuses: How many answers had each; 0 where none came in time.
        failures: Connections that failed, by why.
        answer_s: Seconds to each answer, from before its connection.
        odd: Some answers that were not polite.
        cpu_s: That the sending process took.
    """

    requests: int
    polite: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    retry_after_s: list[int] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    cpu_s: float = 0.0


class FloodBeside:
    """The process that will send a flood; `async with` starts it and ends it."""

    def __init__(self, num_requests: int, most_at_once: int, port: int) -> None:
        self._arguments = ["--requests", str(num_requests), "--at-once", str(most_at_once)]
        self._arguments += ["--port", str(port)]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "FloodBeside":
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        if line.strip() != b"ready":
            raise RuntimeError(f"the flood's process did not start: {line!r}")
        return self

    async def run(self) -> Flood:
        """Let it go, and wait for all answers."""
        assert self._process is not None
        output, _ = await asyncio.wait_for(self._process.communicate(b"go\n"), FLOOD_TIMEOUT_S)
        return msgspec.json.decode(output, type=Flood)

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def flood(num_requests: int, most_at_once: int, port: int) -> Flood:
    """Send all requests, so many at a time, each over its own connection; wait for the answers."""
    done = Flood(num_requests)
    statuses: Counter[int] = Counter()
    failures: Counter[str] = Counter()
    request = make_request(1)
    room = asyncio.Semaphore(most_at_once)

    async def ask() -> None:
        async with room:
            await ask_now()

    async def ask_now() -> None:
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                held = await send(request, port)
                await held.ended
        except TimeoutError:
            statuses[0] += 1
            return
        except OSError as error:
            failures[repr(error)] += 1
            return
        if not held.is_whole:
            failures["the connection was closed before the answer's end"] += 1
            return
        statuses[held.status] += 1
        done.answer_s.append(held.ended_s - started_s)
        if is_polite(held):
            done.polite += 1
            done.retry_after_s.append(int(held.headers["retry-after"]))
        elif len(done.odd) < MAX_ODD:
            done.odd.append(f"{held.status} {held.headers} {held.body[:300]!r}")

    before = psutil.Process().cpu_times()
    await asyncio.gather(*(ask() for _ in range(num_requests)))
    after = psutil.Process().cpu_times()
    done.statuses, done.failures = dict(statuses), dict(failures)
    done.cpu_s = after.user + after.system - before.user - before.system
    return done


def is_polite(held: HeldRequest) -> bool:
    """Refused as OpenAI refuses, with a time to come again."""
    if held.status not in POLITE or not held.headers.get("retry-after", "").isdigit():
        return False
    try:
        return bool(ErrorResponse.model_validate_json(held.body).error.message)
    except ValueError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--at-once", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    raise_file_limit()
    print("ready", flush=True)
    sys.stdin.readline()
    done = asyncio.run(flood(arguments.requests, arguments.at_once, arguments.port))
    print(json.dumps(asdict(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
