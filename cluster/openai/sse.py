"""Answers on the wire: server-sent events, or one JSON object, until the client goes away."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.openai.errors import ErrorReply

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

COMMENT_PERIOD_S = 10.0
"""A stream that has nothing to say for so long says that it waits: proxies cut silent ones."""

# No blank line after it: once an event had an id, OpenAI's Python client takes a blank line for the
# end of another event.
_COMMENT = b": waiting for an engine\n"

_REQUEST_ID = b"x-request-id"

_encode_text = msgspec.json.Encoder().encode


def encode_event(event: BaseModel, event_id: str | None = None) -> bytes:
    """Encode one event; fields that were never set are left out.

    Args:
        event_id: Tells how far a client is that has read it.
    """
    head = b"data: " if event_id is None else b"id: " + event_id.encode() + b"\ndata: "
    return head + event.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class TextEvent:
    """An event of which only the text changes: all around it is encoded once.

    A pydantic object for each token takes ten times as long as its text.

    Args:
        make_event: Makes the event with a given text.
    """

    def __init__(self, make_event: Callable[[str], BaseModel]) -> None:
        # No client can have put this into another field: it is drawn for this event.
        mark = secrets.token_hex(16)
        parts = encode_event(make_event(mark)).split(msgspec.json.encode(mark))
        self._head, self._tail = parts

    def encode(self, text: str, event_id: str) -> bytes:
        id_line = f"id: {event_id}\n".encode()
        return b"".join((id_line, self._head, _encode_text(text), self._tail))


def encode_error_event(reply: ErrorReply) -> bytes:
    """Encode an error amid a stream, whose status is long sent. No [DONE] may follow."""
    return b"data: " + reply.json() + b"\n\n"


class AnswerResponse(Response):
    """Sends what an async generator yields, and closes it as soon as the client is gone.

    Nothing is sent before the generator's first part, so an error until then gets its own status;
    unless a stream's first part takes longer than `COMMENT_PERIOD_S`: then it begins with comments.
    A client's leaving is watched here, because otherwise it would show only at the next send,
    which for a request that waits for the engine may be a minute away.

    Args:
        parts: Events of a stream, without the [DONE] at its end, or a single part with the whole
            JSON object. What it raises before its first part, the route answers with a status.
        request_id: Goes into the header `x-request-id`, unless whoever is in front has named the
            request: Serve does, and puts its name into the answer by itself, beside any of ours.
        describe_failure: The event that ends a stream broken by that error, in place of `end`.
        end: What follows on a stream's last event.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        is_stream: bool,
        request_id: str,
        describe_failure: Callable[[Exception], bytes],
        end: bytes = DONE,
    ) -> None:
        self._parts = parts
        self._describe_failure = describe_failure
        self._is_stream = is_stream
        self._end = end if is_stream else b""
        self._request_id = request_id
        self._is_named = False
        self._has_begun = False
        self._sent_s = time.monotonic()
        # One message after the other, though two tasks send.
        self._turn = asyncio.Lock()
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._is_named = any(name == _REQUEST_ID for name, _ in scope["headers"])
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        commenting = asyncio.create_task(self._comment(send))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                logger.debug("%s: the client went away", self._request_id)
        finally:
            sending.cancel()
            leaving.cancel()
            commenting.cancel()
            # Return only when the generator is closed, so that no abort is left to chance.
            await asyncio.gather(sending, leaving, commenting, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            try:
                async for part in parts:
                    await self._send(send, part)
            except Exception as error:
                if not self._is_stream or not self._has_begun:
                    raise
                end = self._describe_failure(error)
            else:
                end = self._end
        await self._send(send, end, is_last=True)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        async with self._turn:
            if not self._has_begun:
                self._has_begun = True
                headers = self._headers(body)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})
            self._sent_s = time.monotonic()

    async def _comment(self, send: Send) -> None:
        """Send a comment after each silence, until cancelled."""
        while self._is_stream:
            silence_s = time.monotonic() - self._sent_s
            if silence_s >= COMMENT_PERIOD_S:
                await self._send(send, _COMMENT)
            else:
                await asyncio.sleep(COMMENT_PERIOD_S - silence_s)

    def _headers(self, part: bytes) -> list[tuple[bytes, bytes]]:
        headers = [] if self._is_named else [(_REQUEST_ID, self._request_id.encode())]
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
