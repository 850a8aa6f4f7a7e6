"""Requests over connections of their own, cheap enough for thousands at once in one event loop."""

import asyncio
import json
import time
from typing import Any, cast

import httptools

HOST = "127.0.0.1"
MODEL = "fake"
QUESTION = "Why is the sky blue?"


class HeldRequest(asyncio.Protocol):
    """One request and its answer, read as it comes; taken apart by who wants it, after its end.

    Attributes:
        status: Of the answer; 0 until it begins.
        headers: Of the answer, names in lower case.
        parts: When something came, by `time.monotonic`, and what.
        is_whole: The answer has come to its end.
        ended: The connection is closed.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self.started_s = time.monotonic()
        self.ended_s = 0.0
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[tuple[float, bytes]] = []
        self.is_whole = False
        self.has_begun = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_s = self.ended_s or time.monotonic()
        self.has_begun.set()
        if not self.ended.done():
            self.ended.set_result(None)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.parts.append((time.monotonic(), body))
        # A stream's first event names the role alone.
        if len(self.parts) > 1:
            self.has_begun.set()

    def on_message_complete(self) -> None:
        self.is_whole = True
        self.ended_s = time.monotonic()
        assert self._transport is not None
        self._transport.close()


async def send(request: bytes, port: int) -> HeldRequest:
    """Connect and send.

    Raises:
        OSError: There is no connection.
    """
    loop = asyncio.get_running_loop()
    _, held = await loop.create_connection(lambda: HeldRequest(request), HOST, port)
    return held


def make_request(num_tokens: int, *, endpoint: str = "chat") -> bytes:
    """A whole HTTP request for one streamed answer."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": QUESTION}]
    else:
        path = "/v1/completions"
        body["prompt"] = QUESTION
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload
