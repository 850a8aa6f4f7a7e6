"""Tasks that may not end: their owner's health depends on them."""

import asyncio
import logging

import pytest

from cluster.watched_tasks import WatchedTasks
from engine.errors import EngineError


async def run_for_ever() -> None:
    await asyncio.Event().wait()


async def test_tasks_that_run_are_well_until_closed() -> None:
    tasks = WatchedTasks()
    tasks.start("one", run_for_ever())
    tasks.start("two", run_for_ever())
    await asyncio.sleep(0)
    tasks.check()
    await tasks.close()
    assert len(asyncio.all_tasks()) == 1


async def test_a_task_that_ends_is_logged_and_named_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    has_ended = asyncio.Event()

    async def fail() -> None:
        has_ended.set()
        raise ZeroDivisionError("by nothing")

    tasks = WatchedTasks()
    tasks.start("watch", run_for_ever())
    tasks.start("count", fail())
    await has_ended.wait()
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match=r"'count' has ended: ZeroDivisionError\('by nothing'\)"):
        tasks.check()
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.CRITICAL, "The task 'count' has ended")
    ]
    await tasks.close()


async def test_a_task_that_returns_has_ended_too() -> None:
    async def give_up() -> None:
        return

    tasks = WatchedTasks()
    tasks.start("patience", give_up())
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="'patience' has ended: None"):
        tasks.check()
    await tasks.close()
