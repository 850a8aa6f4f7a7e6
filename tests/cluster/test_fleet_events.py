"""What a router notes of its engines, as it sees them come, change and go."""

import pytest

from cluster.fleet_events import MAX_EVENTS, FleetEvents
from cluster.openai.engine_client import EngineInfo, FleetEvent, RankStatus

NOW_S = 1_700_000_000.0
STARTING = EngineInfo(is_ready=False, status="weights 40 of 100: layer 3")
REBUILDING = EngineInfo(is_ready=False, status="rebuilding its hosts, epoch 2", epoch=2)


def _ready(epoch: int, rank_state: str = "ready") -> EngineInfo:
    rank = RankStatus(rank=1, state=rank_state, note="host-1")
    return EngineInfo(is_ready=rank_state == "ready", status="ready", epoch=epoch, ranks=(rank,))


def _told(*states: EngineInfo | None) -> list[tuple[str, str]]:
    """Kind and words of what is noted of an engine with these states; None is its absence."""
    events = FleetEvents(clock=lambda: NOW_S)
    for state in states:
        events.take({} if state is None else {"one": state})
    return [(event.kind, event.what) for event in events.latest]


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ([None], []),
        ([_ready(1)], [("ready", "ready, epoch 1")]),
        (
            [STARTING, STARTING, _ready(1)],
            [("came", "came: weights 40 of 100: layer 3"), ("ready", "ready, epoch 1")],
        ),
        (
            [_ready(1), REBUILDING, _ready(2)],
            [
                ("ready", "ready, epoch 1"),
                ("lost", "rebuilding its hosts, epoch 2"),
                ("rebuilt", "rebuilt, epoch 2"),
            ],
        ),
        # Too quick to be seen: the epoch tells.
        ([_ready(1), _ready(2)], [("ready", "ready, epoch 1"), ("rebuilt", "rebuilt, epoch 2")]),
        ([_ready(1), None], [("ready", "ready, epoch 1"), ("gone", "gone")]),
    ],
)
def test_each_change_is_told_once(
    states: list[EngineInfo | None], told: list[tuple[str, str]]
) -> None:
    assert _told(*states, states[-1]) == told


def test_a_rank_that_falls_silent_is_told_with_its_host() -> None:
    told = _told(_ready(1), _ready(1, "silent"))
    assert ("lost", "rank 1 on host-1 is silent") in told


def test_the_oldest_events_are_forgotten() -> None:
    events = FleetEvents(clock=lambda: NOW_S)
    for index in range(MAX_EVENTS + 1):
        events.take({str(index): _ready(1)})
    assert len(events.latest) == MAX_EVENTS
    assert events.latest[-1] == FleetEvent(
        time_s=NOW_S, engine_id=str(MAX_EVENTS), kind="ready", what="ready, epoch 1"
    )
