"""Applications built for a cluster that there is."""

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slices import cluster_of as hosts_and_head
from fake_slices import slice_of
from ray import serve
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    LoggingConfig,
    ServeStatus,
)

import serve_app
from cluster.needs import need_of
from cluster.nodes import Cluster, Node
from cluster.ray_node import LONGEST_STREAM_S
from cluster.replica import Engine
from engine.config import parse_config
from engine.errors import CapacityError, ConfigError, EngineError

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def read_args(path: Path) -> dict[str, Any]:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    return application["args"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_for_chips_that_the_cluster_lacks_says_so_before_anything_is_deployed(
    path: Path,
) -> None:
    args = read_args(path)
    config = parse_config(args)
    if config.device == "cpu":
        assert serve_app.build(args)
        return
    with pytest.raises(CapacityError) as refusal:
        serve_app.build(args)
    message = str(refusal.value)
    assert f"{config.tp_size // config.nnodes} TPU chips" in message
    assert "this cluster has 0 TPU chips on 1 node" in message
    assert "`ray up`" in message
    assert "--device=cpu" in message


HEAD = {"node:__internal_head__": 1.0}


def cluster_of(*resources: dict[str, float]) -> Cluster:
    nodes = tuple(
        Node(node_id=str(number), address="10.0.0.1", resources=each, labels={})
        for number, each in enumerate(resources)
    )
    return Cluster(nodes=nodes, maxima={})


def test_a_head_without_cpus_is_told_before_a_router_waits_for_it() -> None:
    need = {"node:__internal_head__": 0.001}
    head_has_one = cluster_of({**HEAD, "CPU": 1.0}, {"CPU": 8.0})
    serve_app.check_room_for_routers(head_has_one, need, 5)
    with pytest.raises(CapacityError, match=r"--num-routers=6 .*--num-cpus=2"):
        serve_app.check_room_for_routers(head_has_one, need, 6)
    with pytest.raises(CapacityError, match=r"The cluster's head.*--num-cpus=1"):
        serve_app.check_room_for_routers(cluster_of(HEAD, {"CPU": 8.0}), need, 1)


def surge(cluster: Cluster, **fields: Any) -> serve_app.Surge:
    config = parse_config({"model_path": "m", **fields})
    return serve_app.find_surge(config, need_of(config), cluster)


def test_an_update_starts_engines_beside_the_old_ones_where_slices_are_spare() -> None:
    two_hosts = {"device": "tpu", "nnodes": 2, "tp_size": 8}
    slices = [slice_of(name, "2x4") for name in "abcd"]
    assert [
        surge(hosts_and_head(*slices), **two_hosts, num_engines=number).engines
        for number in range(1, 6)
    ] == [100, 100, 33, 0, 0]
    in_parts = hosts_and_head(slice_of("a", "2x4"), slice_of("b", "2x4", 0))
    assert surge(in_parts, **two_hosts).engines == 0, "an update would wait for ever"


def test_an_update_starts_routers_beside_the_old_ones_where_cpus_are_spare() -> None:
    one_engine = {"device": "cpu", "num_routers": 3}
    # Half a CPU of the host, and 0.2 for each leader and router, old and new.
    assert surge(cluster_of({**HEAD, "CPU": 2.2}), **one_engine) == serve_app.Surge(0, 100)
    assert surge(cluster_of({**HEAD, "CPU": 2.0}), **one_engine) == serve_app.Surge(0, 0)


def test_what_is_stopped_may_end_what_it_has() -> None:
    config = parse_config({"model_path": "m", "drain_timeout_s": 7})
    engine = serve_app.engine_deployment(config, Engine)
    router = serve_app.router_deployment(config)
    assert engine._deployment_config.graceful_shutdown_timeout_s == 7
    assert router._deployment_config.graceful_shutdown_timeout_s == LONGEST_STREAM_S
    assert engine._deployment_config.max_surge_percent == 0


def test_an_application_that_is_shut_down_elsewhere_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployed: list[serve.RunTarget] = []
    ends: list[str] = []
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run_many", lambda targets, **_: deployed.extend(targets))
    monkeypatch.setattr(serve, "status", ServeStatus)
    monkeypatch.setattr(serve, "shutdown", lambda: ends.append("shutdown"))
    caplog.set_level("INFO")
    config = parse_config({"model_path": "m", "device": "cpu"})

    serve_app._serve_until(threading.Event(), config, "127.0.0.1", 8000)

    assert "The application is gone" in caplog.text
    assert ends == ["shutdown"]
    # Serve's own options do not reach the routers, whose access log would have a line per request.
    (target,) = deployed
    assert isinstance(target.logging_config, LoggingConfig)
    assert not target.logging_config.enable_access_log


def test_a_router_that_fails_says_why_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    traceback = (
        "The deployment failed to start 3 times in a row. Error:\nray::ServeReplica (pid=1)\n"
        '  File "tokenizer.py", line 183, in load_tokenizer\n    raise CheckpointError(\n{}\n'
    )

    def status_of(error: str) -> ServeStatus:
        router = DeploymentStatusOverview(
            status=DeploymentStatus.DEPLOY_FAILED,
            status_trigger=DeploymentStatusTrigger.REPLICA_STARTUP_FAILED,
            replica_states={},
            message=traceback.format(error),
        )
        application = ApplicationStatusOverview(
            status=ApplicationStatus.DEPLOY_FAILED,
            message="Failed to update the deployments ['Router'].",
            last_deployed_time_s=0.0,
            deployments={"Router": router},
        )
        return ServeStatus(applications={serve_app.APP_NAME: application})

    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run_many", lambda targets, **_: None)
    monkeypatch.setattr(serve, "shutdown", lambda: None)
    config = parse_config({"model_path": "m", "device": "cpu"})

    def failure(error: str) -> str:
        monkeypatch.setattr(serve, "status", lambda: status_of(error))
        with pytest.raises(EngineError) as failed:
            serve_app._serve_until(threading.Event(), config, "127.0.0.1", 8000)
        return str(failed.value)

    own = "engine.errors.CheckpointError: No tokenizer in m: say where it lies."
    assert failure(own) == "m cannot be served. No tokenizer in m: say where it lies."
    assert "load_tokenizer" in failure("ValueError: 7 is no number")


def test_an_http_address_among_the_args_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"port .* http_options"):
        serve_app.build({"model_path": "m", "port": 8000})
