"""How the command line's flags form a Ray cluster: the same command on every host, and no more.

`--dist-init-addr` is where rank 0's head listens; `cluster.jax_rendezvous` has how the hosts of a
gang then meet in JAX. Must not know of gangs or of Serve.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import ray
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._raylet import Config as RayCoreConfig  # pyright: ignore[reportAttributeAccessIssue]

from cluster.addresses import bracketed, family_of, free_port
from cluster.nodes import NODE_RANK_LABEL, TPU_WORKER_LABEL, Node, read_cluster
from cluster.ray_node import HeadWatch, RayNode, start_node
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_HEAD_PATIENCE_S = 5.0
"""How long rank 0 may be unreachable before the other hosts take it for ended."""


class ClusterMembership:
    """This host's part in the Ray cluster that the command line formed.

    Attributes:
        rank: This host's; rank 0 serves.
        address: host:port of the cluster's head.
    """

    def __init__(
        self, rank: int, address: str, joined: tuple[RayNode, HeadWatch] | None = None
    ) -> None:
        self.rank = rank
        self.address = address
        self._joined = joined

    def wait(self, stop: threading.Event) -> None:
        """Lend this host, which is not rank 0, until rank 0 ends or `stop` is set.

        Raises:
            EngineError: This host's own Ray node ended first.
        """
        assert self._joined is not None, "rank 0 serves"
        node, head = self._joined
        while not stop.wait(_POLL_S):
            if not head.is_there(_HEAD_PATIENCE_S):
                logger.info("Rank 0 at %s has ended; so does rank %d.", self.address, self.rank)
                return
            # A node ends by itself, too, when its head is gone.
            if not node.is_alive() and head.is_there(0):
                node.check(f"Rank {self.rank} left the cluster at {self.address}")


@contextlib.contextmanager
def form_cluster(
    config: EngineConfig, stop: threading.Event | None = None
) -> Iterator[ClusterMembership]:
    """Form the Ray cluster that --dist-init-addr, --nnodes and --node-rank describe.

    Rank 0 starts the head and waits for the others, then this process is connected to it. The
    others join, and `wait`. Without --dist-init-addr, one node joins the cluster that RAY_ADDRESS
    names, or else makes its own. On leaving, only what was started here ends.

    Args:
        stop: Set by whoever wants the waiting to end early.

    Raises:
        ConfigError: Flags that contradict each other or this host.
        EngineError: The hosts did not meet within --dist-timeout-s.
    """
    stop = stop or threading.Event()
    if config.nnodes > 1 and config.dist_init_addr is None:
        raise ConfigError(
            f"--nnodes={config.nnodes} needs --dist-init-addr=HOST:PORT, an address of rank 0 that "
            "the other hosts can reach; the same on every host."
        )
    check_tpu_worker_id(os.environ.get("TPU_WORKER_ID"), config)
    if config.dist_init_addr is None and "RAY_ADDRESS" in os.environ:
        _connect(None)
        try:
            yield ClusterMembership(0, os.environ["RAY_ADDRESS"])
        finally:
            ray.shutdown()
    elif config.node_rank == 0:
        with _lead(config, stop) as membership:
            yield membership
    else:
        with _join(config, stop) as membership:
            yield membership


def check_tpu_worker_id(worker_id: str | None, config: EngineConfig) -> None:
    """Check that a TPU host's own number, None if it has none, is its rank.

    Raises:
        ConfigError: Naming both.
    """
    if config.device not in ("tpu", "auto") or config.nnodes == 1 or not worker_id:
        return
    if worker_id.isdigit() and int(worker_id) != config.node_rank:
        raise ConfigError(
            f"This host is worker {worker_id} of its TPU slice, but --node-rank={config.node_rank}."
            f" The worker's number is the rank: start it with --node-rank={worker_id}."
        )


def missing_ranks(nodes: tuple[Node, ...], num_hosts: int) -> list[int]:
    """Which ranks have not joined.

    Raises:
        ConfigError: Two hosts have one rank, or one a rank that is not its TPU worker's number.
    """
    joined: dict[int, Node] = {}
    for node in nodes:
        label = node.labels.get(NODE_RANK_LABEL)
        if label is None:
            continue
        rank = int(label)
        if rank in joined:
            raise ConfigError(
                f"Two hosts joined with --node-rank={rank}: {joined[rank].address} and "
                f"{node.address}. Give each host of the {num_hosts} its own, from 0 on."
            )
        joined[rank] = node
        worker_id = node.labels.get(TPU_WORKER_LABEL, label)
        if num_hosts > 1 and worker_id != label:
            raise ConfigError(
                f"{node.address} is worker {worker_id} of its TPU slice, but joined with "
                f"--node-rank={rank}. Start it with --node-rank={worker_id}."
            )
    return [rank for rank in range(num_hosts) if rank not in joined]


@contextlib.contextmanager
def _lead(config: EngineConfig, stop: threading.Event) -> Iterator[ClusterMembership]:
    host, port = _head_address(config)
    agree_on_authentication(config.nnodes)
    address = f"{bracketed(host)}:{port}"
    arguments = ["--head", "--node-ip-address", host, "--port", str(port)]
    arguments += ["--ray-client-server-port", str(free_port(host))]
    # The dashboard can run code, so nobody but this machine may reach it.
    arguments += ["--dashboard-host", "127.0.0.1"]
    deadline_s = time.monotonic() + config.dist_timeout_s
    node = _start_node(arguments, config, deadline_s, stop)
    try:
        _connect(address, node)
        _wait_for_ranks(config, address, deadline_s, stop, node)
        yield ClusterMembership(0, address)
    finally:
        ray.shutdown()
        node.stop()


@contextlib.contextmanager
def _join(config: EngineConfig, stop: threading.Event) -> Iterator[ClusterMembership]:
    assert config.dist_init_addr is not None
    host, port = _split(config.dist_init_addr)
    agree_on_authentication(config.nnodes)
    deadline_s = time.monotonic() + config.dist_timeout_s
    logger.info("Rank %d waits for rank 0 at %s.", config.node_rank, config.dist_init_addr)
    with contextlib.closing(HeadWatch(host, port)) as head:
        _wait_for_head(head, config.dist_init_addr, deadline_s, stop)
        own_address = _address_towards(host, port)
        logger.info("Rank %d joins from %s.", config.node_rank, own_address)
        arguments = ["--address", config.dist_init_addr, "--node-ip-address", own_address]
        node = _start_node(arguments, config, deadline_s, stop, head)
        try:
            yield ClusterMembership(config.node_rank, config.dist_init_addr, (node, head))
        finally:
            node.stop()


def _start_node(
    arguments: list[str],
    config: EngineConfig,
    deadline_s: float,
    stop: threading.Event,
    head: HeadWatch | None = None,
) -> RayNode:
    """Start this host's node.

    Args:
        head: The one to join, if this node is not it: without it there is nothing to wait for.
    """

    def pause() -> None:
        _wait(stop)
        if head is not None and not head.is_there(_HEAD_PATIENCE_S):
            raise EngineError(
                f"Rank 0 at {config.dist_init_addr} ended before rank {config.node_rank} had "
                "joined; what it printed says why."
            )

    return start_node(
        arguments,
        labels={NODE_RANK_LABEL: str(config.node_rank)},
        what=f"With --dist-timeout-s={config.dist_timeout_s:g} rank {config.node_rank} could not "
        "make its Ray node",
        deadline_s=deadline_s,
        pause=pause,
    )


def _wait(stop: threading.Event) -> None:
    if stop.wait(_POLL_S):
        raise EngineError("Stopped while the cluster formed.")


def _connect(address: str | None, node: RayNode | None = None) -> None:
    """Connect this process to a cluster, by default the one that RAY_ADDRESS names.

    Args:
        node: The node to belong to, where this machine may have others. Ray would take any of
            them that it finds first, even one that is about to give up.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = None if node is None else str(node.folder)
    ray.init(address=address, log_to_driver=False, _temp_dir=folder)
    if threading.current_thread() is threading.main_thread():
        # Ray puts handlers of its own in their place, and its SIGTERM ends in an abort.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _head_address(config: EngineConfig) -> tuple[str, int]:
    if config.dist_init_addr is None:
        own = ray.util.get_node_ip_address()
        return own, free_port(own)
    host, port = _split(config.dist_init_addr)
    # Ray must know its node by an address that a process can connect to.
    return (ray.util.get_node_ip_address() if host == "0.0.0.0" else host), port


