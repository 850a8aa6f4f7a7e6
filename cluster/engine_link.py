"""The router's way to an engine: one Serve call per request, tokens over the router's own socket.

Implements `EngineClient`. The call is the request's life (routing, back-pressure, cancellation and
actor death come with it), the socket is its tokens: a yield through a Serve handle costs a
millisecond of CPU, a message a tenth of that.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import msgspec
import ray.exceptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.openai.engine_client import EngineInfo, GenerateRequest, RankStatus, TokenDelta
from cluster.status import describe_progress
from cluster.token_socket import (
    CallError,
    ChoiceCall,
    ChoiceTokens,
    GenerateCall,
    GenerateEnd,
    TokenReceiver,
    TokenStream,
)
from cluster.watched_tasks import WatchedTasks
from engine import errors
from engine.errors import EngineDiedError, EngineError, EngineNotReadyError

logger = logging.getLogger(__name__)

INFO_PERIOD_S = 1.0
_INFO_TIMEOUT_S = 3.0
_LATE_TOKENS_TIMEOUT_S = 5.0
# Serve's own failures, such as an engine that was never deployed, are no RayErrors.
_CALL_FAILURES = (ray.exceptions.RayError, RayServeException)


class EngineLink:
    """Talks to the engine deployment behind a Serve handle. Belongs to one event loop."""

    def __init__(
        self,
        engine: DeploymentHandle,
        *,
        bind_host: str,
        silence_timeout_s: float,
        read_statuses: Callable[[], Mapping[str, Mapping[str, Any]]],
    ) -> None:
        """Open the token socket and begin to watch the engine.

        Args:
            engine: Handle of the `Engine` deployment.
            bind_host: This node's own address.
            silence_timeout_s: After so long without a sign of life, an engine's streams fail.
            read_statuses: What `cluster.status.read_all` gives for this application; may block.
        """
        self._engine = engine
        self._read_statuses = read_statuses
        self._silence_timeout_s = silence_timeout_s
        self._receiver = TokenReceiver(bind_host)
        self._info = EngineInfo(is_ready=False, status="waiting for the engine to be placed")
        self._info_changed = asyncio.Event()
        self._calls: set[asyncio.Future[GenerateEnd]] = set()
        self._tasks = WatchedTasks()
        self._tasks.start("watch the engine", self._watch_engine())
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
        return self._info

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        try:
            async with asyncio.timeout(timeout_s):
                while not self._info.is_ready:
                    self._info_changed.clear()
                    await self._info_changed.wait()
        except TimeoutError:
            raise EngineNotReadyError(
                f"The engine was not ready within {timeout_s:.0f} s: {self._info.status}"
            ) from None
        return self._info

    async def profile(self, num_steps: int) -> None:
        response = cast("DeploymentResponse[bytes]", self._engine.profile.remote(num_steps))
        try:
            end = await asyncio.wait_for(_await_end(response), _INFO_TIMEOUT_S)
        except TimeoutError:
            raise EngineNotReadyError("No engine answered the call to profile.") from None
        _raise_if_failed(end)

    def abort_choice(self, request_id: str, index: int) -> None:
        self._receiver.abort_choice(request_id, 0, index)

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        attempt = 0
        num_choices = len(request.choices)
        stream = self._receiver.open_stream(request.request_id, attempt, num_choices)
        call = GenerateCall(
            request_id=request.request_id,
            attempt=attempt,
            choices=[
                ChoiceCall(list(choice.prompt_token_ids), choice.sampling, choice.sample_index)
                for choice in request.choices
            ],
            cache_salt=request.cache_salt,
            reply_to=self._receiver.invitation,
        )
        response = cast(
            "DeploymentResponse[bytes]", self._engine.generate.remote(msgspec.msgpack.encode(call))
        )
        # It returns just after the last token; the client need not wait for that.
        end = asyncio.ensure_future(_await_end(response))
        self._calls.add(end)
        end.add_done_callback(self._calls.discard)
        end.add_done_callback(lambda _: stream.wake())
        try:
            unfinished = set(range(num_choices))
            while unfinished:
                for tokens in await self._next_tokens(stream, end):
                    if tokens.finish_reason is not None:
                        unfinished.discard(tokens.choice)
                    yield tokens.choice, _delta(tokens)
        except BaseException:
            response.cancel()
            raise
        finally:
            self._receiver.close_stream(request.request_id, attempt)

    async def _next_tokens(
        self, stream: TokenStream, end: "asyncio.Future[GenerateEnd]"
    ) -> list[ChoiceTokens]:
        """Wait for tokens, for the call's end, or for a silence that is too long."""
        while not (tokens := stream.take()):
            if end.done():
                return await self._late_tokens(stream, end.result())
            silence_s = time.monotonic() - stream.heard_s
            if stream.leader is not None and silence_s > self._silence_timeout_s:
                raise EngineDiedError(f"The engine has been silent for {silence_s:.1f} s.")
            await stream.wait()
        return tokens

    async def _late_tokens(self, stream: TokenStream, end: GenerateEnd) -> list[ChoiceTokens]:
        """Wait for what is on its way over the socket, though its call has returned."""
        _raise_if_failed(end)
        try:
            async with asyncio.timeout(_LATE_TOKENS_TIMEOUT_S):
                while not (tokens := stream.take()):
                    await stream.wait()
        except TimeoutError:
            raise EngineDiedError("The engine's last tokens did not arrive.") from None
        return tokens

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self._silence_timeout_s / 2)
            self._receiver.wake_silent_streams(self._silence_timeout_s)

    async def _watch_engine(self) -> None:
        while True:
            try:
                response = self._engine.describe.remote()
                payload = await asyncio.wait_for(response, _INFO_TIMEOUT_S)
                info = msgspec.msgpack.decode(payload, type=EngineInfo)
            except (TimeoutError, *_CALL_FAILURES) as error:
                logger.debug("the engine did not describe itself: %r", error)
                status, ranks = await self._starting_state()
                # What was known stays: counters that fell to 0 and came back would count twice.
                info = replace(self._info, is_ready=False, status=status, ranks=ranks)
            self._info = info
            self._info_changed.set()
            await asyncio.sleep(INFO_PERIOD_S)

    async def _starting_state(self) -> tuple[str, tuple[RankStatus, ...]]:
        """Status and ranks of an engine whose constructor has not returned, by way of Ray's GCS."""
        replicas = await asyncio.to_thread(self._read_statuses)
        if not replicas:
            return "waiting for a place for the engine's leader", ()
        latest = max(replicas.values(), key=lambda replica: replica["time"])
        if latest["phase"] == "ready":
            # It is about to be called for the first time, or does not answer, or has just died.
            return "waiting for the engine's leader to answer", ()
        ranks = tuple(
            RankStatus(rank=rank["rank"], state=rank["phase"], note=describe_progress(rank))
            for rank in latest["ranks"]
        )
        return describe_progress(latest), ranks


