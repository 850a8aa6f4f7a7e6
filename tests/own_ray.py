"""A Ray of the tests' own; to be imported before ray is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_environment import set_ray_environment

set_ray_environment()

_TESTS = Path(__file__).parent
_START_TIMEOUT_S = 270


@contextmanager
def own_ray(num_cpus: int = 2) -> Iterator[None]:
    """Join a new Ray with a temporary folder of its own, and two CPUs, as a laptop has.

    Args:
        num_cpus: That Ray counts, whatever the machine has.
    """
    import ray

    from cluster.addresses import free_port
    from cluster.ray_node import start_node

    host = ray.util.get_node_ip_address()
    port = free_port(host)
    arguments = ["--head", "--node-ip-address", host, "--port", str(port)]
    arguments += ["--num-cpus", str(num_cpus)]
    arguments += ["--object-store-memory", "100000000", "--include-dashboard", "false"]
    arguments += ["--ray-client-server-port", str(free_port(host))]
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    node = start_node(arguments, labels={}, what="Ray did not start", deadline_s=deadline_s)
    try:
        ray.init(
            address=f"{host}:{port}",
            log_to_driver=False,
            # Where host programs of the tests lie.
            runtime_env={"env_vars": {"PYTHONPATH": f"{_TESTS / 'cluster'}:{_TESTS.parent}"}},
        )
        yield
    finally:
        ray.shutdown()
        node.stop()
