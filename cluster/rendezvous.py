"""How hosts find each other: by jax.distributed in a gang, by a Ray cluster on the command line.

`--dist-init-addr` is where the cluster forms; JAX's coordinator takes a fresh port of rank 0 for
each epoch, because a port of the last epoch may still be in use. Must not know of plans.
"""

import contextlib
import logging
import os
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

from cluster.placement import NODE_RANK_LABEL, TPU_WORKER_LABEL, Node, read_cluster
from cluster.ray_node import HeadWatch, RayNode
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_HEAD_PATIENCE_S = 5.0
"""How long rank 0 may be unreachable before the other hosts take it for ended."""


def free_port(address: str) -> int:
    """A TCP port of `address`, one of this machine's, that nothing listens on at present."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def join_jax_distributed(
    config: EngineConfig,
    *,
    rank: int,
    num_hosts: int,
    num_local_hosts: int,
    address: str,
    coordinator_address: str,
) -> None:
    """Join the gang's other hosts, with JAX's platform already chosen.

    Must come before anything that uses a JAX device, and once in a process.

    Args:
        config: `device` is not "auto" any more.
        rank: This host's, 0 to num_hosts - 1; rank 0 opens the coordinator.
        num_hosts: Hosts of the gang; one alone needs no coordinator.
        num_local_hosts: How many of them are processes of this machine, this one included.
        address: This host's own, by which the others reach it.
        coordinator_address: host:port on rank 0; the port is a fresh one for each epoch.

    Raises:
        ConfigError: This host's name does not lead to its address.
        EngineError: The others did not come within `dist_timeout_s`.
    """
    if num_hosts == 1:
        return
    # Here and not at the top, because the leader imports this file and must not import JAX.
    import jax

    if config.device == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        if num_local_hosts < num_hosts:
            check_own_hostname(address)
    logger.info("rank %d of %d joins the coordinator at %s", rank, num_hosts, coordinator_address)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator_address,
            num_processes=num_hosts,
            process_id=rank,
            initialization_timeout=int(config.dist_timeout_s),
            # The leader is quicker to notice; this ends a host that the leader cannot reach.
            heartbeat_timeout_seconds=max(10, int(4 * config.host_timeout_s)),
            coordinator_bind_address=coordinator_address if rank == 0 else None,
        )
    except RuntimeError as error:
        raise EngineError(
            f"Rank {rank} on {socket.gethostname()} ({address}) did not meet the other "
            f"{num_hosts - 1} at {coordinator_address} within {config.dist_timeout_s:.0f} s. Check "
            "that every host can open connections to that address, or raise --dist-timeout-s. "
            f"JAX says: {error}"
        ) from error


def check_own_hostname(address: str) -> None:
    """Check that this host's name resolves to where the others can reach it.

    Gloo, which carries collectives between CPU hosts, listens where the host's own name leads.

    Raises:
        ConfigError: Naming the line that /etc/hosts needs.
    """
    hostname = socket.gethostname()
    try:
        resolved = socket.gethostbyname(hostname)
    except OSError:
        resolved = None
    if resolved == address:
        return
    raise ConfigError(
        f"This host's name, {hostname}, resolves to {resolved or 'nothing'}, not to its address, "
        f"{address}: other hosts could not reach it. Add the line '{address} {hostname}' to its "
        "/etc/hosts, before any other line with that name."
    )


class ClusterMembership:
    """This host's part in the Ray cluster that the command line formed.

    Attributes:
        rank: This host's; rank 0 serves.
        address: host:port of the cluster's head.
    """

    def __init__(self, rank: int, address: str, node: RayNode | None) -> None:
        self.rank = rank
        self.address = address
        self._node = node

    def wait(self, stop: threading.Event) -> None:
        """Lend this host to the cluster until rank 0 ends or `stop` is set.

        Raises:
            EngineError: This host's own Ray node ended first.
        """
        host, port = _split(self.address)
        head = HeadWatch(host, port)
        try:
            while not stop.wait(_POLL_S):
                if not head.is_there(_HEAD_PATIENCE_S):
                    logger.info("Rank 0 at %s has ended; so does rank %d.", self.address, self.rank)
                    return
                if self._node is not None and not self._node.is_alive():
                    # A node ends by itself, too, when its head is gone.
                    if not head.is_there(0):
                        continue
                    self._node.check(f"Rank {self.rank} left the cluster at {self.address}")
        finally:
            head.close()


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
        ray.init(log_to_driver=False)
        try:
            yield ClusterMembership(0, os.environ["RAY_ADDRESS"], None)
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
    _agree_on_authentication(config.nnodes)
    address = f"{_bracketed(host)}:{port}"
    arguments = ["--head", "--node-ip-address", host, "--port", str(port)]
    arguments += ["--ray-client-server-port", str(free_port(host))]
    # The dashboard can run code, so nobody but this machine may reach it.
    arguments += ["--dashboard-host", "127.0.0.1"]
    node = RayNode(arguments, labels={NODE_RANK_LABEL: "0"}, environment={})
    try:
        deadline_s = time.monotonic() + config.dist_timeout_s
        _wait_for_head(host, port, deadline_s, stop, node)
        ray.init(address=address, log_to_driver=False)
        _wait_for_ranks(config, address, deadline_s, stop, node)
        yield ClusterMembership(0, address, node)
    finally:
        ray.shutdown()
        node.stop()


@contextlib.contextmanager
def _join(config: EngineConfig, stop: threading.Event) -> Iterator[ClusterMembership]:
    assert config.dist_init_addr is not None
    host, port = _split(config.dist_init_addr)
    _agree_on_authentication(config.nnodes)
    deadline_s = time.monotonic() + config.dist_timeout_s
    logger.info("Rank %d waits for rank 0 at %s.", config.node_rank, config.dist_init_addr)
    _wait_for_head(host, port, deadline_s, stop, None)
    own_address = _address_towards(host, port)
    node = RayNode(
        ["--address", config.dist_init_addr, "--node-ip-address", own_address],
        labels={NODE_RANK_LABEL: str(config.node_rank)},
        environment={},
    )
    try:
        logger.info("Rank %d joins from %s.", config.node_rank, own_address)
        yield ClusterMembership(config.node_rank, config.dist_init_addr, node)
    finally:
        node.stop()


def _head_address(config: EngineConfig) -> tuple[str, int]:
    if config.dist_init_addr is None:
        own = ray.util.get_node_ip_address()
        return own, free_port(own)
    host, port = _split(config.dist_init_addr)
    # Ray must know its node by an address that a process can connect to.
    return (ray.util.get_node_ip_address() if host == "0.0.0.0" else host), port


def _agree_on_authentication(num_hosts: int) -> None:
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


def _wait_for_head(
    host: str, port: int, deadline_s: float, stop: threading.Event, node: RayNode | None
) -> None:
    head = HeadWatch(host, port)
    try:
        while not head.is_there(0):
            if node is not None:
                node.check(f"Rank 0 could not open the cluster at {host}:{port}")
            if stop.wait(_POLL_S):
                raise EngineError("Stopped while the cluster formed.")
            if time.monotonic() > deadline_s:
                raise EngineError(
                    f"Rank 0 did not appear at {host}:{port} within --dist-timeout-s. Start the "
                    "same command with --node-rank=0 on that host, and let its firewall pass "
                    f"connections to port {port} and above 1023."
                )
    finally:
        head.close()


def _wait_for_ranks(
    config: EngineConfig, address: str, deadline_s: float, stop: threading.Event, node: RayNode
) -> None:
    said: list[int] = []
    while missing := missing_ranks(read_cluster().nodes, config.nnodes):
        node.check(f"The cluster at {address} ended while it formed")
        if missing != said:
            logger.info("Waiting at %s for --node-rank %s.", address, _listed(missing))
            said = missing
        if stop.wait(_POLL_S):
            raise EngineError("Stopped while the cluster formed.")
        if time.monotonic() > deadline_s:
            raise EngineError(
                f"{len(missing)} of {config.nnodes} hosts did not join {address} within "
                f"--dist-timeout-s={config.dist_timeout_s:g}: --node-rank {_listed(missing)}."
            )


def _address_towards(host: str, port: int) -> str:
    """The address of this machine from which packets go to `host`; sends none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
