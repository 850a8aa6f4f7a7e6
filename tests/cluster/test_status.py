"""A start's status, written by one process of a Ray and read by another."""

import time
from typing import Any

import pytest
import ray

from cluster.status import StartStatus, failure_of, read_all
from engine.step import StartProgress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def test_another_process_reads_how_far_each_rank_is() -> None:
    status = StartStatus("qwen", "replica-1")
    status.update(StartProgress(phase="placement", done=2, total=2))
    status.update(StartProgress(phase="weights", done=10, total=10, rank=1))
    status.update(StartProgress(phase="compile", done=3, total=7, note="bucket 8", rank=0))

    read = ray.remote(num_cpus=0.1)(read_all)
    found = ray.get(read.remote("qwen"), timeout=60)

    assert list(found) == ["replica-1"]
    told = found["replica-1"]
    assert (told["phase"], told["done"], told["total"], told["note"]) == (
        "compile",
        3,
        7,
        "bucket 8",
    )
    assert [(rank["rank"], rank["phase"]) for rank in told["ranks"]] == [
        (0, "compile"),
        (1, "weights"),
    ]
    status.ready()
    assert read_all("qwen")["replica-1"]["phase"] == "ready"
    status.clear()
    assert read_all("qwen") == {}


def test_a_rank_that_is_behind_rank_0_does_not_write_at_each_of_its_steps(monkeypatch) -> None:
    status = StartStatus("qwen", "replica-1")
    monkeypatch.setattr("cluster.status._WRITE_PERIOD_S", 3600)
    status.update(StartProgress(phase="weights", done=1, total=9, rank=0))
    status.update(StartProgress(phase="weights", done=1, total=9, rank=1))
    status.update(StartProgress(phase="compile", done=0, total=7, rank=0))
    for done in range(2, 9):
        status.update(StartProgress(phase="weights", done=done, total=9, rank=1))

    def ranks() -> list[tuple[str, int]]:
        return [(rank["phase"], rank["done"]) for rank in read_all("qwen")["replica-1"]["ranks"]]

    assert ranks() == [("compile", 0), ("weights", 1)]
    status.update(StartProgress(phase="weights", done=9, total=9, rank=1))
    assert ranks() == [("compile", 0), ("weights", 9)]
    status.clear()


def test_apps_do_not_see_each_other_and_a_failure_says_why() -> None:
    first, second = StartStatus("one", "a"), StartStatus("other", "b")
    first.failed("Rank 1 has no weights.")
    second.ready()
    assert read_all("one")["a"]["phase"] == "failed"
    assert read_all("one")["a"]["note"] == "Rank 1 has no weights."
    assert list(read_all("other")) == ["b"]
    assert failure_of("one") == "Rank 1 has no weights."
    assert failure_of("other") is None
    assert failure_of("none") is None
    first.clear()
    second.clear()


class Replica:
    def say_ready(self, replica: str) -> None:
        StartStatus("qwen", replica).ready()


def test_a_new_replica_forgets_those_that_were_killed_and_no_others() -> None:
    actors: Any = ray.remote(num_cpus=0.1)(Replica)
    replicas = {name: actors.options(name=f"replica {name}").remote() for name in "ab"}
    for name, replica in replicas.items():
        ray.get(replica.say_ready.remote(name), timeout=60)
    elsewhere = StartStatus("other", "c")
    elsewhere.ready()
    ray.kill(replicas["a"])

    new = StartStatus("qwen", "new")
    deadline_s = time.monotonic() + 60
    while "a" in read_all("qwen"):
        assert time.monotonic() < deadline_s
        new.forget_the_dead()

    assert list(read_all("qwen")) == ["b"]
    assert list(read_all("other")) == ["c"]
    ray.kill(replicas["b"])
    elsewhere.clear()
