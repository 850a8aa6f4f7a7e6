"""Two TPU slices of two hosts each, without TPUs; one loses a link, which Ray does not see."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_slices import TPU_HOST_FLAGS, tpu_variables
from network_hosts import ROOT, NetworkHost, hosts_or_skip, ray_environment, start_ray

pytestmark = [pytest.mark.slow, pytest.mark.namespaces, pytest.mark.timeout(400)]

logger = logging.getLogger(__name__)

GANG = Path(__file__).with_name("gang_on_slices.py")
SILENCE_S = 4.0
PORT = 6379

ENVIRONMENT = ray_environment() | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'cluster'}",
    # Else fake hosts would be asked for a metadata server, once for each fact.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[NetworkHost]]:
    with hosts_or_skip(5, tmp_path) as made:
        yield made


def start_ray_everywhere(head: NetworkHost, slices: dict[str, list[NetworkHost]]) -> None:
    """Ray on all hosts; the worker ids run against the order in which the hosts join."""
    flags = ["--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=1"]
    flags += ["--object-store-memory=80000000"]
    start_ray(head, *flags, environment=ENVIRONMENT)

    def join(place: tuple[str, int, NetworkHost]) -> None:
        name, worker_id, host = place
        environment = ENVIRONMENT | tpu_variables(name, worker_id, "2x4", "v6e-8")
        address = f"--address={head.address}:{PORT}"
        start_ray(host, address, *TPU_HOST_FLAGS, environment=environment)

    places = [
        (name, worker_id, host)
        for name, members in slices.items()
        for worker_id, host in reversed(list(enumerate(members)))
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(join, places))


def events(host: NetworkHost) -> list[dict[str, Any]]:
    lines = host.log("gang.log").splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"event"')]


def wait_for(host: NetworkHost, name: str, timeout_s: float) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = [event for event in events(host) if event["event"] == name]
        if found:
            return found[0]
        assert time.monotonic() < deadline_s, host.log("gang.log")[-4000:]
        time.sleep(0.1)


def test_gang_moves_to_the_other_slice_while_ray_still_takes_the_lost_host_for_alive(
    hosts: list[NetworkHost], tmp_path: Path
) -> None:
    head, *others = hosts
    slices = {"a": others[:2], "b": others[2:]}
    started_s = time.monotonic()
    start_ray_everywhere(head, slices)
    logger.info("Ray on five hosts after %.1f s", time.monotonic() - started_s)

    command = [sys.executable, str(GANG), str(tmp_path), str(SILENCE_S)]
    head.start(*command, environment=ENVIRONMENT, log="gang.log")
    first = wait_for(head, "first", 120)
    (name,) = set(first["slices"])
    assert first["worker_ids"] == [0, 1]
    assert first["addresses"] == [host.address for host in slices[name]]

    lost = slices[name][1]
    lost.disconnect()
    lost_s = time.monotonic()
    failed = wait_for(head, "failed", 30)
    assert f"({lost.address}) has been silent for" in failed["reason"]
    logger.info("noticed %.1f s after the cut", failed["at_s"] - lost_s)
    second = wait_for(head, "second", 60)
    logger.info("on the other slice %.1f s after the cut", second["at_s"] - lost_s)
    (other,) = set(second["slices"])
    assert {name, other} == {"a", "b"}
    assert second["worker_ids"] == [0, 1]
    assert second["addresses"] == [host.address for host in slices[other]]
    assert lost.address in second["alive"], "Ray still takes the lost host for alive"
    wait_for(head, "stopped", 60)
