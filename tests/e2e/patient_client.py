"""A client for which a broken connection is no end: it asks for the rest of a stream.

Whole answers it asks for again, as OpenAI's SDK does. Any parsing of what is in an answer is its
callers' part.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 400
MAX_TRIES = 20
RETRY_PAUSE_S = 0.5


class AnswerError(ValueError):
    """The server refused a request, or ended its stream with an error."""


class PatientClient:
    """Asks for chat completions; an answer may come over several connections.

    `on_break` is called for each connection that broke. What `events` and `whole` raise is an
    AnswerError, or the aiohttp.ClientError of the last of many tries.
    """

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/v1/chat/completions"
        self._streams_url = f"{base_url}/v1/streams"
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def close(self) -> None:
        await self._session.close()

    async def whole(self, body: Mapping[str, Any], on_break: Callable[[], None]) -> dict[str, Any]:
        """Ask for an answer that is not streamed."""
        for num_tries in count():
            try:
                async with self._session.post(self._url, json=body) as response:
                    await _check_status(response)
                    return await response.json()
            except aiohttp.ClientError:
                if num_tries == MAX_TRIES:
                    raise
                on_break()
                await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("tries are counted above")

    async def events(
        self, body: Mapping[str, Any], on_break: Callable[[], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for a stream; gives its events, each once, until its end."""
        name, last_id, event_id = None, "", ""
        for num_tries in count():
            if name is None:
                asked = self._session.post(self._url, json={**body, "stream": True})
            else:
                headers = {"Last-Event-ID": last_id} if last_id else {}
                asked = self._session.get(f"{self._streams_url}/{name}", headers=headers)
            try:
                async with asked as response:
                    await _check_status(response)
                    async for line in response.content:
                        field, _, value = line.decode().rstrip().partition(": ")
                        if field == "id":
                            event_id = value
                        elif value == "[DONE]":
                            return
                        elif field == "data":
                            event = json.loads(value)
                            if "error" in event:
                                raise AnswerError(event["error"]["message"])
                            # Not before the event is there: what follows on it is asked for.
                            name, last_id = event["id"], event_id
                            yield event
                raise aiohttp.ClientPayloadError("the stream ended without its end")
            except aiohttp.ClientError:
                if num_tries == MAX_TRIES:
                    raise
                on_break()
                await asyncio.sleep(RETRY_PAUSE_S)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    """Raise for an answer that is none; what a proxy says for a router that is gone may pass."""
    if response.status == 200:
        return
    body = (await response.read()).decode(errors="replace")
    if response.status >= 500 and not body.startswith('{"error"'):
        raise aiohttp.ClientPayloadError(f"HTTP {response.status}: {body[:300]}")
    raise AnswerError(f"HTTP {response.status}: {body[:300]}")


@asynccontextmanager
async def asking(num_clients: int, ask: Callable[[int], Awaitable[object]]) -> AsyncIterator[None]:
    """Keep so many requests under way; at the end all are brought to their ends.

    Args:
        ask: Makes one request. Told how many its client has made before, plus the client's number.
    """
    is_over = asyncio.Event()

    async def ask_on(turn: int) -> None:
        while not is_over.is_set():
            await ask(turn)
            turn += 1

    tasks = [asyncio.create_task(ask_on(number)) for number in range(num_clients)]
    try:
        yield
    finally:
        is_over.set()
        await asyncio.gather(*tasks)
