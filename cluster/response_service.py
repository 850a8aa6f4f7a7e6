"""The Responses API over the chats of an `OpenAIService`: what its routes call.

A response is a chat that is asked, answered and kept in other words. Knows neither HTTP nor Ray.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from cluster.background_runs import RENEW_S, BackgroundRuns
from cluster.openai.engine_client import Caller
from cluster.openai.response_answer import ResponseAnswer
from cluster.openai.response_items import InputItem
from cluster.openai.responses import ResponseCall, in_own_words
from cluster.openai.responses_schema import ENDED, Response, ResponseFailure, ResponseRequest
from cluster.openai.stored_responses import StoredResponse
from cluster.response_shelf import KeptResponse
from cluster.service import OpenAIService, Recalled
from engine.errors import (
    EngineNotReadyError,
    RequestError,
    ResponseNotFoundError,
    StreamGoneError,
    StreamResumedError,
)

logger = logging.getLogger(__name__)


LEASE_S = 4 * RENEW_S
"""After so long without a word from whoever runs a response in the background, another may."""


class ResponseService:
    """Answers requests for responses. Belongs to the service's event loop.

    What runs in the background is said to be under way, again and again, where responses are kept.
    If no more of it is heard, the next router that is asked for it goes on with it.
    """

    def __init__(self, service: OpenAIService) -> None:
        self._service = service
        self._runs = BackgroundRuns()

    async def close(self) -> None:
        """End what runs in the background here."""
        await self._runs.close()

    async def respond(
        self, body: ResponseRequest, response_id: str, caller: Caller
    ) -> AsyncGenerator[bytes, None]:
        """Answer a request: the stream's events, or the whole object.

        Raises:
            RequestError, EngineError: Before the first part.
        """
        if body.background:
            self._check_background(body)
        past: list[InputItem] = []
        if body.previous_response_id is not None:
            past = await self._conversation(body.previous_response_id, caller)
        parts = await self._begin(ResponseCall(body=body, past=past), response_id, caller)
        async with aclosing(parts):
            async for part in parts:
                yield part

    def resume(self, recalled: Recalled, caller: Caller) -> AsyncGenerator[bytes, None]:
        """Go on with a response, as `respond` would have done: what the client has is left out."""
        position = recalled.resumption.position
        return self._resume(recalled, caller, position.number if position is not None else None)

    async def stream(
        self, response_id: str, starting_after: int | None, caller: Caller
    ) -> AsyncGenerator[bytes, None]:
        """The events of a response that runs in the background, or did until lately.

        Args:
            response_id: As the client knows it.
            starting_after: Number of the last event that the client has; None if it has none.
            caller: Who asks.

        Raises:
            ResponseNotFoundError, EngineNotReadyError: As `retrieve`.
            RequestError: It has no events, or no longer.
        """
        stored = await self._stored(response_id, caller)
        if not stored.has_events:
            raise RequestError(
                "Events are there of responses that were asked for with background and stream. "
                "Leave stream out for the whole object.",
                param="stream",
            )
        try:
            recalled = await self._service.recall(response_id, None, caller)
        except StreamGoneError:
            raise RequestError(
                "The response has ended, and its events are kept no longer. Leave stream out for "
                "the whole object.",
                param="stream",
            ) from None
        parts = self._resume(recalled, caller, starting_after)
        async with aclosing(parts):
            async for part in parts:
                yield part

    async def retrieve(self, response_id: str, caller: Caller) -> bytes:
        """A response that was kept, as JSON.

        Raises:
            ResponseNotFoundError: Nobody keeps it, or it is another tenant's.
            EngineNotReadyError: Who may keep it could not be asked.
        """
        kept = await self._kept(response_id, caller)
        stored = await self._decode(kept)
        if not kept.is_ended and kept.age_s > LEASE_S:
            stored = await self._take_over(response_id, stored, caller)
        return stored.response_json

    async def input_items(self, response_id: str, caller: Caller) -> list[dict[str, Any]]:
        """What a response was asked with; raises as `retrieve`."""
        stored = await self._stored(response_id, caller)
        return await self._service.in_thread(stored.input_items)

    async def delete(self, response_id: str, caller: Caller) -> None:
        """Have a response kept no longer, and end it if it is under way; raises as `retrieve`."""
        kept = await self._kept(response_id, caller)
        if not kept.is_ended:
            await self.cancel(response_id, caller)
        if not await self._service.engine.responses.forget(response_id, caller.tenant):
            raise _not_found(response_id)

    async def cancel(self, response_id: str, caller: Caller) -> bytes:
        """End a response that is under way, with any router; one that has ended stays as it is.

        Returns:
            The response as JSON.

        Raises:
            ResponseNotFoundError: It is neither under way nor kept.
            EngineNotReadyError: It waits for an engine, or who may keep it could not be asked.
        """
        kept = await self._service.engine.responses.find(response_id, caller.tenant)
        if kept is not None and kept.is_ended:
            return (await self._decode(kept)).response_json
        try:
            # Whoever reads it elsewhere is told, and its pages are freed.
            recalled = await self._service.recall(response_id, None, caller)
        except StreamGoneError:
            if kept is not None and kept.age_s <= LEASE_S:
                message = "The response waits for an engine. Try again."
                raise EngineNotReadyError(message) from None
            raise _not_found(response_id) from None
        if recalled.response is None:
            raise _not_found(response_id)
        is_ended = all(
            choice.finish_reason is not None for choice in recalled.resumption.record.past
        )
        answer = self._answer(recalled.response, caller, is_stream=False, is_cancelled=not is_ended)
        async with aclosing(self._service.replay(recalled, answer)) as parts:
            return b"".join([part async for part in parts])

    def _answer(
        self,
        call: ResponseCall,
        caller: Caller,
        *,
        is_stream: bool,
        last_number: int | None = None,
        is_cancelled: bool = False,
        num_restarts: int = 0,
    ) -> ResponseAnswer:
        return ResponseAnswer(
            call,
            is_stream=is_stream,
            store=partial(self._store, call, caller, num_restarts),
            renew=partial(self._service.engine.responses.renew, tenant=caller.tenant),
            count_tokens=self._service.count_tokens,
            last_number=last_number,
            is_cancelled=is_cancelled,
        )

    async def _guarded(
        self, parts: AsyncGenerator[bytes, None], answer: ResponseAnswer
    ) -> AsyncGenerator[bytes, None]:
        """The same, with a failure amid the events as the last of them."""
        has_begun = False
        try:
            async with aclosing(parts):
                async for part in parts:
                    has_begun = True
                    yield part
        except Exception as error:
            if not has_begun:
                if isinstance(error, RequestError):
                    in_own_words(error)
                raise
            reply = self._service.count_failure(error)
            # Another router goes on with it, or has cancelled it.
            is_elsewhere = isinstance(error, StreamResumedError)
            yield answer.give_up(reply) if is_elsewhere else await answer.fail(reply)

    def _check_background(self, body: ResponseRequest) -> None:
        if not body.store:
            raise RequestError("background needs store: true.", param="store")
        if not self._service.config.max_stored_responses:
            raise RequestError(
                "background needs a server that keeps responses: this one was started with "
                "--max-stored-responses 0.",
                param="background",
            )

    async def _begin(
        self, call: ResponseCall, response_id: str, caller: Caller, num_restarts: int = 0
    ) -> AsyncGenerator[bytes, None]:
        body = call.body
        answer = self._answer(call, caller, is_stream=body.stream, num_restarts=num_restarts)
        if body.truncation == "auto":
            chat = await self._service.shorten(call)
        else:
            # A large input takes a tenth of a second.
            chat = await self._service.in_thread(lambda: call.chat)
        parts = self._service.chat(chat, response_id, caller, answer)
        return self._detached(self._guarded(parts, answer), answer)

    def _resume(
        self, recalled: Recalled, caller: Caller, last_number: int | None
    ) -> AsyncGenerator[bytes, None]:
        call = recalled.response
        assert call is not None, "it is a response"
        answer = self._answer(call, caller, is_stream=recalled.body.stream, last_number=last_number)
        if answer.has_same_events:
            # They are told from the first one on, of which those are left out that were sent.
            resumption = msgspec.structs.replace(recalled.resumption, position=None)
            recalled = replace(recalled, resumption=resumption)
        parts = self._guarded(self._service.resume(recalled, caller, answer), answer)
        return self._detached(parts, answer)

    def _detached(
        self, parts: AsyncGenerator[bytes, None], answer: ResponseAnswer
    ) -> AsyncGenerator[bytes, None]:
        """The same parts, or the first one, if it is to run in the background to its end."""
        if not answer.call.body.background:
            return parts
        reader = self._runs.start(parts, answer.renew)
        return reader if answer.is_stream else _first_of(reader)

    async def _take_over(
        self, response_id: str, stored: StoredResponse, caller: Caller
    ) -> StoredResponse:
        """Go on with what ran in the background of a router that is gone; what it is now."""
        try:
            recalled = await self._service.recall(response_id, None, caller)
        except StreamGoneError:
            # Its router was lost with it before an engine had it, or the engine was lost as well.
            call = await self._service.in_thread(stored.call_to_restart)
            if call is None:
                message = "The server that generated it was lost. Ask again."
                stored = stored.failed(ResponseFailure(code="server_error", message=message))
                await self._keep(response_id, caller, stored, is_ended=True)
                return stored
            logger.info("%s was to run in the background elsewhere, and begins here", response_id)
            parts = await self._begin(call, response_id, caller, stored.num_restarts + 1)
        else:
            logger.info("%s ran in the background elsewhere, and goes on here", response_id)
            parts = self._resume(recalled, caller, None)
        async with aclosing(parts):
            await anext(parts)
        return stored

    async def _conversation(self, response_id: str, caller: Caller) -> list[InputItem]:
        kept = await self._service.engine.responses.find(response_id, caller.tenant)
        if kept is None:
            raise RequestError(
                f"Nothing is kept here of the previous response {response_id[:100]!r}. Send the "
                "conversation as input.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if not kept.is_ended:
            raise RequestError(
                f"The previous response {response_id[:100]!r} is still under way. Wait for its "
                "end, or cancel it.",
                param="previous_response_id",
            )
        stored = await self._decode(kept)
        return await self._service.in_thread(stored.conversation)

    async def _kept(self, response_id: str, caller: Caller) -> KeptResponse:
        kept = await self._service.engine.responses.find(response_id, caller.tenant)
        if kept is None:
            raise _not_found(response_id)
        return kept

    async def _stored(self, response_id: str, caller: Caller) -> StoredResponse:
        return await self._decode(await self._kept(response_id, caller))

    async def _decode(self, kept: KeptResponse) -> StoredResponse:
        return await self._service.in_thread(partial(StoredResponse.decode, kept.content))

    async def _store(
        self, call: ResponseCall, caller: Caller, num_restarts: int, response: Response
    ) -> bool:
        stored = await self._service.in_thread(
            partial(StoredResponse.of, call, response, num_restarts=num_restarts)
        )
        is_ended = response.status in ENDED
        is_kept = await self._keep(response.id, caller, stored, is_ended=is_ended)
        if is_ended and not is_kept:
            logger.info("%s is not kept: no engine took it", response.id)
        return is_kept

    async def _keep(
        self, response_id: str, caller: Caller, stored: StoredResponse, *, is_ended: bool
    ) -> bool:
        content = await self._service.in_thread(stored.encode)
        store = self._service.engine.responses.store
        return await store(response_id, caller.tenant, content, is_ended=is_ended)


async def _first_of(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(parts):
        yield await anext(parts)


def _not_found(response_id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(
        f"Response with id {response_id[:100]!r} not found: it was not kept, or no longer, it has "
        "not ended yet, or it is another key's."
    )