def agree_on_authentication(num_hosts: int) -> None:
    """Choose how this cluster's members know each other, where the user has not.

    One node has a token of its own. Several can share one only if the user gives it to all of them,
    and one that is found on this host alone would keep the others out.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if num_hosts == 1 or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
        return
    logger.warning(
        "The Ray cluster runs without authentication: whoever reaches it can run code on it. Set "
        "the same RAY_AUTH_TOKEN on all %d hosts, or keep them in a network of their own.",
        num_hosts,
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Ray read its environment when it was imported.
    RayCoreConfig.initialize("")


def _wait_for_head(head: HeadWatch, address: str, deadline_s: float, stop: threading.Event) -> None:
    while not head.is_there(0):
        _wait(stop)
        if time.monotonic() > deadline_s:
            raise EngineError(
                f"Rank 0 did not appear at {address} within --dist-timeout-s. Start the same "
                "command with --node-rank=0 on that host, and let its firewall pass connections "
                "to that port and to those above 1023."
            )


def _wait_for_ranks(
    config: EngineConfig, address: str, deadline_s: float, stop: threading.Event, node: RayNode
) -> None:
    said: list[int] = []
    while missing := missing_ranks(read_cluster().nodes, config.nnodes):
        node.check(f"The cluster at {address} ended while it formed")
        if missing != said:
            logger.info("Waiting at %s for --node-rank %s.", address, _listed(missing))
            said = missing
        _wait(stop)
        if time.monotonic() > deadline_s:
            raise EngineError(
                f"{len(missing)} of {config.nnodes} hosts did not join {address} within "
                f"--dist-timeout-s={config.dist_timeout_s:g}: --node-rank {_listed(missing)}."
            )


def _address_towards(host: str, port: int) -> str:
    """The address of this machine from which packets go to `host`; sends none."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
