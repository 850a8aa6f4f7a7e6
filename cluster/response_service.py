"""The Responses API over the chats of an `OpenAIService`: what its routes call.

A response is a chat that is asked, answered and kept in other words. Knows neither HTTP nor Ray.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from cluster.openai.engine_client import Caller
from cluster.openai.response_answer import ResponseAnswer
from cluster.openai.response_items import InputItem
from cluster.openai.responses import ResponseCall, in_own_words
from cluster.openai.responses_schema import Response, ResponseRequest
from cluster.openai.stored_responses import StoredResponse
from cluster.service import OpenAIService, Recalled
from engine.errors import (
    RequestError,
    ResponseNotFoundError,
    StreamGoneError,
    StreamResumedError,
)

logger = logging.getLogger(__name__)


class ResponseService:
    """Answers requests for responses. Belongs to the service's event loop."""

    def __init__(self, service: OpenAIService) -> None:
        self._service = service

    async def respond(
        self, body: ResponseRequest, response_id: str, caller: Caller
    ) -> AsyncGenerator[bytes, None]:
        """Answer a request: the stream's events, or the whole object.

        Raises:
            RequestError, EngineError: Before the first part.
        """
        past: list[InputItem] = []
        if body.previous_response_id is not None:
            past = await self._conversation(body.previous_response_id, caller)
        call = ResponseCall(body=body, past=past)
        answer = self._answer(call, caller, is_stream=body.stream)
        # A large input takes a tenth of a second.
        chat = await self._service.in_thread(lambda: call.chat)
        parts = self._service.chat(chat, response_id, caller, answer)
        async with aclosing(self._guarded(parts, answer)) as guarded:
            async for part in guarded:
                yield part

    async def resume(self, recalled: Recalled, caller: Caller) -> AsyncGenerator[bytes, None]:
        """Go on with a response, as `respond` would have done: what the client has is left out."""
        assert recalled.response is not None, "it is a response"
        position = recalled.resumption.position
        answer = self._answer(
            recalled.response,
            caller,
            is_stream=recalled.body.stream,
            last_number=position.number if position is not None else None,
        )
        parts = self._service.resume(recalled, caller, answer)
        async with aclosing(self._guarded(parts, answer)) as guarded:
            async for part in guarded:
                yield part

    async def retrieve(self, response_id: str, caller: Caller) -> bytes:
        """A response that was kept, as JSON.

        Raises:
            ResponseNotFoundError: Nobody keeps it, or it is another tenant's.
            EngineNotReadyError: Who may keep it could not be asked.
        """
        return (await self._stored(response_id, caller)).response_json

    async def input_items(self, response_id: str, caller: Caller) -> list[dict[str, Any]]:
        """What a response was asked with; raises as `retrieve`."""
        stored = await self._stored(response_id, caller)
        return await self._service.in_thread(stored.input_items)

    async def delete(self, response_id: str, caller: Caller) -> None:
        """Have a response kept no longer; raises as `retrieve`."""
        if not await self._service.engine.responses.forget(response_id, caller.tenant):
            raise _not_found(response_id)

    async def cancel(self, response_id: str, caller: Caller) -> bytes:
        """End a response that is under way, with any router; one that has ended stays as it is.

        Returns:
            The response as JSON.

        Raises:
            ResponseNotFoundError: It is neither under way nor kept.
        """
        content = await self._service.engine.responses.find(response_id, caller.tenant)
        if content is not None:
            return (await self._decode(content)).response_json
        try:
            # Whoever reads it elsewhere is told, and its pages are freed.
            recalled = await self._service.recall(response_id, None, caller)
        except StreamGoneError:
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
    ) -> ResponseAnswer:
        return ResponseAnswer(
            call,
            is_stream=is_stream,
            store=partial(self._store, call, caller),
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

    async def _conversation(self, response_id: str, caller: Caller) -> list[InputItem]:
        content = await self._service.engine.responses.find(response_id, caller.tenant)
        if content is None:
            raise RequestError(
                f"Nothing is kept here of the previous response {response_id[:100]!r}. Send the "
                "conversation as input.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        stored = await self._decode(content)
        return await self._service.in_thread(stored.conversation)

    async def _stored(self, response_id: str, caller: Caller) -> StoredResponse:
        content = await self._service.engine.responses.find(response_id, caller.tenant)
        if content is None:
            raise _not_found(response_id)
        return await self._decode(content)

    async def _decode(self, content: bytes) -> StoredResponse:
        return await self._service.in_thread(partial(StoredResponse.decode, content))

    async def _store(self, call: ResponseCall, caller: Caller, response: Response) -> bool:
        content = await self._service.in_thread(lambda: StoredResponse.of(call, response).encode())
        is_kept = await self._service.engine.responses.store(response.id, caller.tenant, content)
        if not is_kept:
            logger.info("%s is not kept: no engine took it", response.id)
        return is_kept


def _not_found(response_id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(
        f"Response with id {response_id[:100]!r} not found: it was not kept, or no longer, it has "
        "not ended yet, or it is another key's."
    )
