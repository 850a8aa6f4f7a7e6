"""A Serve handle's methods, answered by a test, and a router's link over such a handle."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping
from typing import Any, cast

from ray.serve.handle import DeploymentHandle

from cluster.engine_link import EngineLink

READY = {"phase": "ready", "done": 0, "total": 0, "note": "", "time": 1.0, "ranks": []}
"""What a leader that serves has written."""


class Response:
    """What a Serve handle returns for a call."""

    def __init__(self, answer: Awaitable[bytes]) -> None:
        self._task = asyncio.ensure_future(answer)

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Method:
    """A deployment's method: each call is one of `function`."""

    def __init__(self, function: Callable[..., Awaitable[bytes]]) -> None:
        self._function = function

    def remote(self, *args: object, **kwargs: object) -> Response:
        return Response(self._function(*args, **kwargs))


def open_link(
    handle: object,
    read_statuses: Callable[[], Mapping[str, Mapping[str, Any]]],
    *,
    silence_timeout_s: float,
    hold_timeout_s: float,
    list_running: Callable[[], Collection[str] | None] = lambda: None,
) -> EngineLink:
    """A router's link to the engines behind a handle."""
    return EngineLink(
        cast("DeploymentHandle", handle),
        bind_host="127.0.0.1",
        silence_timeout_s=silence_timeout_s,
        hold_timeout_s=hold_timeout_s,
        seeds=random.Random(0),
        read_statuses=read_statuses,
        list_running=list_running,
        may_sleep=True,
    )
