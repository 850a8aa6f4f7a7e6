"""The quickstart as a newcomer runs it: an answer on the terminal, and nothing left behind."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from listeners import open_ports, undocumented

from cluster.ray_node import has_haproxy

QUICKSTART = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for the sockets that Ray puts below it."""
    with tempfile.TemporaryDirectory(prefix="qs-", dir="/tmp") as name:
        yield Path(name)


@contextmanager
def started(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The script under way; a test that fails leaves nothing of it behind, either."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(QUICKSTART), *words],
        # The token as the launcher makes it.
        env=os.environ
        | {
            "TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)


def read_until(words: str, process: subprocess.Popen[str]) -> str:
    """What it prints up to the line with these words."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if words in line:
            return output
    pytest.fail(output)


def processes_of(folder: Path) -> list[str]:
    """Every process of that Ray: each has the folder in its arguments or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            command, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if any(str(folder) in word for word in [*command, *environment.values()]):
            found.append(" ".join(command)[:200])
    return found


def test_quickstart_prints_an_answer_and_leaves_no_process(
    demo_checkpoint: Path, short_folder: Path
):
    with started(
        short_folder, "--exit", "--prompt", "What is the capital of France?"
    ) as quickstart:
        output, _ = quickstart.communicate(timeout=800)

    assert quickstart.returncode == 0, output
    assert "Paris" in output.partition("What is the capital of France?")[2], output
    assert processes_of(short_folder) == []
    assert list(short_folder.iterdir()) == []


def test_quickstart_over_two_hosts_opens_no_port_that_the_security_page_lacks(
    demo_checkpoint: Path, short_folder: Path
):
    # Two processes on one small machine make some five tokens a second.
    words = ("--hosts", "2", "--max-tokens", "12", "--prompt", "What is the capital of France?")
    with started(short_folder, *words) as quickstart:
        output = read_until("Serving until Ctrl-C", quickstart)
        root = psutil.Process(quickstart.pid)
        opened = open_ports([root, *root.children(recursive=True)])
        quickstart.send_signal(signal.SIGINT)
        output += quickstart.communicate(timeout=60)[0]

    assert quickstart.returncode == 0, output
    assert "Paris" in output.partition("What is the capital of France?")[2], output
    assert processes_of(short_folder) == []
    assert list(short_folder.iterdir()) == []
    assert undocumented(opened.values()) == []
    expected = {"gcs_server", "raylet", *(["haproxy"] if has_haproxy() else [])}
    assert expected <= set(opened.values()), "not all of them were seen"
    # What people and programs are told to use is for this machine alone.
    told = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", output)}
    assert len(told) == 2
    assert told.isdisjoint(opened), opened


def test_interrupted_start_leaves_no_process_and_fails(demo_checkpoint: Path, short_folder: Path):
    with started(short_folder) as quickstart:
        output = read_until("dashboard on", quickstart)
        assert processes_of(short_folder), output
        quickstart.send_signal(signal.SIGINT)
        rest, _ = quickstart.communicate(timeout=60)

    assert quickstart.returncode == 1, output + rest
    assert "interrupted before the answer came" in rest
    assert processes_of(short_folder) == []


def test_port_that_is_taken_is_named(short_folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started(short_folder, "--port", str(port)) as quickstart:
            output, _ = quickstart.communicate(timeout=120)

    assert quickstart.returncode == 1
    assert f"--port={port} cannot be used" in output
