"""An engine that says what a test tells it to, and a server on loopback before it."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import msgspec
import uvicorn
from tiny_tokenizer import CHAT_TEMPLATE, write_tiny_tokenizer

from cluster.openai.engine_client import (
    ChoiceRequest,
    EngineInfo,
    Fleet,
    FleetEvent,
    GenerateRequest,
    PastChoice,
    RankStatus,
    StreamRecord,
    TokenDelta,
)
from cluster.response_shelf import KeptResponse, ResponseShelf
from cluster.router import create_app
from cluster.service import OpenAIService
from engine.config import EngineConfig
from engine.errors import EngineNotReadyError, StreamGoneError, StreamResumedError
from engine.request import TokenLogprobs
from engine.text.chat_template import load_chat_template
from engine.text.tokenizer import Tokenizer, load_tokenizer

CONTEXT_LENGTH = 512
EMBEDDING = struct.pack("<4f", 1, 2, 3, 4)


class FakeResponses:
    """A `ResponseStore`: one leader's shelf, without a Serve call before it.

    Attributes:
        shelf: Where responses are.
        is_there: Whether the leader can be asked.
        renewed: Ids of responses that were said to be under way, each time.
    """

    def __init__(self) -> None:
        self.shelf = ResponseShelf(max_responses=100)
        self.is_there = True
        self.renewed: list[str] = []

    async def store(
        self, response_id: str, tenant: bytes, content: bytes, *, is_ended: bool
    ) -> bool:
        return self.is_there and self.shelf.store(response_id, tenant, content, is_ended=is_ended)

    async def renew(self, response_id: str, tenant: bytes) -> bool:
        is_renewed = self.is_there and self.shelf.renew(response_id, tenant)
        self.renewed += [response_id] * is_renewed
        return is_renewed

    async def find(self, response_id: str, tenant: bytes) -> KeptResponse | None:
        self._check()
        return self.shelf.find(response_id, tenant)

    async def forget(self, response_id: str, tenant: bytes) -> bool:
        self._check()
        return self.shelf.forget(response_id, tenant)

    def _check(self) -> None:
        if not self.is_there:
            raise EngineNotReadyError("The leader did not answer.")


class FakeEngine:
    """An `EngineClient`. Each choice says `answer`, one token a delta, then its end token.

    Attributes:
        answer: Text of a choice.
        score: Log probabilities of a token of a choice's or of its prompt's, with so many
            alternatives.
        deltas: What a choice's answer consists of; made of `answer` and `score` unless it is set.
        failure: (number of deltas before it, error to raise), or None.
        has_failing_grammar: Choices end as if their grammars led no further.
        steps: If set, each delta waits for a permit.
        requests: What was asked, in order.
        others: Engines that `fleet` tells of beside this one.
        events: What `fleet` tells that happened.
        aborted_choices: What `abort_choice` was called with.
        is_awaited: A request is held until the engine is ready.
        becomes_ready: Ends that wait.
        profiled: Numbers of steps that `profile` was called with.
        closed_early: Ids of requests whose iterator was closed before its end.
        records: What has come of each request; asking for one ends a request that is under way.
        responses: Those that are kept.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.answer: Callable[[ChoiceRequest], str] = lambda _: "Once upon a time"
        self.score: Callable[[ChoiceRequest, int, int], TokenLogprobs] = _score
        self.deltas: Callable[[ChoiceRequest], list[TokenDelta]] = self._deltas
        self.failure: tuple[int, Exception] | None = None
        self.has_failing_grammar = False
        self.steps: asyncio.Semaphore | None = None
        self.requests: list[GenerateRequest] = []
        self.others: tuple[EngineInfo, ...] = ()
        self.events: tuple[FleetEvent, ...] = ()
        self.aborted_choices: list[tuple[str, int]] = []
        self.profiled: list[int] = []
        self._recalled: set[str] = set()
        self.closed_early: list[str] = []
        self.records: dict[str, StreamRecord] = {}
        self.responses = FakeResponses()
        self.is_awaited = asyncio.Event()
        self.becomes_ready = asyncio.Event()
        self.has_started = asyncio.Event()
        self.has_closed = asyncio.Event()
        self.info = EngineInfo(
            is_ready=True,
            status="ready",
            context_length=CONTEXT_LENGTH,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=(tokenizer.special_tokens["<|im_end|>"],),
            fingerprint="tiny",
            ranks=(RankStatus(rank=0, state="ready", seconds_since_answer=0.1),),
        )

    async def engine_info(self) -> EngineInfo:
        return self.info

    async def engines(self) -> list[EngineInfo]:
        return [self.info]

    async def fleet(self) -> Fleet:
        return Fleet(engines=(self.info, *self.others), events=self.events)

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        self.is_awaited.set()
        try:
            await asyncio.wait_for(self.becomes_ready.wait(), timeout_s)
        except TimeoutError:
            raise EngineNotReadyError(
                f"not ready within {timeout_s} s: {self.info.status}"
            ) from None
        self.info = replace(self.info, is_ready=True)
        return self.info

    async def profile(self, num_steps: int) -> None:
        self.profiled.append(num_steps)

    def abort_choice(self, request_id: str, index: int) -> None:
        self.aborted_choices.append((request_id, index))

    async def recall(
        self, request_id: str, *, engine_id: str | None, tenant: bytes
    ) -> StreamRecord:
        record = self.records.get(request_id)
        if record is None or record.request.tenant != tenant:
            raise StreamGoneError(f"{request_id} is not known")
        self._recalled.add(request_id)
        if self.steps is not None:
            self.steps.release()
        return record

    def resume(self, record: StreamRecord) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        queues = [
            self.deltas(choice)[len(came.token_ids) :] if came.finish_reason is None else []
            for choice, came in zip(record.request.choices, record.past, strict=True)
        ]
        return self._run(record, queues)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        record = StreamRecord(request, 0, [PastChoice() for _ in request.choices])
        return self._run(record, [self.deltas(choice) for choice in request.choices])

    async def _run(
        self, record: StreamRecord, queues: list[list[TokenDelta]]
    ) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        request = record.request
        self.requests.append(request)
        self.records[request.request_id] = record
        self._recalled.discard(request.request_id)
        self.has_started.set()
        num_sent = 0
        has_ended = False
        try:
            while any(queues):
                for index, queue in enumerate(queues):
                    if not queue or (request.request_id, index) in self.aborted_choices:
                        queue.clear()
                        continue
                    if self.steps is not None:
                        await self.steps.acquire()
                    if request.request_id in self._recalled:
                        raise StreamResumedError("The rest of this stream was asked for anew.")
                    if self.failure is not None and num_sent == self.failure[0]:
                        raise self.failure[1]
                    num_sent += 1
                    _record(record.past[index], queue[0])
                    yield index, queue.pop(0)
            has_ended = True
        finally:
            if not has_ended:
                self.closed_early.append(request.request_id)
            self.has_closed.set()

    def _deltas(self, choice: ChoiceRequest) -> list[TokenDelta]:
        sampling = choice.sampling
        token_ids = self._tokenizer.encode(self.answer(choice))
        end = self.info.eos_token_ids[0]
        token_ids = [*token_ids, end][: sampling.max_tokens]
        deltas = [
            TokenDelta(
                token_ids=(token_id,),
                logprobs=self._logprobs(choice, token_id, sampling.logprobs),
                num_cached_tokens=4,
            )
            for token_id in token_ids
        ]
        if sampling.prompt_logprobs is not None:
            prompt = (
                self._logprobs(choice, token_id, sampling.prompt_logprobs)
                for token_id in choice.prompt_token_ids[1:]
            )
            deltas[0] = msgspec.structs.replace(
                deltas[0], prompt_logprobs=tuple(chain.from_iterable(prompt))
            )
        if sampling.embedding:
            deltas[0] = msgspec.structs.replace(deltas[0], embedding=EMBEDDING)
        if self.has_failing_grammar:
            deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason="error")
        elif token_ids[-1] == end:
            deltas[-1] = msgspec.structs.replace(
                deltas[-1], finish_reason="stop", stop_token_id=end
            )
        else:
            deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason="length")
        return deltas

    def _logprobs(
        self, choice: ChoiceRequest, token_id: int, num_top: int | None
    ) -> tuple[TokenLogprobs, ...]:
        return () if num_top is None else (self.score(choice, token_id, num_top),)


