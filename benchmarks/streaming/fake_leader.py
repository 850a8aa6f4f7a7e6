"""The leader's deployment without a gang: `cluster.calls` as the real one uses it, and a clock."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import cast

import msgspec
import zmq
from ray import serve

from benchmarks.streaming.client import MODEL
from cluster.calls import CallTable
from cluster.engine_choice import Route
from cluster.journal import GenerateCall
from cluster.openai.engine_client import EngineInfo, RankStatus
from cluster.status import StartStatus
from cluster.token_socket import GenerateEnd, TokenSender
from engine.request import RequestOutput
from engine.stats import EngineStats

CONTEXT_LENGTH = 1 << 20
TEXT = (
    "The sky looks blue because air scatters short waves of light more than long ones, and so blue "
    "reaches the eye from everywhere. Déjà vu, naïve café, 日本語, and some numbers: 1, 22, 333.\n"
)
SILENCE_TIMEOUT_S = 30.0
FULL_PAUSE_S = 0.001


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a fake leader is.

    Attributes:
        tick_s: Between two steps. 0: whenever the router's connection takes one more, so that the
            router always lags.
        ticks_per_token: Steps from one of a request's tokens to its next; requests that come
            together have theirs in different steps.
        max_running: Requests that get tokens; others wait for the end of one of these.
    """

    tick_s: float
    ticks_per_token: int
    max_running: int


class FakeEngine:
    """Answers every request with the same tokens, over and over, at its pace."""

    async def __init__(self, token_ids: list[int], vocab_size: int, pace: Pace) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._pace = pace
        self._waiting: deque[Sequence] = deque()
        # By the step, of `ticks_per_token` ones, in which they have their tokens.
        self._running: list[dict[str, Sequence]] = [{} for _ in range(pace.ticks_per_token)]
        self._num_running = self._num_started = 0
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
            stats=EngineStats(num_running=self._num_running, num_waiting=len(self._waiting)),
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
                self._waiting.append(Sequence(request_id, max_tokens))
            self._has_work.set()
            await running.ended
        finally:
            self._calls.close(running)
            for request_id in running.request_ids.values():
                self._forget(request_id)
        return msgspec.msgpack.encode(GenerateEnd(running.num_tokens))

    def _forget(self, request_id: str) -> None:
        for step in self._running:
            if step.pop(request_id, None) is not None:
                self._num_running -= 1
                return
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                return

    async def _run(self) -> None:
        next_s = time.monotonic()
        tick = 0
        while True:
            if not self._num_running and not self._waiting:
                self._has_work.clear()
                await self._has_work.wait()
                next_s = time.monotonic()
            next_s += self._pace.tick_s
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            if not self._pace.tick_s:
                for sender in self._senders:
                    # Not `poll`, behind which the sender's own beats would queue.
                    while not cast(int, sender._socket.get(zmq.EVENTS)) & zmq.POLLOUT:
                        await asyncio.sleep(FULL_PAUSE_S)
            self._start_waiting()
            tick = (tick + 1) % len(self._running)
            self._calls.deliver([self._step(each) for each in list(self._running[tick].values())])

    def _start_waiting(self) -> None:
        while self._waiting and self._num_running < self._pace.max_running:
            sequence = self._waiting.popleft()
            self._running[self._num_started % len(self._running)][sequence.request_id] = sequence
            self._num_running += 1
            self._num_started += 1

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
