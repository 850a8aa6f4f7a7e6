"""Answers on the wire: server-sent events, or one JSON object, until the client goes away."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.openai.errors import ErrorReply

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def encode_event(event: BaseModel) -> bytes:
    """Encode one event; fields that were never set are left out."""
    return b"data: " + event.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def encode_error_event(reply: ErrorReply) -> bytes:
    """Encode an error amid a stream, whose status is long sent. No [DONE] may follow."""
    return b"data: " + reply.json() + b"\n\n"


class AnswerResponse(Response):
    """Sends what an async generator yields, and closes it as soon as the client is gone.

    Nothing is sent before the generator's first part, so an error until then gets its own status.
    A client's leaving is watched here, because otherwise it would show only at the next send,
    which for a request that waits for the engine may be a minute away.

    Args:
        parts: Events of a stream, or a single part with the whole JSON object.
        request_id: Goes into the header `x-request-id`.
    """

    def __init__(
        self, parts: AsyncGenerator[bytes, None], *, is_stream: bool, request_id: str
    ) -> None:
        self._parts = parts
        self._is_stream = is_stream
        self._request_id = request_id
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                logger.debug("%s: the client went away", self._request_id)
        finally:
            sending.cancel()
            leaving.cancel()
            # Return only when the generator is closed, so that no abort is left to chance.
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            part = await anext(parts)
            await send(
                {"type": "http.response.start", "status": 200, "headers": self._headers(part)}
            )
            await send({"type": "http.response.body", "body": part, "more_body": True})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _headers(self, part: bytes) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._request_id.encode())]
        if self._is_stream:
            # Proxies such as nginx would otherwise collect events before they pass them on.
            return [
                *headers,
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
        return [
            *headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(part)).encode()),
        ]


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
