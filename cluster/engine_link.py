"""The router's way to its engines: one Serve call per attempt, tokens over the router's own socket.

Implements `EngineClient`. The call is the attempt's life (routing, back-pressure, cancellation and
actor death come with it), the socket is its tokens: a yield through a Serve handle costs a
millisecond of CPU, a message a tenth of that.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import msgspec
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.attempts import AttemptError, Failures
from cluster.engine_call import answer_within, await_end, raise_if_failed
from cluster.engine_choice import Demand, EngineChooser, Route
from cluster.engine_fleet import EngineFleet
from cluster.journal import KEEP_S, GenerateCall, Journal, Journals
from cluster.openai.engine_client import (
    ChoiceRequest,
    EngineInfo,
    EngineVisit,
    Fleet,
    GenerateRequest,
    StreamRecord,
    TokenDelta,
)
from cluster.response_link import ResponseLink
from cluster.token_socket import (
    ChoiceTokens,
    GenerateEnd,
    TokenReceiver,
    TokenStream,
)
from cluster.watched_tasks import WatchedTasks
from engine.errors import (
    EngineDiedError,
    EngineNotReadyError,
    StreamGoneError,
    StreamResumedError,
)

logger = logging.getLogger(__name__)

PROFILE_TIMEOUT_S = 3.0
RECALL_TIMEOUT_S = 3.0
_LATE_TOKENS_TIMEOUT_S = 5.0


class EngineLink:
    """Talks to the engines behind a Serve handle. Belongs to one event loop.

    A request whose engine dies goes on with another, or with the same one once it is back, from the
    tokens that have come: whoever waits for them sees a pause.
    """

    def __init__(
        self,
        engine: DeploymentHandle,
        *,
        bind_host: str,
        silence_timeout_s: float,
        hold_timeout_s: float,
        seeds: random.Random,
        read_statuses: Callable[[], Mapping[str, Mapping[str, Any]]],
        list_running: Callable[[], Collection[str] | None],
        may_sleep: bool,
        keeps_responses: bool = True,
    ) -> None:
        """Open the token socket and begin to watch the engines.

        Args:
            engine: Handle of the `Engine` deployment.
            bind_host: This node's own address.
            silence_timeout_s: After so long without a sign of life, an engine counts as dead.
            hold_timeout_s: How long a request may wait for an engine to take it.
            seeds: Draws seeds for requests that bring none.
            read_statuses: What `cluster.status.read_all` gives for this application; may block.
            list_running: Ids of the engines that Serve would call, or None if that is not known.
            may_sleep: Whether no engine runs while nobody asks.
            keeps_responses: Whether engines keep any.
        """
        self._engine = engine
        self._hold_timeout_s = hold_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._seeds = seeds
        self._receiver = TokenReceiver(bind_host)
        self._chooser = EngineChooser()
        self._list_running = list_running
        self._fleet = EngineFleet(engine, self._chooser, read_statuses, list_running, may_sleep)
        self.responses = ResponseLink(
            engine,
            list_engines=lambda: [info.engine_id for info in self._fleet.engines],
            list_running=list_running,
            may_store=keeps_responses,
        )
        self._under_way: dict[str, Journal] = {}
        self._journals = Journals()
        self._calls: set[asyncio.Future[GenerateEnd]] = set()
        self._tasks = WatchedTasks()
        self._tasks.start("watch the engines", self._fleet.watch())
        self._tasks.start("wake who waits in silence", self._watch_silence())

    def check(self) -> None:
        """Return if this link works.

        Raises:
            EngineError: It does not, and never will again.
        """
        self._tasks.check()
        self._receiver.check()

    async def close(self) -> None:
        await self._tasks.close()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._receiver.close()

    async def engine_info(self) -> EngineInfo:
        return self._fleet.info

    async def engines(self) -> list[EngineInfo]:
        return self._fleet.engines

    async def fleet(self) -> Fleet:
        return self._fleet.view()

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        return await self._fleet.wait_until_ready(timeout_s)

    async def profile(self, num_steps: int) -> None:
        route = Route(tuple(self._chooser.ready))
        response = cast(
            "DeploymentResponse[bytes]", self._engine.profile.remote(num_steps, route=route)
        )
        try:
            async with asyncio.timeout(PROFILE_TIMEOUT_S):
                end = await await_end(response)
        except TimeoutError:
            raise EngineNotReadyError("No engine answered the call to profile.") from None
        raise_if_failed(end)

    def abort_choice(self, request_id: str, index: int) -> None:
        journal = self._under_way.get(request_id)
        if journal is not None:
            journal.close(index)
            self._receiver.abort_choice(request_id, journal.attempt, index)

    async def recall(
        self, request_id: str, *, engine_id: str | None, tenant: bytes
    ) -> StreamRecord:
        records = []
        own = self._journals.find(request_id, tenant)
        if own is not None:
            # Its earlier reader here is gone or about to be told: there is one stream of a request.
            self._under_way.pop(request_id, None)
            self._receiver.wake_streams(request_id)
            records.append(own.record())
        asked = [engine_id] if engine_id else []
        records += await self._recall_from(asked, request_id, tenant)
        if not records:
            others = [info.engine_id for info in self._fleet.engines]
            others = [name for name in others if name not in asked]
            records += await self._recall_from(others, request_id, tenant)
        if not records:
            raise StreamGoneError(
                f"Nothing is known here of the stream {request_id[:100]!r}: it ended more than "
                f"{KEEP_S / 60:.0f} minutes ago, another key began it, or both its router and its "
                "engine are gone. Send the request again."
            )
        return max(records, key=lambda record: (record.attempt, _num_tokens(record)))

    async def _recall_from(
        self, engine_ids: Collection[str], request_id: str, tenant: bytes
    ) -> list[StreamRecord]:
        """What such engines know of a request; those that do not answer know nothing."""
        running = self._list_running()

        async def ask(name: str) -> list[StreamRecord]:
            if running is not None and name not in running:
                return []
            response = self._engine.recall.remote(request_id, tenant, route=Route((name,)))
            payload = await answer_within(RECALL_TIMEOUT_S, response)
            return [msgspec.msgpack.decode(payload, type=StreamRecord)] if payload else []

        found = await asyncio.gather(*map(ask, engine_ids))
        return [record for records in found for record in records]

    def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        return self._run(Journal.of(self._with_seeds(request)))

    def resume(self, record: StreamRecord) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        journal = Journal(record)
        journal.attempt += 1
        return self._run(journal)

    async def _run(self, journal: Journal) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """Have engines generate what a journal lacks, one attempt after the other."""
        request = journal.request
        demand = Demand.of(
            [choice.prompt_token_ids for choice in request.choices],
            salt=request.cache_salt,
            session=request.session,
        )
        failures = Failures()
        self._under_way[request.request_id] = journal
        self._journals.open(journal)
        try:
            while journal.unfinished:
                deltas = self._attempt(journal, demand, failures.engines)
                try:
                    async with aclosing(deltas):
                        async for index, delta in deltas:
                            failures.progressed()
                            yield index, delta
                except AttemptError as failure:
                    failures.take(failure)
                    self._chooser.suspend(failure.engine_id)
                    logger.warning(
                        "%s goes on elsewhere after %d tokens: %s",
                        request.request_id,
                        sum(journal.num_tokens),
                        failure.error,
                    )
                    await self.wait_until_ready(self._hold_timeout_s)
                    journal.attempt += 1
        finally:
            if self._under_way.get(request.request_id) is journal:
                del self._under_way[request.request_id]
            self._journals.end(journal)

    async def _attempt(
        self, journal: Journal, demand: Demand, avoided: Collection[str]
    ) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """Have one engine generate what is left of a request.

        Raises:
            AttemptError: The engine died, could not be reached, or is not ready where another is.
            RequestError, EngineError: As `generate`.
        """
        self._check_reader(journal)
        request_id, attempt = journal.request.request_id, journal.attempt
        order = tuple(self._chooser.order(demand, avoided))
        stream = self._receiver.open_stream(request_id, attempt, journal.num_tokens)
        call = GenerateCall(journal.record(), reply_to=self._receiver.invitation)
        response = cast(
            "DeploymentResponse[bytes]",
            self._engine.generate.remote(msgspec.msgpack.encode(call), route=Route(order)),
        )
        # It returns just after the last token; the client need not wait for that.
        end = asyncio.ensure_future(await_end(response))
        self._calls.add(end)
        end.add_done_callback(self._calls.discard)
        end.add_done_callback(lambda _: stream.wake())
        visit = self._chooser.enter(order[0] if order else "", demand)
        try:
            while journal.unfinished:
                received = await self._next_tokens(journal, stream, end)
                if stream.leader is not None:
                    self._chooser.moved(visit, stream.leader.decode())
                if received and visit.waiting_tokens:
                    self._chooser.began(visit)
                for tokens in received:
                    journal.take(tokens)
                    yield tokens.choice, _delta(tokens, visit.engine_id)
        except (EngineDiedError, EngineNotReadyError) as error:
            response.cancel()
            others = set(self._chooser.ready) - {visit.engine_id}
            if isinstance(error, EngineNotReadyError) and not others:
                raise
            was_computed = end.done() and not end.cancelled() and end.result().was_computed
            raise AttemptError(error, visit.engine_id, was_computed) from error
        except BaseException:
            response.cancel()
            raise
        finally:
            self._chooser.leave(visit)
            self._receiver.close_stream(request_id, attempt)

    def _check_reader(self, journal: Journal) -> None:
        if self._under_way.get(journal.request.request_id) is not journal:
            raise StreamResumedError("The rest of this stream was asked for anew.")

    async def _next_tokens(
        self, journal: Journal, stream: TokenStream, end: "asyncio.Future[GenerateEnd]"
    ) -> list[ChoiceTokens]:
        """Wait for tokens, for the call's end, or for a silence that is too long."""
        while not (tokens := stream.take()):
            self._check_reader(journal)
            if end.done():
                return await self._late_tokens(stream, end.result())
            silence_s = self._receiver.clock() - stream.heard_s
            if stream.leader is None:
                # Where no engine is ready, Serve keeps the call until one is.
                is_expected = bool(self._chooser.ready)
                if is_expected and silence_s > self._silence_timeout_s:
                    raise EngineDiedError(f"No engine took the request within {silence_s:.1f} s.")
                if silence_s > self._hold_timeout_s:
                    raise EngineNotReadyError(
                        "No engine took the request within "
                        f"--hold-timeout-s={self._hold_timeout_s:g}: {self._fleet.info.status}."
                    )
            elif silence_s > self._silence_timeout_s:
                raise EngineDiedError(f"The engine has been silent for {silence_s:.1f} s.")
            await stream.wait()
        return tokens

    async def _late_tokens(self, stream: TokenStream, end: GenerateEnd) -> list[ChoiceTokens]:
        """Wait for what is on its way over the socket, though its call has returned."""
        if not stream.lacks(end.num_tokens):
            raise_if_failed(end)
        try:
            async with asyncio.timeout(_LATE_TOKENS_TIMEOUT_S):
                while not (tokens := stream.take()):
                    await stream.wait()
        except TimeoutError:
            await self._receiver.catch_up()
            if not (tokens := stream.take()):
                raise_if_failed(end)
                raise EngineDiedError("The engine's last tokens did not arrive.") from None
        return tokens

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self._silence_timeout_s / 8)
            self._receiver.wake_silent_streams(self._silence_timeout_s)

    def _with_seeds(self, request: GenerateRequest) -> GenerateRequest:
        """Give each choice a seed, by which every engine generates the same."""

        def seeded(choice: ChoiceRequest) -> ChoiceRequest:
            if choice.sampling.seed is not None:
                return choice
            seed = self._seeds.getrandbits(63)
            return replace(choice, sampling=msgspec.structs.replace(choice.sampling, seed=seed))

        return replace(request, choices=tuple(map(seeded, request.choices)))


def _num_tokens(record: StreamRecord) -> int:
    return sum(len(choice.token_ids) for choice in record.past)


def _delta(tokens: ChoiceTokens, engine_id: str) -> TokenDelta:
    visit = None
    if tokens.timing is not None:
        visit = EngineVisit(
            engine_id=engine_id,
            epoch=tokens.epoch,
            attempt=tokens.attempt,
            num_cached_tokens=tokens.num_cached_tokens,
            timing=tokens.timing,
        )
    return TokenDelta(
        token_ids=tokens.token_ids,
        logprobs=tokens.logprobs,
        prompt_logprobs=tokens.prompt_logprobs,
        finish_reason=tokens.finish_reason,
        stop_token_id=tokens.stop_token_id,
        num_cached_tokens=tokens.num_cached_tokens,
        visit=visit,
        embedding=tokens.embedding,
    )
