"""An OpenAI server in miniature on loopback: answers as it is told, and keeps what it was sent."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
Answer = Callable[["Exchange"], Awaitable[None]]


@dataclass(slots=True)
class Exchange:
    """One request, and the means to answer it."""

    path: str
    headers: dict[str, str]
    body: Body
    writer: asyncio.StreamWriter
    has_begun: bool = False

    @property
    def max_tokens(self) -> int:
        return self.body.get("max_tokens") or self.body["max_completion_tokens"]

    @property
    def prompt_len(self) -> int:
        """Of token ids or else, as good as any count, the text's characters."""
        return len(self.body["prompt"] if "prompt" in self.body else self.body["messages"])

    async def send_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} .\r\ncontent-type: application/json\r\n"
        self.writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        await self.writer.drain()

    async def send_events(self, *events: object) -> None:
        """Send events together; the string [DONE] goes as it is."""
        texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
        await self.send_bytes("".join(f"data: {text}\n\n" for text in texts).encode())

    async def send_bytes(self, data: bytes) -> None:
        if not self.has_begun:
            self.has_begun = True
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            self.writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def finish(self, num_tokens: int | None = None) -> None:
        """Send usage and [DONE], and end the stream."""
        usage = self.usage(self.max_tokens if num_tokens is None else num_tokens)
        await self.send_events({"choices": [], "usage": usage}, "[DONE]")
        await self.end()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    def usage(self, num_tokens: int) -> Body:
        details = {"cached_tokens": 1}
        return {
            "prompt_tokens": self.prompt_len,
            "completion_tokens": num_tokens,
            "prompt_tokens_details": details,
        }


async def one_token_per_event(exchange: Exchange) -> None:
    """Answer as asked, whatever was asked."""
    is_chat = "messages" in exchange.body
    if not exchange.body["stream"]:
        content = {"message": {"content": "word"}} if is_chat else {"text": "word"}
        usage = exchange.usage(exchange.max_tokens)
        await exchange.send_json({"choices": [content], "usage": usage})
        return
    if is_chat:
        role = {"role": "assistant", "content": ""}
        await exchange.send_events({"choices": [{"delta": role}], "usage": None})
    for _ in range(exchange.max_tokens):
        choice = {"delta": {"content": " word"}} if is_chat else {"text": " word"}
        await exchange.send_events({"choices": [choice], "usage": None})
    await exchange.finish()


@dataclass(slots=True)
class OpenAIServer:
    """Answers /v1/models itself and gives each completion to `answer`; `async with` runs it.

    Attributes:
        exchanges: All completions that were asked for, in order.
        num_at_once: The most of them that were being answered at one time.
    """

    answer: Answer = one_token_per_event
    root: str = "no/directory"
    paths: dict[str, Answer] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    num_at_once: int = 0
    port: int = 0
    _num_open: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> "OpenAIServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                await self._answer_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
        }
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        exchange = Exchange(path, headers, json.loads(content or b"{}"), writer)
        if path in self.paths:
            await self.paths[path](exchange)
        elif path == "/v1/models":
            await exchange.send_json({"data": [{"id": "tiny", "root": self.root}]})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self.exchanges.append(exchange)
            self._num_open += 1
            self.num_at_once = max(self.num_at_once, self._num_open)
            try:
                await self.answer(exchange)
            finally:
                self._num_open -= 1
        else:
            await exchange.send_json({"error": {"message": f"no {path} here"}}, 404)
