"""Dashboard, alerts and documents against the one list of metrics."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dashboards import alert_expressions, own_expressions, ray_expressions, series_in

from cluster.metrics import ENGINE_METRICS, ROUTER_METRICS, ray_name

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


def test_dashboard_and_table_are_what_their_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_monitoring.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get prometheus")
@pytest.mark.parametrize(("kind", "name"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_prometheus_accepts_the_files(kind: str, name: str) -> None:
    path = ROOT / "configs" / "prometheus" / name
    done = subprocess.run(["promtool", "check", kind, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