def _delta(tokens: ChoiceTokens) -> TokenDelta:
    return TokenDelta(
        token_ids=tokens.token_ids,
        logprobs=tokens.logprobs,
        prompt_logprobs=tokens.prompt_logprobs,
        finish_reason=tokens.finish_reason,
        stop_token_id=tokens.stop_token_id,
        num_cached_tokens=tokens.num_cached_tokens,
    )


async def _await_end(response: DeploymentResponse[bytes]) -> GenerateEnd:
    """The call's end; each way in which Serve and Ray report a failure becomes an error of ours."""
    try:
        return msgspec.msgpack.decode(await response, type=GenerateEnd)
    except ray.exceptions.RayActorError as error:
        failure = CallError("EngineDiedError", f"The engine's leader died: {error}")
    except BackPressureError as error:
        failure = CallError("EngineBusyError", str(error))
    except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
        failure = CallError("EngineNotReadyError", f"No engine can be called: {error.message}")
    except _CALL_FAILURES as error:
        failure = CallError("EngineError", f"The engine failed: {error}")
    return GenerateEnd(error=failure)


def _raise_if_failed(end: GenerateEnd) -> None:
    error = end.error
    if error is None:
        return
    kind = getattr(errors, error.kind, EngineError)
    if issubclass(kind, errors.RequestError):
        raised = kind(error.message)
        raised.param, raised.code = error.param, error.code
        raise raised
    raise kind(error.message)
