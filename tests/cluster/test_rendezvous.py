"""How hosts meet: the command line's cluster, and what stands in the way of a gang."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from processes import descendants

from cluster.addresses import free_port
from cluster.jax_rendezvous import check_own_hostname
from cluster.nodes import NODE_RANK_LABEL, Node
from cluster.ray_node import HeadWatch
from cluster.rendezvous import check_tpu_worker_id, form_cluster, missing_ranks
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError

MEMBER = Path(__file__).with_name("cluster_member.py")

# Ray reads its environment when it is imported, so each choice is made in a process of its own.
CHOOSER = """
import logging, os, sys
from cluster.rendezvous import agree_on_authentication
from ray._private.authentication.authentication_utils import is_token_auth_enabled

logging.basicConfig(format="%(message)s")
agree_on_authentication(int(sys.argv[1]))
print(is_token_auth_enabled(), os.environ["RAY_AUTH_MODE"])
"""


def config(**fields: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model_path": "m", "nnodes": 2, "tp_size": 2, **fields})


def node(rank: int | None, address: str = "10.0.0.1", worker_id: int | None = None) -> Node:
    labels = {}
    if rank is not None:
        labels[NODE_RANK_LABEL] = str(rank)
    if worker_id is not None:
        labels["ray.io/tpu-worker-id"] = str(worker_id)
    return Node(node_id=address, address=address, resources={}, labels=labels)


def test_hostname_that_leads_elsewhere_is_refused_with_the_line_to_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "tpu-7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"Add the line '10\.0\.0\.7 tpu-7' to its /etc/hosts"):
        check_own_hostname("10.0.0.7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    check_own_hostname("10.0.0.7")


def test_rank_that_is_not_the_tpu_workers_number_is_refused_naming_both() -> None:
    with pytest.raises(ConfigError, match="worker 1 of its TPU slice, but --node-rank=0"):
        check_tpu_worker_id("1", config(device="tpu", node_rank=0))
    check_tpu_worker_id("1", config(device="tpu", node_rank=1))
    check_tpu_worker_id("1", config(device="cpu", node_rank=0))
    check_tpu_worker_id(None, config(device="tpu", node_rank=0))


@pytest.mark.parametrize(
    ("num_hosts", "settings", "mode", "is_warned"),
    [
        (2, {"RAY_AUTH_TOKEN": "0" * 64}, "True token", False),
        (2, {}, "False disabled", True),
    ],
)
def test_cluster_asks_for_a_token_wherever_all_hosts_can_have_it(
    num_hosts: int, settings: dict[str, str], mode: str, is_warned: bool, tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", CHOOSER, str(num_hosts)],
        # Ray may write a token into the user's home.
        env=kept | {"HOME": str(tmp_path)} | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == mode, done.stderr
    assert ("runs without authentication: whoever reaches it" in done.stderr) == is_warned


def test_ranks_that_have_not_joined_are_listed() -> None:
    assert missing_ranks((node(0), node(2, "10.0.0.2"), node(None)), 4) == [1, 3]


def test_two_hosts_of_one_rank_are_refused_naming_both() -> None:
    with pytest.raises(ConfigError, match=r"--node-rank=1: 10\.0\.0\.1 and 10\.0\.0\.2"):
        missing_ranks((node(1), node(1, "10.0.0.2")), 2)


def test_node_that_turns_out_to_be_another_tpu_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="is worker 0 of its TPU slice, but joined with"):
        missing_ranks((node(1, worker_id=0),), 2)


def test_several_nodes_need_an_address_to_meet_at() -> None:
    with (
        pytest.raises(ConfigError, match="--nnodes=2 needs --dist-init-addr"),
        form_cluster(config()),
    ):
        pass


def test_host_that_finds_no_rank_0_says_where_it_looked() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    alone = config(node_rank=1, dist_init_addr=address, dist_timeout_s=0.1)
    with (
        pytest.raises(EngineError, match=f"Rank 0 did not appear at {address}"),
        form_cluster(alone),
    ):
        pass


def test_host_that_is_still_joining_hears_of_rank_0s_end() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    host, port = address.split(":")
    # Something that answers like rank 0, which a Ray node cannot join, however long it tries.
    server = socket.create_server((host, int(port)))

    def end_rank_0() -> None:
        connection, _ = server.accept()
        server.close()
        connection.close()

    ending = threading.Thread(target=end_rank_0)
    ending.start()
    with (
        pytest.raises(EngineError, match=f"Rank 0 at {address} ended before rank 1 had joined"),
        form_cluster(config(node_rank=1, dist_init_addr=address)),
    ):
        pass
    ending.join()


def test_watch_notices_the_end_of_what_it_watches() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    watch = HeadWatch("127.0.0.1", server.getsockname()[1])
    assert watch.is_there(0)
    connection, _ = server.accept()
    assert watch.is_there(0)
    connection.close()
    server.close()
    assert watch.is_there(60), "it may be back within its patience"
    assert not watch.is_there(0)
    watch.close()


@pytest.fixture
def members() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for member in started:
        member.kill()
        member.wait()
        if member.stdout is not None:
            member.stdout.close()


def start_member(rank: int, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(MEMBER), str(rank), address],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(MEMBER.parents[2])},
    )


@pytest.mark.slow
def test_same_command_on_two_hosts_forms_a_cluster_that_ends_with_rank_0(
    members: list[subprocess.Popen[str]],
) -> None:
    own = ray.util.get_node_ip_address()
    address = f"{own}:{free_port(own)}"
    members += [start_member(rank, address) for rank in (1, 0)]
    rank_1, rank_0 = members
    assert rank_0.stdout is not None
    assert rank_1.stdout is not None
    # Ray prints there, too, on a machine that is slow.
    assert "0 sees 0 1\n" in iter(rank_0.stdout.readline, "")
    assert "1 has joined\n" in iter(rank_1.stdout.readline, "")
    ray_processes = {
        child: name for member in members for child, name in descendants(member.pid).items()
    }
    assert any("raylet" in name for name in ray_processes.values())
    ended_s = time.monotonic()
    rank_0.send_signal(signal.SIGTERM)
    assert rank_0.wait(60) == 0
    assert rank_1.wait(60) == 0
    assert time.monotonic() - ended_s < 60
    _, living = psutil.wait_procs(ray_processes, timeout=10)
    assert not living
