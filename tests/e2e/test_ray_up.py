"""`ray up configs/ray/local.yaml` from a laptop to two machines that it reaches by ssh alone."""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from network_hosts import HostsUnavailableError, NetworkHost, network_hosts

pytestmark = [pytest.mark.slow, pytest.mark.namespaces, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ray/local.yaml"
SSHD = Path("/usr/sbin/sshd")
NOT_COPIED = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[NetworkHost]]:
    """A laptop, which can only call, and two machines that answer by ssh."""
    for tool in ("ssh", "ssh-keygen", "rsync", str(SSHD)):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (openssh-server, rsync)")
    try:
        with network_hosts(3, tmp_path) as made:
            yield made
    except HostsUnavailableError as error:
        pytest.skip(str(error))


def make_key(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def listen_to_ssh(host: NetworkHost, host_key: Path, user_key: Path) -> None:
    """Let those log in who have the user's key."""
    # Where sshd locks up what it has not let in yet; a machine that never ran it lacks it.
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "HostKey": host_key,
        "AuthorizedKeysFile": user_key.with_suffix(".pub"),
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        # The folder of a test lies in /tmp, where others may write.
        "StrictModes": "no",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    host.start(str(SSHD), "-D", "-e", "-f", "/dev/null", *words, log="sshd.log")


def test_local_cluster_comes_up_by_ssh_and_keeps_strangers_out(
    hosts: list[NetworkHost], tmp_path: Path
) -> None:
    laptop, head, worker = hosts
    host_key, user_key = make_key(tmp_path / "host_key"), make_key(tmp_path / "user_key")
    for host in (head, worker):
        listen_to_ssh(host, host_key, user_key)
        # These machines have an image with the packages in; `scripts/setup` may not download here.
        (host.home / ".bashrc").write_text(f"export UV_PROJECT_ENVIRONMENT={sys.prefix}\n")

    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_COPIED))
    config = yaml.safe_load((checkout / CONFIG).read_text())
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(user_key)}
    (checkout / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))

    def on_laptop(command: str, timeout_s: float = 240) -> str:
        return laptop.run(
            "bash",
            "-c",
            f"cd {checkout} && {command}",
            environment={
                "HOME": str(laptop.home),
                "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
                "RAY_USAGE_STATS_ENABLED": "0",
            },
            timeout_s=timeout_s,
        )

    on_laptop("ray get-auth-token --generate")
    started_s = time.monotonic()
    printed = on_laptop(f"ray up --yes --no-config-cache {CONFIG}")
    logger.info("`ray up` took %.1f s", time.monotonic() - started_s)
    logger.debug("%s", printed)
    seen = on_laptop(f"ray exec {CONFIG} 'python tests/e2e/cluster_probe.py 2'")
    logger.info("two nodes after %.1f s:\n%s", time.monotonic() - started_s, seen)
