"""A start's status, written by one process of a Ray and read by another."""

import pytest
import ray

from cluster.status import StartStatus, read_all
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


def test_apps_do_not_see_each_other_and_a_failure_says_why() -> None:
    first, second = StartStatus("one", "a"), StartStatus("other", "b")
    first.failed("Rank 1 has no weights.")
    second.ready()
    assert read_all("one")["a"]["phase"] == "failed"
    assert read_all("one")["a"]["note"] == "Rank 1 has no weights."
    assert list(read_all("other")) == ["b"]
    first.clear()
    second.clear()
