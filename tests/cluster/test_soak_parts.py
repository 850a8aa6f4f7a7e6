"""What the soak counts: answers of a router whose engine errs, and processes that grow."""

import asyncio
from pathlib import Path

import psutil
import pytest
from fake_engine import FakeEngine, make_service, serve_on_loopback

from engine.errors import EngineDiedError
from tests.e2e import mixed_load
from tests.e2e.mixed_load import MixedLoad, leftovers_of, make_works
from tests.e2e.process_sizes import ProcessSizes, Sample, role_of

TEXT = "Once upon a time there was a lighthouse"


async def run_load(folder: Path, spoil: str | None, *, until: str, times: int) -> MixedLoad:
    """Learn the answers, spoil the engine in a way, and ask until so many are counted."""
    service, engine = make_service(folder, served_model_name="tiny")
    engine.answer = lambda choice: TEXT[: len(TEXT) - choice.sample_index]
    async with serve_on_loopback(service) as url:
        load = MixedLoad(url, "tiny", make_works(100, num_sentences=2))
        try:
            await load.learn_answers()
            if spoil is not None:
                SPOILS[spoil](engine)
            async with asyncio.timeout(60), load.asking(4):
                while _count(load, until) < times:
                    await asyncio.sleep(0.01)
        finally:
            await load.close()
    return load


def _count(load: MixedLoad, what: str) -> int:
    whole = load.tally.whole
    counts = {"whole": whole.total(), "kinds": len(whole), "lost": load.tally.lost}
    return counts[what] if what in counts else getattr(load.tally, what)


def _say_something_else(engine: FakeEngine) -> None:
    engine.answer = lambda _: TEXT.replace("time", "tide")


def _break_off(engine: FakeEngine) -> None:
    engine.failure = (5, EngineDiedError("gone"))


SPOILS = {"other text": _say_something_else, "broken off": _break_off}


async def test_answers_that_are_as_they_were_learnt_are_right(tmp_path):
    kinds = {work.name for work in make_works(1, num_sentences=1)} | {"stop string"}
    load = await run_load(tmp_path, None, until="kinds", times=len(kinds))
    tally = load.tally
    assert (tally.lost, tally.wrong, tally.errors) == (0, 0, [])
    assert tally.whole.keys() == kinds


@pytest.mark.parametrize(("spoil", "counted"), [("other text", "wrong"), ("broken off", "lost")])
async def test_an_answer_with_other_text_is_wrong_and_one_broken_off_is_lost(
    tmp_path, spoil, counted
):
    load = await run_load(tmp_path, spoil, until=counted, times=3)
    assert load.tally.errors
    assert _count(load, "lost" if counted == "wrong" else "wrong") == 0


async def test_a_client_that_leaves_counts_neither_as_lost_nor_as_wrong(tmp_path, monkeypatch):
    # Else it might be that none of them wants to, and all wait for answers that do not come.
    monkeypatch.setattr(mixed_load, "SHARE_THAT_LEAVES", 1.0)
    monkeypatch.setattr(mixed_load, "LONGEST_STAY_S", 0.1)
    service, engine = make_service(tmp_path, served_model_name="tiny")
    async with serve_on_loopback(service) as url:
        load = MixedLoad(url, "tiny", make_works(100, num_sentences=2))
        try:
            await load.learn_answers()
            engine.steps = steps = asyncio.Semaphore(0)
            async with load.asking(8):
                async with asyncio.timeout(60):
                    while load.tally.left < 1:
                        await asyncio.sleep(0.01)
                assert load.tally.whole.total() == 0
                for _ in range(10_000):
                    steps.release()
        finally:
            await load.close()
    assert (load.tally.lost, load.tally.wrong) == (0, 0)


def test_what_is_not_at_rest_is_named():
    engine = {"id": "a", "num_running": 0, "num_waiting": 0, "num_pages_used": 3}
    fleet = {
        "router": {"num_running": 1, "num_waiting": 0},
        "engines": [engine | {"compiles_total": 0}],
    }
    assert leftovers_of(fleet) == ["the router: num_running 1", "engine a: num_pages_used 3"]


def test_growth_is_told_from_a_processs_own_first_and_last_third():
    sizes = ProcessSizes()
    long, short = psutil.Process(), psutil.Process(psutil.Process().ppid())
    sizes.roles = {long: "router", short: "rank"}
    sizes.samples = {
        long: [Sample(10.0 * index, 100.0 + index, 20 + index // 6) for index in range(9)],
        short: [Sample(10.0 * index, 50.0, 10) for index in range(3)],
    }
    first, last = sizes.growths(least_life_s=60.0)
    assert (first.role, first.life_s, first.is_judged) == ("router", 80.0, True)
    assert (first.rss_mb, first.rss_growth_mb) == ((101.0, 107.0), 6.0)
    assert (first.num_files, first.files_growth) == ((20, 21), 1)
    assert (last.role, last.is_judged) == ("rank", False)


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:fault-test:Router", "router"),
        ("ray::ServeReplica:fault-test:Engine", "leader"),
        ("ray::HostWorker", "rank"),
        ("/somewhere/bin/haproxy -f haproxy.cfg", "HAProxy"),
        ("ray::IDLE", None),
    ],
)
def test_processes_are_known_by_their_titles(title, role):
    assert role_of(title) == role
