"""A real Prometheus that scrapes what a test serves, with the project's own configuration."""

import json
import math
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from cluster.addresses import free_port

_CONFIGS = Path(__file__).parents[2] / "configs" / "prometheus"
_START_TIMEOUT_S = 30


class PrometheusServer:
    """Talks to a Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def query(self, expression: str) -> list[float]:
        """The values that a PromQL expression has at present; those that are no number left out."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer['error']}"
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def without_data(self, expressions: Sequence[str]) -> list[str]:
        """Those expressions that have no value at present."""
        return [expression for expression in expressions if not self.query(expression)]

    def health_of_targets(self) -> dict[str, list[str]]:
        """The state of each scraped address, by job."""
        targets = self._client.get("/api/v1/targets").json()["data"]["activeTargets"]
        health: dict[str, list[str]] = {}
        for target in targets:
            health.setdefault(target["scrapePool"], []).append(target["health"])
        return health

    def alerts(self) -> dict[str, str]:
        """The state of each alert rule, by name: inactive, pending or firing."""
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()


@contextmanager
def run_prometheus(
    directory: Path, *, ray_targets: Sequence[str], router: str
) -> Iterator[PrometheusServer]:
    """Run Prometheus by configs/prometheus, each second instead of each quarter of a minute.

    Args:
        directory: For its data; empty.
        ray_targets: What Ray would write into its discovery file.
        router: Host and port of /metrics.
    """
    config = yaml.safe_load((_CONFIGS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(_CONFIGS / name) for name in config["rule_files"]]
    by_ray, by_routers = config["scrape_configs"]
    discovery = directory / "discovery.json"
    discovery.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": list(ray_targets)}]))
    by_ray["file_sd_configs"] = [{"files": [str(discovery)]}]
    by_routers["static_configs"] = [{"targets": [router]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    server = PrometheusServer(f"http://{address}")
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not server.is_ready():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline_s, (directory / "log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(10)
