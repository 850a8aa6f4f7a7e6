"""`ray up configs/ray/local.yaml` from a laptop to two machines that it reaches by ssh alone."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from listeners import undocumented
from network_hosts import NetworkHost, hosts_or_skip
from tiny_tokenizer import write_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.namespaces, pytest.mark.timeout(600)]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "configs/ray/local.yaml"
CLIENT = Path(__file__).with_name("chat_client.py")
LISTENERS = Path(__file__).with_name("listeners.py")
MODEL = "smollm2-135m-instruct"
SERVE_TIMEOUT_S = 300
SSHD = Path("/usr/sbin/sshd")
SSH_SOCKETS = "ray_ssh_*/*/*"
"""Of `ray up`'s connections, which do not end in order when a host loses its power."""
NOT_COPIED = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[NetworkHost]]:
    """A laptop, which can only call, and two machines that answer by ssh."""
    for tool in ("ssh", "ssh-keygen", "rsync", str(SSHD)):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (openssh-server, rsync)")
    before = set(Path("/tmp").glob(SSH_SOCKETS))
    try:
        with hosts_or_skip(3, tmp_path) as made:
            yield made
    finally:
        for left in set(Path("/tmp").glob(SSH_SOCKETS)) - before:
            left.unlink()


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


def make_checkout(folder: Path, head: NetworkHost, worker: NetworkHost, key: Path) -> Path:
    """A copy of the project with the lines of the cluster file changed that say so, and a model."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    cluster = yaml.safe_load((folder / CLUSTER).read_text())
    cluster["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    (folder / CLUSTER).write_text(yaml.safe_dump(cluster, sort_keys=False))

    shutil.copytree(ROOT / "tests" / "data" / "tiny-qwen2", folder / "tiny")
    write_tiny_tokenizer(folder / "tiny")
    model = yaml.safe_load((folder / "configs" / "demo-cpu.yaml").read_text())
    model["http_options"]["host"] = "0.0.0.0"
    model["applications"][0]["args"] = {
        "model_path": "~/qwen-on-ray/tiny",
        "served_model_name": MODEL,
        "device": "cpu",
        "context_length": 256,
        "max_total_tokens": 1024,
        "max_running_requests": 2,
        "chunked_prefill_size": 32,
        "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
        # Three hosts share this machine's few cores, so beats may come late.
        "host_timeout_s": 15.0,
    }
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(model))
    return folder


def is_ready(client: NetworkHost, server: NetworkHost) -> bool:
    """Whether a client gets an answer that an engine is ready."""
    url = f"http://{server.address}:8000/health/ready"
    ask = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).status)"
    words = client.command([sys.executable, "-I", "-S", "-c", ask])
    asked = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return asked.stdout.strip() == "200"


def test_local_cluster_comes_up_by_ssh_serves_and_keeps_strangers_out(
    hosts: list[NetworkHost], tmp_path: Path
) -> None:
    laptop, head, worker = hosts
    host_key, user_key = make_key(tmp_path / "host_key"), make_key(tmp_path / "user_key")
    for host in (head, worker):
        listen_to_ssh(host, host_key, user_key)
        # These machines have an image with the packages in; `scripts/setup` may not download here.
        (host.home / ".bashrc").write_text(f"export UV_PROJECT_ENVIRONMENT={sys.prefix}\n")
    checkout = make_checkout(tmp_path / "checkout", head, worker, user_key)
    environment = {
        "HOME": str(laptop.home),
        "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    def on_laptop(command: str) -> str:
        words = ["bash", "-c", f"cd {checkout} && {command}"]
        return laptop.run(*words, environment=environment, timeout_s=240)

    started_s = time.monotonic()
    on_laptop("ray get-auth-token --generate")
    on_laptop(f"ray up --yes --no-config-cache {CLUSTER}")
    # The model starts while the worker joins.
    serving = laptop.start(
        "bash",
        "-c",
        f"cd {checkout} && ray exec {CLUSTER} 'serve run configs/tiny.yaml'",
        environment=environment,
        log="serve.log",
    )
    printed = on_laptop(f"ray exec {CLUSTER} 'python tests/e2e/cluster_probe.py 2'")
    logger.info("a head and a worker %.1f s after `ray up`", time.monotonic() - started_s)
    seen = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    whole = {"has_code": True, "has_haproxy": True}
    assert seen["nodes"] == {head.address: whole, worker.address: whole}
    assert seen["dashboard"] == {"none": 401, "wrong": 403, "right": 200}
    assert "InvalidAuthToken" in seen["stranger"]
    # What leads to the dashboard is ssh alone; GCS answers, which shows that the way is open.
    laptop.run("bash", "-c", f": </dev/tcp/{head.address}/6379")
    laptop.run("bash", "-c", f"! : </dev/tcp/{head.address}/8265")

    deadline_s = time.monotonic() + SERVE_TIMEOUT_S
    while not is_ready(laptop, head):
        is_serving = serving.poll() is None and time.monotonic() < deadline_s
        assert is_serving, laptop.log("serve.log")[-6000:]
        time.sleep(0.5)
    logger.info("ready %.1f s after `ray up`", time.monotonic() - started_s)
    for host in (head, worker):
        opened = json.loads(host.run(sys.executable, str(LISTENERS)))
        assert opened.pop("22")
        assert undocumented(opened.values()) == []
        assert "raylet" in opened.values(), "not all of them were seen"
    url = f"http://{head.address}:8000/v1"
    printed = laptop.run(sys.executable, str(CLIENT), url, "Why?", "8", environment=environment)
    answer = json.loads(printed.splitlines()[-1])
    assert answer["error"] is None
    assert answer["text"]
    assert answer["num_compiles"] == 0
