"""Tasks that run as long as what owns them, and whose early end somebody has to hear of.

A task that nobody awaits dies without a word. Here its end is logged at once, and `check` says it
to whoever asks after the owner's health. Knows nothing of what the tasks do.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from engine.errors import EngineError

logger = logging.getLogger(__name__)


class WatchedTasks:
    """Tasks of one owner, in one event loop."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which should not end before `close`; `name` tells people what it does."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_end)
        self._tasks.append(task)

    def check(self) -> None:
        """Return if all of them run.

        Raises:
            EngineError: Naming the first that does not, and why.
        """
        for task in self._tasks:
            if task.done():
                reason = "cancelled" if task.cancelled() else repr(task.exception())
                raise EngineError(f"The task '{task.get_name()}' has ended: {reason}")

    async def close(self) -> None:
        """Cancel them, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.critical("The task '%s' has ended", task.get_name(), exc_info=task.exception())
