"""The page at `/`: its files, and what they read of the fleet (`GET /fleet`). Knows no Ray.

The files lie in `cluster/page`, as they are sent: there is no build step, and nothing comes from
elsewhere. All that they show is text to the browser, a model's answer above all.
"""

import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from cluster.openai.engine_client import EngineInfo, Fleet, FleetEventKind
from cluster.router_stats import RouterStats

PAGE_PATH = "/"
_MEDIA_TYPES = {
    "answer.js": "text/javascript",
    "api.js": "text/javascript",
    "chart.js": "text/javascript",
    "chat.js": "text/javascript",
    "fleet.css": "text/css",
    "fleet.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# The page itself tells nothing of the server, so it needs no API key; what it reads does.
PUBLIC_PATHS = (PAGE_PATH, *(f"/page/{name}" for name in _MEDIA_TYPES))

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Its files belong together: none may be older than the others.
    "Cache-Control": "no-cache",
}


class RankState(BaseModel):
    """One host of an engine; see `RankStatus`."""

    model_config = ConfigDict(from_attributes=True)

    rank: int
    state: str
    note: str
    seconds_since_answer: float | None


class EngineState(BaseModel):
    """One engine. Counters end in `_total`; their rates are for the reader to compute."""

    id: str
    is_ready: bool
    status: str
    epoch: int
    ranks: list[RankState]
    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_used: int
    page_size: int
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    compiles_total: int
    restarts_total: dict[str, int]


class EventState(BaseModel):
    """What happened to an engine, at seconds since 1970 by the router's clock."""

    time: float
    engine: str
    kind: FleetEventKind
    what: str


class RouterState(BaseModel):
    """The router that answers; there may be others."""

    model_config = ConfigDict(from_attributes=True)

    num_running: int
    num_waiting: int


class FleetState(BaseModel):
    """What `GET /fleet` answers; `time` is the router's clock, in seconds since 1970."""

    object: Literal["fleet"] = "fleet"
    time: float
    model: str
    is_ready: bool
    status: str
    context_length: int
    router: RouterState
    engines: list[EngineState]
    events: list[EventState]


class PageFiles:
    """The files of the page, read once."""

    def __init__(self) -> None:
        page = files("cluster") / "page"
        self._index = (page / "index.html").read_bytes()
        self._files = {name: (page / name).read_bytes() for name in _MEDIA_TYPES}

    def index(self) -> Response:
        return Response(self._index, media_type="text/html", headers=_HEADERS)

    def file(self, name: str) -> Response | None:
        """One of the files that the page loads; None if it has none of that name."""
        content = self._files.get(name)
        if content is None:
            return None
        return Response(content, media_type=_MEDIA_TYPES[name], headers=_HEADERS)


def describe_fleet(model: str, info: EngineInfo, fleet: Fleet, router: RouterStats) -> FleetState:
    """Put the fleet into the words of `/fleet`.

    Args:
        model: The name that clients should use.
        info: Of all engines together.
        fleet: Of each.
        router: This router's own figures.
    """
    return FleetState(
        time=time.time(),
        model=model,
        is_ready=info.is_ready,
        status=info.status,
        context_length=info.context_length,
        router=RouterState.model_validate(router),
        engines=_engine_states(fleet.engines),
        events=[
            EventState(time=event.time_s, engine=event.engine_id, kind=event.kind, what=event.what)
            for event in fleet.events
        ],
    )


def _engine_states(engines: Sequence[EngineInfo]) -> list[EngineState]:
    return [
        EngineState(
            id=info.engine_id,
            is_ready=info.is_ready,
            status=info.status,
            epoch=info.epoch,
            ranks=[RankState.model_validate(rank) for rank in info.ranks],
            num_running=info.stats.num_running,
            num_waiting=info.stats.num_waiting,
            num_pages=info.stats.num_pages,
            num_pages_used=info.stats.num_pages_used,
            page_size=info.page_size,
            prompt_tokens_total=info.stats.prompt_tokens_total,
            cached_tokens_total=info.stats.cached_tokens_total,
            generated_tokens_total=info.stats.generated_tokens_total,
            preemptions_total=info.stats.preemptions_total,
            compiles_total=info.stats.compiles_total,
            restarts_total=info.stats.restarts_total,
        )
        for info in engines
    ]
