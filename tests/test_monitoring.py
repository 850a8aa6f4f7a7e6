"""Dashboard, alerts and documents against the one list of metrics."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dashboards import alert_expressions, own_expressions, ray_expressions, series_in

from cluster.metrics import ENGINE_METRICS, ROUTER_METRICS, ray_name

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)

ROOT = Path(__file__).resolve().parent.parent
LISTED = {series for metric in (*ENGINE_METRICS, *ROUTER_METRICS) for series in metric.series}
NOT_HERE = {
    # Pages that go to other hosts or to the host's memory; a preempted request is computed anew.
    "ray_vllm_nixl",
    "ray_vllm_kv_offload",
    "ray_vllm_external_prefix_cache",
    "ray_vllm_num_requests_swapped",
}


@pytest.mark.parametrize("expression", [*own_expressions(), *alert_expressions().values()])
def test_dashboard_and_alerts_read_only_series_that_there_are(expression: str) -> None:
    assert series_in(expression)
    assert series_in(expression) <= {ray_name(series) for series in LISTED}


def test_rays_own_dashboard_lacks_nothing_that_means_something_here() -> None:
    read = {series for expression in ray_expressions() for series in series_in(expression)}
    lacking = read - {ray_name(series) for series in LISTED}
    assert {series for series in lacking if not series.startswith(tuple(NOT_HERE))} == set()
    assert len(read - lacking) > 20


@needs_promtool
@pytest.mark.parametrize(("kind", "name"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_prometheus_accepts_the_files(kind: str, name: str) -> None:
    path = ROOT / "configs" / "prometheus" / name
    done = subprocess.run(["promtool", "check", kind, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Series a minute apart, as promtool writes them: "first+step x times". Up to 30 minutes.
QUIET = {
    'ray_qwen_on_ray_engine_up{model_name="m",engine="e"}': "1x30",
    'ray_qwen_on_ray_engine_restarts_total{model_name="m",engine="e",cause="died"}': "0x10 2x20",
    'ray_qwen_on_ray_engine_compiles_total{model_name="m",engine="e"}': "0x30",
    'ray_qwen_on_ray_engine_pages{model_name="m",engine="e"}': "100x30",
    'ray_qwen_on_ray_engine_pages_used{model_name="m",engine="e"}': "90x30",
    'ray_qwen_on_ray_router_requests_total{model_name="m",router="r",status="200"}': "0+1000x30",
    'ray_qwen_on_ray_router_requests_total{model_name="m",router="r",status="503"}': "0+5x30",
    'ray_vllm_request_queue_time_seconds_bucket{model_name="m",engine="e",le="1"}': "0+95x30",
    'ray_vllm_request_queue_time_seconds_bucket{model_name="m",engine="e",le="10"}': "0+100x30",
    'ray_vllm_request_queue_time_seconds_bucket{model_name="m",engine="e",le="+Inf"}': "0+100x30",
    'ray_qwen_on_ray_router_time_to_first_token_seconds_bucket{model_name="m",le="5"}': "0+100x30",
    'ray_qwen_on_ray_router_time_to_first_token_seconds_bucket{model_name="m",le="30"}': "0+100x30",
    'ray_qwen_on_ray_router_time_to_first_token_seconds_bucket{model_name="m",le="+Inf"}': (
        "0+100x30"
    ),
}
LOUD = {
    "EngineDown": {"engine_up": "0x30"},
    "NoEngine": {"engine_up": "_x30"},
    "EngineRestarts": {"engine_restarts_total": "0x10 4x20"},
    "ServerErrors": {'status="503"': "0+50x30"},
    "QueueDelay": {'queue_time_seconds_bucket{model_name="m",engine="e",le="1"}': "0+80x30"},
    "CompilesWhileServing": {"engine_compiles_total": "0x25 1x5"},
    "PagesNearlyFull": {"engine_pages_used": "99x30"},
    "TimeToFirstToken": {'time_to_first_token_seconds_bucket{model_name="m",le="5"}': "0+90x30"},
}


def test_every_alert_has_a_case() -> None:
    assert set(LOUD) == set(alert_expressions())


@needs_promtool
@pytest.mark.parametrize("alert", [None, *LOUD])
def test_an_alert_fires_for_its_own_fault_and_for_no_other(
    alert: str | None, tmp_path: Path
) -> None:
    series = dict(QUIET)
    for part, values in LOUD.get(alert or "", {}).items():
        (name,) = [name for name in QUIET if part in name and f"{part}_" not in name]
        series[name] = values
    firing = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
    case = {
        "rule_files": [str(ROOT / "configs" / "prometheus" / "alerts.yml")],
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "29m",
                        "exp_samples": firing,
                    }
                ],
            }
        ],
    }
    path = tmp_path / "case.yml"
    path.write_text(yaml.safe_dump(case))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
