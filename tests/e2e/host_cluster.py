"""A Ray over hosts of network namespaces, with an application on it, and ways to break a host.

The head has Ray's controllers, the routers and the proxy; ranks and leaders run on the others, one
of which is to spare, so that a gang that lost a host goes on elsewhere.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import yaml
from network_hosts import NetworkHost, network_hosts, ray_environment, start_ray

RAY_PORT, HTTP_PORT = 6379, 8000
RANK_TITLE = "^ray::HostWorker"

_ENVIRONMENT = ray_environment()


class HostCluster:
    """The hosts and what runs on them.

    Args:
        hosts: The head first.
        random: Chooses what is hit.

    Attributes:
        base_url: Of the application, for who is in the head's network.
    """

    def __init__(self, hosts: Sequence[NetworkHost], random: Random) -> None:
        self._head, *self._workers = hosts
        self._random = random
        self._broken: NetworkHost | None = None
        self.base_url = f"http://{self._head.address}:{HTTP_PORT}"

    def start(self, folder: Path, name: str, args: Mapping[str, Any]) -> None:
        """Start Ray on all hosts, and deploy the application of `args`."""
        flags = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--num-cpus=1"]
        self._start_ray(self._head, flags)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._join, self._workers))
        application = {
            "name": name,
            "import_path": "serve_app:build",
            "route_prefix": "/",
            "args": dict(args),
            "deployments": [{"name": "Router", "ray_actor_options": _on_the_head()}],
        }
        config = {
            "proxy_location": "HeadOnly",
            "logging_config": {"enable_access_log": False},
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT},
            "applications": [application],
        }
        path = folder / "application.yaml"
        path.write_text(yaml.safe_dump(config))
        run = ["serve", "run", f"--address={self._head.address}:{RAY_PORT}", str(path)]
        self._head.start(*run, environment=_ENVIRONMENT, log="serve.log")

    def log(self) -> str:
        """What `serve run` printed so far."""
        return self._head.log("serve.log")

    def kill_host(self) -> None:
        """Kill every process of a host that has a rank at once, as a power cut does."""
        self._broken = self._one_with_a_rank()
        self._broken.end()

    def cut_link(self) -> None:
        """Cut the link of a host that has a rank; nobody is told."""
        self._broken = self._one_with_a_rank()
        self._broken.disconnect()

    def mend(self) -> None:
        """Boot the host that was broken anew, and let it join."""
        if self._broken is not None:
            self._broken.end()
            self._broken.connect_again()
            self._broken.boot()
            self._join(self._broken)
            self._broken = None

    def _one_with_a_rank(self) -> NetworkHost:
        found = [host for host in self._workers if host.pids(RANK_TITLE)]
        if not found:
            raise RuntimeError("no host has a rank: there is nothing to break")
        return self._random.choice(found)

    def _join(self, host: NetworkHost) -> None:
        self._start_ray(host, [f"--address={self._head.address}:{RAY_PORT}", "--num-cpus=1"])

    def _start_ray(self, host: NetworkHost, flags: Sequence[str]) -> None:
        memory = "--object-store-memory=80000000"
        start_ray(host, *flags, memory, environment=_ENVIRONMENT)


def _on_the_head() -> dict[str, Any]:
    """The routers' options, for the head alone."""
    from cluster.router import ROUTER_ENVIRONMENT  # not before Ray's environment is set

    return {
        "num_cpus": 0.2,
        "resources": {"node:__internal_head__": 0.001},
        "runtime_env": {"env_vars": dict(ROUTER_ENVIRONMENT)},
    }


@contextmanager
def host_cluster(num_workers: int, folder: Path, random: Random) -> Iterator[HostCluster]:
    """Make the hosts, and put this thread into the head's network meanwhile.

    Raises:
        HostsUnavailableError: This machine cannot make such hosts.
        RuntimeError: This Python cannot enter another network.
    """
    if sys.version_info < (3, 12):
        raise RuntimeError("Breaking hosts needs Python 3.12 or newer, for os.setns.")
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        with network_hosts(num_workers + 1, folder) as hosts:
            head = os.open(f"/run/netns/{hosts[0].name}", os.O_RDONLY)
            try:
                os.setns(head, os.CLONE_NEWNET)
                yield HostCluster(hosts, random)
            finally:
                os.setns(own, os.CLONE_NEWNET)
                os.close(head)
    finally:
        os.close(own)
