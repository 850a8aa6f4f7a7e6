"""A Ray and a Serve of a benchmark's own, in a process of their own.

Ray reads its environment as it is imported, so whoever measures stays outside: the benchmark runs
itself once more with `--serve`, and that process serves until its standard input ends.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from benchmarks.streaming.client import HOST
from cluster.addresses import free_port
from cluster.ray_node import RayNode, raise_file_limit, start_node

ROOT = Path(__file__).resolve().parents[2]
RAY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60.0
QUIET = LoggingConfig(enable_access_log=False)


@dataclass(frozen=True, slots=True)
class Server:
    """The process beside this one, and the port at which it answers HTTP."""

    pid: int
    port: int


@contextmanager
def server_beside(script: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run `script --serve` with this process's own arguments until the block ends.

    Args:
        script: Must call `tell_port_and_wait`.
        environment: Variables of Ray and all its workers, beside this process's own.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    process = subprocess.Popen(
        [sys.executable, script, "--serve", *sys.argv[1:]],
        env=os.environ | token | dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        # Ray prints there, too: of a server whose end is not over, say.
        port = next((int(line) for line in process.stdout if line.strip().isdigit()), None)
        if port is None:
            raise RuntimeError(f"the server ended with {process.wait()}")
        yield Server(process.pid, port)
    finally:
        _end(process)


def proxy_variables(proxy: str) -> dict[str, str]:
    """What makes Serve put its `python` proxy in front of the routers, and not HAProxy."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "0"} if proxy == "python" else {}


def read_pairs(pairs: list[str]) -> dict[str, str]:
    """Environment variables as they stand on a command line."""
    return dict(cast("tuple[str, str]", pair.split("=", 1)) for pair in pairs)


@contextmanager
def ray_and_serve(num_cpus: int = 2, python_path: str = str(ROOT)) -> Iterator[int]:
    """Join a Ray of our own with Serve in it; yields the HTTP port.

    Args:
        num_cpus: That Ray counts, whatever the machine has.
        python_path: Where its workers find modules.
    """
    raise_file_limit()
    node, address = _start_head(ray.util.get_node_ip_address(), num_cpus)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        )
        port = free_port(HOST)
        serve.start(http_options=HTTPOptions(host=HOST, port=port), logging_config=QUIET)
        yield port
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        node.stop()


def tell_port_and_wait(port: int) -> None:
    """Tell `server_beside` that all is up, and return when it has had enough."""
    print(port, flush=True)
    sys.stdin.read()


def _start_head(host: str, num_cpus: int) -> tuple[RayNode, str]:
    port = free_port(host)
    arguments = ["--head", "--node-ip-address", host, "--port", str(port)]
    arguments += ["--num-cpus", str(num_cpus)]
    arguments += ["--object-store-memory", "100000000", "--include-dashboard", "false"]
    arguments += ["--ray-client-server-port", str(free_port(host))]
    deadline_s = time.monotonic() + RAY_TIMEOUT_S
    node = start_node(arguments, labels={}, what="Ray did not start", deadline_s=deadline_s)
    return node, f"{host}:{port}"


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Stop the server politely, then whatever it left."""
    family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        print(f"left behind: {process}", file=sys.stderr)
        process.kill()
