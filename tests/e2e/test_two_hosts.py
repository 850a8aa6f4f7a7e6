"""Two hosts with an address, a hostname and processes of their own serve one model together."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from network_hosts import ROOT, NetworkHost, hosts_or_skip, ray_environment, start_ray

from cluster.nodes import NODE_RANK_LABEL

pytestmark = [pytest.mark.slow, pytest.mark.namespaces, pytest.mark.timeout(900)]

logger = logging.getLogger(__name__)

CONFIG = ROOT / "configs" / "demo-cpu.yaml"
CLIENT = Path(__file__).with_name("chat_client.py")
QUESTION = "Why is the sky blue?"
NUM_TOKENS, NUM_LONG_TOKENS = 24, 64
START_TIMEOUT_S = 400
RECOVERY_TIMEOUT_S = 240
PORT = 8000
WORKER_TITLE = "^ray::HostWorker"

ENVIRONMENT = ray_environment()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[NetworkHost]]:
    with hosts_or_skip(2, tmp_path) as made:
        yield made


def two_host_fields(checkpoint: Path) -> dict[str, Any]:
    """The engine over two hosts; in float32, so that answers repeat exactly."""
    return {
        "model_path": str(checkpoint),
        "served_model_name": "smollm2-135m-instruct",
        "device": "cpu",
        "nnodes": 2,
        "tp_size": 2,
        "dtype": "float32",
        "context_length": 512,
        "max_total_tokens": 2048,
        "max_running_requests": 2,
        "chunked_prefill_size": 64,
        # Two hosts share this machine's few cores, so beats may come late.
        "host_timeout_s": 15.0,
        "hold_timeout_s": RECOVERY_TIMEOUT_S,
    }


def write_config(folder: Path, checkpoint: Path) -> Path:
    """The demo's configuration over two hosts."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": "0.0.0.0", "port": PORT}
    config["applications"][0]["args"] |= two_host_fields(checkpoint)
    path = folder / "two-hosts.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ask(host: NetworkHost, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    """One streamed answer; its `error` is None if it came whole."""
    url = f"http://{host.address}:{PORT}/v1"
    printed = host.run(
        sys.executable, str(CLIENT), url, QUESTION, str(num_tokens), environment=ENVIRONMENT,
        timeout_s=320,
    )  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def wait_for_answer(host: NetworkHost, timeout_s: float, log: str) -> dict[str, Any]:
    """Ask until an answer comes whole."""
    deadline_s = time.monotonic() + timeout_s
    while (answer := ask(host))["error"] is not None:
        logger.info("not yet: %s", answer["error"])
        assert time.monotonic() < deadline_s, f"{answer['error']}\n{host.log(log)[-6000:]}"
        time.sleep(1)
    return answer


def test_killed_rank_comes_back_and_its_stream_goes_on(
    hosts: list[NetworkHost], demo_checkpoint: Path, tmp_path: Path
) -> None:
    head, other = hosts
    started_s = time.monotonic()
    each = ["--num-cpus=1", "--object-store-memory=100000000"]
    head_flags = ["--head", "--port=6379", "--include-dashboard=false"]
    for rank, flags in enumerate([head_flags, [f"--address={head.address}:6379"]]):
        # The label makes the second host rank 1, as --node-rank=1 of the command line does.
        label = f"--labels={NODE_RANK_LABEL}={rank}"
        start_ray(hosts[rank], *each, *flags, label, environment=ENVIRONMENT)
    logger.info("Ray on both hosts after %.1f s", time.monotonic() - started_s)

    config = write_config(tmp_path, demo_checkpoint)
    served_s = time.monotonic()
    head.start(
        "serve",
        "run",
        f"--address={head.address}:6379",
        str(config),
        environment=ENVIRONMENT,
        log="serve.log",
    )
    expected = wait_for_answer(head, START_TIMEOUT_S, "serve.log")
    assert expected["num_compiles"] == 0
    logger.info("first answer %.1f s after `serve run`", time.monotonic() - served_s)
    assert expected["text"]
    assert [len(host.pids(WORKER_TITLE)) for host in hosts] == [1, 1], "one rank on each host"

    whole = ask(head, NUM_LONG_TOKENS)
    long_answer = head.start(
        sys.executable, str(CLIENT), f"http://{head.address}:{PORT}/v1", QUESTION,
        str(NUM_LONG_TOKENS), environment=ENVIRONMENT, log="long.log",
    )  # fmt: skip
    deadline_s = time.monotonic() + 60
    while "first" not in head.log("long.log"):
        assert time.monotonic() < deadline_s, head.log("long.log")
        time.sleep(0.05)
    victim = other.pids(WORKER_TITLE)
    killed_s = time.monotonic()
    other.run("kill", "-9", str(victim[0]))
    long_answer.wait(RECOVERY_TIMEOUT_S)
    interrupted = json.loads(head.log("long.log").splitlines()[-1])
    logger.info("the running answer ended %.1f s after the kill", time.monotonic() - killed_s)
    assert interrupted["error"] is None, "a stream outlives its rank"
    assert interrupted["text"] == whole["text"]
    assert interrupted["num_compiles"] == 0
    assert ask(head)["text"] == expected["text"]
    assert other.pids(WORKER_TITLE) not in ([], victim), "rank 1 runs in a fresh process"


def test_same_command_on_both_hosts_serves_and_ends_with_rank_0(
    hosts: list[NetworkHost], demo_checkpoint: Path
) -> None:
    head, other = hosts
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in two_host_fields(demo_checkpoint).items()
    ]
    command = [sys.executable, "-m", "serve_app", *flags, f"--dist-init-addr={head.address}:10011"]
    command += ["--host=0.0.0.0", f"--port={PORT}"]
    started_s = time.monotonic()
    processes = [
        host.start(*command, f"--node-rank={rank}", environment=ENVIRONMENT, log="serve_app.log")
        for rank, host in enumerate(hosts)
    ]
    answer = wait_for_answer(head, START_TIMEOUT_S, "serve_app.log")
    assert answer["num_compiles"] == 0
    logger.info("first answer %.1f s after the commands", time.monotonic() - started_s)
    assert answer["text"]
    assert [len(host.pids(WORKER_TITLE)) for host in hosts] == [1, 1], "one rank on each host"

    main_process = head.pids("python.* -m serve_app")[0]
    head.run("kill", "-TERM", str(main_process))
    assert [process.wait(120) for process in processes] == [0, 0], other.log("serve_app.log")
    assert [host.pids("raylet|gcs_server|ray::") for host in hosts] == [[], []], (
        "nothing is left on either host"
    )
