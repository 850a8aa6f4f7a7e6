"""What `qwen-on-ray status` says beside Serve's own words."""

from typing import Any

import pytest
from ray import serve
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeStatus,
)

from cluster import status_command
from cluster.status_command import describe_applications, describe_engine


def progress(phase: str, done: int = 0, total: int = 0, **more: Any) -> dict[str, Any]:
    return {"phase": phase, "done": done, "total": total, "note": "", **more}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (progress("ready", epoch=3), "serves, epoch 3"),
        (progress("weights", 40, 98, epoch=1), "starting, epoch 1: weights 40 of 98"),
        (
            progress("compile", 7, 12, note="8 decodes", epoch=3),
            "rebuilding, epoch 3: compile 7 of 12: 8 decodes",
        ),
    ],
)
def test_an_engine_is_told_in_a_line(status: dict[str, Any], words: str) -> None:
    assert describe_engine(status) == words


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """One application that Serve takes for running; what its replicas wrote down, to be changed."""
    engine = DeploymentStatusOverview(
        status=DeploymentStatus.HEALTHY,
        status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
        replica_states={"RUNNING": 1},  # type: ignore[dict-item]
        message="",
    )
    application = ApplicationStatusOverview(
        status=ApplicationStatus.RUNNING,
        message="",
        last_deployed_time_s=0.0,
        deployments={"Engine": engine},
    )
    written: dict[str, dict[str, Any]] = {
        "statuses": {"one": progress("ready", epoch=1, actor="SERVE_REPLICA::qwen#Engine#one")},
        "refusals": {},
    }
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={"qwen": application}))
    monkeypatch.setattr(status_command, "read_all", lambda app: written["statuses"])
    monkeypatch.setattr(status_command, "read_refusals", lambda app: written["refusals"])
    living = {"SERVE_REPLICA::qwen#Engine#one", "SERVE_REPLICA::qwen#Router#two"}
    monkeypatch.setattr(status_command, "living_actors", lambda: living)
    return written


def test_an_engine_whose_hosts_are_rebuilt_is_not_well_though_serve_says_so(cluster) -> None:
    lines, is_well = describe_applications()
    assert is_well
    assert lines == [
        "qwen: RUNNING",
        "  Engine: HEALTHY (1 RUNNING)",
        "  engine one: serves, epoch 1",
    ]
    rank = progress("weights", 4, 9, rank=0)
    cluster["statuses"]["one"].update(progress("weights", 4, 9, epoch=2, ranks=[rank]))
    lines, is_well = describe_applications()
    assert not is_well
    assert lines[2:] == [
        "  engine one: rebuilding, epoch 2: weights 4 of 9",
        "    rank 0: weights 4 of 9",
    ]


def test_what_the_dead_wrote_is_not_told(cluster) -> None:
    cluster["statuses"]["gone"] = progress(
        "ready", epoch=1, actor="SERVE_REPLICA::qwen#Engine#gone"
    )
    cluster["refusals"]["gone"] = "user_config of Router: no"
    lines, is_well = describe_applications()
    assert is_well
    assert not [line for line in lines if "gone" in line]


def test_a_user_config_that_was_refused_is_told(cluster) -> None:
    cluster["refusals"]["two"] = "user_config of Router: unknown name tokens."
    lines, is_well = describe_applications()
    assert not is_well
    assert "two goes on without its user_config: user_config of Router: unknown" in lines[-1]


def test_no_cluster_is_told_with_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def refuse(**_: Any) -> None:
            raise ConnectionError("nobody is there")

        patch.setattr(status_command.ray, "init", refuse)
        assert status_command.status_main(["--address=10.0.0.9:6379"]) == 2
    assert "--address=10.0.0.9:6379: nobody is there" in capsys.readouterr().err
