"""Answers that are generated to their end, whether or not anybody reads them.

Knows nothing of what they are: bytes that come, and something that is renewed meanwhile.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

logger = logging.getLogger(__name__)

RENEW_S = 5.0
"""How often a run says that it is still under way."""


class BackgroundRuns:
    """Runs of one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, parts: AsyncGenerator[bytes, None], renew: Callable[[], Awaitable[object]]
    ) -> AsyncGenerator[bytes, None]:
        """Take all parts of an answer; closing what is returned does not end that.

        Args:
            parts: The answer.
            renew: Called every `RENEW_S` from the first part to the last.

        Returns:
            The same parts, with the error that they end in.
        """
        reader = _Reader()
        task = asyncio.create_task(_run(parts, renew, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return reader.parts()

    async def close(self) -> None:
        """Cancel all runs, and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Reader:
    """Whoever reads a run's parts, for as long as somebody does."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._is_gone = False

    def put(self, item: bytes | Exception | None) -> None:
        if not self._is_gone:
            self._queue.put_nowait(item)
        elif isinstance(item, Exception):
            logger.error("an answer that nobody reads failed", exc_info=item)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._is_gone = True


async def _run(
    parts: AsyncGenerator[bytes, None], renew: Callable[[], Awaitable[object]], reader: _Reader
) -> None:
    renewing: asyncio.Task[None] | None = None
    try:
        async with aclosing(parts):
            async for part in parts:
                renewing = renewing or asyncio.create_task(_renew_for_ever(renew))
                reader.put(part)
    except Exception as error:
        reader.put(error)
    finally:
        if renewing is not None:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        reader.put(None)


async def _renew_for_ever(renew: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(RENEW_S)
        await renew()