def _score(choice: ChoiceRequest, token_id: int, num_top: int) -> TokenLogprobs:
    del choice
    top = [token_id, *(other for other in range(60, 90) if other != token_id)][:num_top]
    return TokenLogprobs(
        logprob=-0.25,
        rank=1,
        top_token_ids=tuple(top),
        top_logprobs=tuple(-0.25 - rank for rank in range(num_top)),
    )


def _record(past: PastChoice, delta: TokenDelta) -> None:
    past.token_ids.extend(delta.token_ids)
    past.logprobs.extend(delta.logprobs)
    past.prompt_logprobs = delta.prompt_logprobs or past.prompt_logprobs
    past.finish_reason, past.stop_token_id = delta.finish_reason, delta.stop_token_id
    past.num_cached_tokens = delta.num_cached_tokens


def make_service(
    directory: Path,
    *,
    chat_template_text: str | None = CHAT_TEMPLATE,
    write_tokenizer: Callable[..., object] = write_tiny_tokenizer,
    **fields: object,
) -> tuple[OpenAIService, FakeEngine]:
    """Make a service over a fake engine.

    Args:
        chat_template_text: The checkpoint's; None for none.
        write_tokenizer: Writes the checkpoint's tokenizer into a folder, with `chat_template`.
        fields: Fields of `EngineConfig`.
    """
    write_tokenizer(directory, chat_template=chat_template_text)
    tokenizer = load_tokenizer(directory)
    engine = FakeEngine(tokenizer)
    config = EngineConfig.model_validate({"model_path": "Tiny/Tiny-Chat", **fields})
    service = OpenAIService(
        config=config,
        tokenizer=tokenizer,
        template=load_chat_template(directory, tokenizer),
        engine=engine,
        router_id="router-1",
    )
    return service, engine


@asynccontextmanager
async def serve_on_loopback(service: OpenAIService) -> AsyncGenerator[str, None]:
    """Serve on a free port of loopback; yields the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(service)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        await app.state.responses.close()


def all_token_ids(deltas: Sequence[TokenDelta]) -> list[int]:
    """Tokens of deltas, in order."""
    return [token_id for delta in deltas for token_id in delta.token_ids]
