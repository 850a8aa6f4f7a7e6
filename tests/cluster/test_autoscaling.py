"""What Serve is told of scaling, and what its controller makes of it."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig

import serve_app
from cluster.autoscaling import EnginePolicy, engine_autoscaling, read_load, router_autoscaling
from cluster.needs import Need
from cluster.replica import Engine
from engine.config import EngineConfig
from engine.tpu_slice import Slice

NEED = Need(device="cpu", num_hosts=1, bundle={"CPU": 0.5})


def config(**fields: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model_path": "m", **fields})


def points(*values: float) -> list[TimeStampedValue]:
    """Two seconds apart."""
    return [TimeStampedValue(100.0 + 2 * number, value) for number, value in enumerate(values)]


def read(figures: dict[str, dict[str, list[TimeStampedValue]]]) -> Any:
    return read_load(
        figures,
        arrivals_s=6.0,
        time_s=0.0,
        num_asked=2,
        num_ready=2,
        num_queued=3,
        num_possible=9,
    )


def test_what_engines_tell_is_added_up() -> None:
    load = read(
        {
            "num_running": {"a": points(1, 7), "b": points(4)},
            "num_waiting": {"a": points(9, 2), "b": points(0)},
            "queue_delay_s": {"a": points(0, 6), "b": points(0)},
            "page_use": {"a": points(0.1, 0.5), "b": points(0.25)},
            # Of engine a, the last 6 s count; engine b has told once, so of its pace nothing is
            # known.
            "requests_total": {"a": points(0, 100, 103, 106, 112), "b": points(50)},
            "served_total": {"a": points(0, 90, 91, 92, 94), "b": points(40)},
            "service_s_total": {"a": points(0, 900, 915, 930, 960), "b": points(400)},
        }
    )
    assert (load.num_running, load.num_waiting, load.pages_used) == (11, 5, 0.75)
    assert load.queue_delay_s == 3
    assert load.arrivals_per_s == 2
    assert load.service_s == 15
    assert load.num_possible == 9


def test_nothing_is_known_before_an_engine_has_told() -> None:
    load = read({})
    assert (load.num_running, load.num_waiting, load.arrivals_per_s) == (0, 3, 0)
    assert load.service_s is None


def test_the_policy_decides_in_a_controller_that_cannot_import_this_project(
    tmp_path: Path,
) -> None:
    scaling = engine_autoscaling(
        config(min_engines=0, max_engines=4, max_running_requests=4),
        need=replace(NEED, device="tpu", bundle={"TPU": 4.0}, tpu=Slice("v6e", "2x2")),
        cpus_per_leader=0.2,
    )
    deployed = tmp_path / "deployment"
    deployed.write_bytes(DeploymentConfig(autoscaling_config=scaling).to_proto_bytes())
    controller = """
        import pathlib, sys, types
        import ray
        import ray._private.state
        sys.modules["cluster"] = sys.modules["engine"] = None  # Importing them is an error.
        from ray.serve._private.autoscaling_state import _resolve_policy_callable
        from ray.serve._private.config import DeploymentConfig
        told = DeploymentConfig.from_proto_bytes(pathlib.Path(sys.argv[1]).read_bytes())
        policy = _resolve_policy_callable(told.autoscaling_config.policy)
        nodes = [
            {
                "NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1",
                "NodeManagerPort": 1, "NodeManagerHostname": "a",
                "Resources": {"TPU": 4.0}, "Labels": {},
            }
        ]
        ray.nodes = lambda: nodes
        ray._private.state.available_resources_per_node = dict
        ray._private.state.state.get_max_resources_from_cluster_config = dict
        context = types.SimpleNamespace(
            raw_metrics={}, total_queued_requests=0, target_num_replicas=1, current_num_replicas=1
        )
        print(policy(context), policy._num_possible)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(controller), deployed],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["(1, {}) 1"], done.stderr


def test_serve_calls_ten_times_a_second_and_one_of_them_decides() -> None:
    class Context:
        target_num_replicas = current_num_replicas = 1
        total_queued_requests = 0.0
        num_reads = 0

        @property
        def raw_metrics(self) -> dict[str, Any]:
            self.num_reads += 1
            return {}

    scaling = engine_autoscaling(config(max_engines=4), need=None, cpus_per_leader=0.2)
    policy = EnginePolicy(**scaling.policy.policy_kwargs)
    context = Context()
    decided = [policy(context)[0] for _ in range(10)]  # type: ignore[arg-type]
    assert decided == [1] * 10
    assert context.num_reads == 1


def scaling_of(deployment: Any) -> AutoscalingConfig:
    return deployment._deployment_config.autoscaling_config


def test_a_fixed_number_of_engines_and_routers_is_left_to_nobody() -> None:
    fixed = config(num_engines=3, num_routers=2)
    engine = serve_app.engine_deployment(fixed, Engine)
    router = serve_app.router_deployment(fixed)
    assert (engine.num_replicas, router.num_replicas) == (3, 2)
    assert scaling_of(engine) is scaling_of(router) is None


def test_limits_of_engines_and_routers_reach_serve() -> None:
    scaled = config(min_engines=0, max_engines=5, num_routers=2, max_routers=4)
    engines = scaling_of(serve_app.engine_deployment(scaled, Engine, need=NEED))
    assert (engines.min_replicas, engines.initial_replicas, engines.max_replicas) == (0, 1, 5)
    assert engines.policy.policy_kwargs["need"] == {
        "device": "cpu",
        "num_hosts": 1,
        "bundle": {"CPU": 0.5},
        "tpu": None,
    }
    routers = scaling_of(serve_app.router_deployment(scaled))
    assert (routers.min_replicas, routers.max_replicas) == (2, 4)
    assert routers == router_autoscaling(scaled)


def test_figures_are_kept_for_as_long_as_arrivals_are_counted() -> None:
    slow = engine_autoscaling(
        config(max_engines=2, upscale_delay_s=60), need=None, cpus_per_leader=0.2
    )
    assert slow.look_back_period_s > 60


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_engines": 0}, "--min-engines does nothing without --max-engines"),
        ({"upscale_delay_s": 5}, "--upscale-delay-s does nothing without --max-engines"),
        ({"max_engines": 2, "num_engines": 3}, "--num-engines=3 fixes .* --max-engines=2"),
        ({"max_engines": 2, "min_engines": 3}, "--min-engines=3 is above --max-engines=2"),
        ({"num_routers": 3, "max_routers": 2}, "--num-routers=3 is above --max-routers=2"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("fields", [{}, {"max_engines": 2}, {"num_engines": 2}])
def test_a_configuration_that_is_written_out_whole_is_read_back(fields: dict[str, Any]) -> None:
    given = config(**fields)
    assert EngineConfig.model_validate_json(given.model_dump_json()) == given
