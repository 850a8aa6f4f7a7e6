"""Hosts out of Linux namespaces: each with an address, a hostname and processes of its own.

    switch (network namespace, a bridge)
      ├── eth0 of the first host, 10.213.77.2
      └── eth0 of the second, 10.213.77.3

Nothing is added to the machine's own network. The file system is the machine's, but for the folders
below, /etc/hosts and the folder in which who logs in finds himself. Needs root and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from ray_environment import SAME_NICENESS

ROOT = Path(__file__).resolve().parents[2]

# Names carry our process id, so that two runs of the tests do not meet.
_PREFIX = f"qor{os.getpid()}"
_SWITCH = f"{_PREFIX}-switch"
_SUBNET = "10.213.77"
_RAY_START_TIMEOUT_S = 180.0
_OWN_FOLDERS = (Path("/dev/shm"), Path("/tmp/ray"), Path("/tmp/haproxy-serve"))


class HostsUnavailableError(Exception):
    """This machine cannot make namespaces; says why."""


class NetworkHost:
    """One host; `end` is its power cut.

    Attributes:
        home: Root's home for who logs in; `run` and `start` keep the caller's HOME.
    """

    def __init__(self, index: int, folder: Path) -> None:
        self.name = f"{_PREFIX}-{index}"
        self.address = f"{_SUBNET}.{index + 2}"
        self.home = folder / f"{self.name}-home"
        self._folder = folder
        self._init: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._children: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        """Make the host's network namespace and plug it into the switch."""
        _run("ip", "netns", "add", self.name)
        plug = f"to-{self.name}"
        peer = ["type", "veth", "peer", "name", "eth0", "netns", self.name]
        _run("ip", "-n", _SWITCH, "link", "add", plug, *peer)
        _run("ip", "-n", _SWITCH, "link", "set", plug, "master", "bridge", "up")
        _run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _run("ip", "-n", self.name, "link", "set", "eth0", "up")
        _run("ip", "-n", self.name, "link", "set", "lo", "up")

    def boot(self) -> None:
        """Start the host's first process, to which all its others are children."""
        booted = self._folder / f"{self.name}-booted"
        booted.unlink(missing_ok=True)
        self.home.mkdir(exist_ok=True)
        users = self._folder / f"{self.name}-passwd"
        root, _, others = Path("/etc/passwd").read_text().partition("\n")
        fields = root.split(":")
        fields[5] = str(self.home)
        users.write_text(f"{':'.join(fields)}\n{others}")
        mounts = " && ".join(f"mount -t tmpfs tmpfs {folder}" for folder in _OWN_FOLDERS)
        # A shell, because the first process must collect children that lost their parent.
        setup = (
            f"mount --bind {self._folder / 'hosts'} /etc/hosts && "
            f"mount --bind {users} /etc/passwd && {mounts} && hostname {self.name} && "
            f"touch {booted} && {{ sleep infinity & wait; }}"
        )
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *unshare, "sh", "-c", setup],
            stderr=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            if self._init.poll() is not None:
                break
            if booted.exists():
                self._init_pid = int(children.read_text().split()[0])
                return
            time.sleep(0.05)
        raise HostsUnavailableError(f"the first process of {self.name} did not start")

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` on this host, said on the machine."""
        namespaces = ["--mount", "--pid", "--uts", "--net"]
        return ["nsenter", "--target", str(self._init_pid), *namespaces, "--", *command]

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, timeout_s: float = 120
    ) -> str:
        """Run a command on this host and return what it printed.

        Raises:
            AssertionError: It failed; with what it printed, errors included.
        """
        ended = subprocess.run(
            self.command(command),
            env=_on_a_host(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            text=True,
        )
        assert ended.returncode == 0, f"{command} on {self.name}:\n{ended.stdout[-4000:]}"
        return ended.stdout

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, log: str
    ) -> subprocess.Popen[bytes]:
        """Start a command that goes on; it ends with the host. Its output goes to `log`."""
        with (self._folder / f"{self.name}-{log}").open("wb") as output:
            child = subprocess.Popen(
                self.command(command),
                env=_on_a_host(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._children.append(child)
        return child

    def log(self, log: str) -> str:
        """What a started command printed so far."""
        return (self._folder / f"{self.name}-{log}").read_text(errors="replace")

    def pids(self, pattern: str) -> list[int]:
        """Processes of this host, by the host's own numbering, whose command line matches."""
        found = subprocess.run(
            self.command(["pgrep", "-f", pattern]), stdout=subprocess.PIPE, check=False, text=True
        )
        return [int(pid) for pid in found.stdout.split()]

    def disconnect(self) -> None:
        """Cut the host's link; nobody is told."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "down")

    def connect_again(self) -> None:
        """Mend the link that `disconnect` cut."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "up")

    def end(self) -> None:
        """Kill every process of the host at once."""
        if self._init_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init_pid, signal.SIGKILL)
        for process in [*self._children, *([self._init] if self._init else [])]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self._init_pid = 0


def ray_environment() -> dict[str, str]:
    """What Ray's commands, and this project's, are given on hosts of one cluster."""
    return {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # One token on all hosts; else Ray writes one into the user's home.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        **SAME_NICENESS,
    }


def start_ray(host: NetworkHost, *flags: str, environment: Mapping[str, str]) -> None:
    """Start a Ray node on a host, at its own address.

    Raises:
        AssertionError: It did not start; with what it printed.
    """
    command = ["ray", "start", *flags, f"--node-ip-address={host.address}"]
    deadline_s = time.monotonic() + _RAY_START_TIMEOUT_S
    while True:
        try:
            host.run(*command, environment=environment)
            return
        except AssertionError as error:
            # `ray start` gives up after 30 s, which a busy machine may need.
            if "timed out" not in str(error) or time.monotonic() > deadline_s:
                raise


def _on_a_host(environment: Mapping[str, str] | None) -> dict[str, str]:
    """What a command on a host finds in its environment: nothing of a Ray on this machine."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**ours, **(environment or {})}


@contextlib.contextmanager
def hosts_or_skip(count: int, folder: Path) -> Iterator[list[NetworkHost]]:
    """Make hosts as `network_hosts` does; a test is skipped where there can be none."""
    try:
        with network_hosts(count, folder) as hosts:
            yield hosts
    except HostsUnavailableError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def network_hosts(count: int, folder: Path) -> Iterator[list[NetworkHost]]:
    """Make hosts that reach each other by address and by name, and end them afterwards.

    Args:
        folder: For their logs and /etc/hosts.

    Raises:
        HostsUnavailableError: Not root, or a tool or a right is missing.
    """
    if os.geteuid() != 0:
        raise HostsUnavailableError("needs root, to make network namespaces")
    for tool in ("ip", "unshare", "nsenter", "mount", "pgrep"):
        if shutil.which(tool) is None:
            raise HostsUnavailableError(f"needs the command {tool} (iproute2, util-linux, procps)")
    for each in _OWN_FOLDERS:
        each.mkdir(exist_ok=True)
    hosts = [NetworkHost(index, folder) for index in range(count)]
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    try:
        try:
            _run("ip", "netns", "add", _SWITCH)
            _run("ip", "-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", _SWITCH, "link", "set", "bridge", "up")
            for host in hosts:
                host.connect()
                host.boot()
        except subprocess.CalledProcessError as error:
            raise HostsUnavailableError(f"{error.cmd} failed: {error.stderr}") from error
        yield hosts
    finally:
        for host in hosts:
            host.end()
        _remove(hosts)


def _remove(hosts: list[NetworkHost]) -> None:
    for name in [*(host.name for host in hosts), _SWITCH]:
        if (Path("/run/netns") / name).exists():
            _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
