"""How the hosts of a gang meet in JAX: jax.distributed, and the name that it needs.

JAX's coordinator takes a fresh port of rank 0 for each epoch, because that of the last epoch may
still be in use. Knows nothing of Ray.
"""

import logging
import socket

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)


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
