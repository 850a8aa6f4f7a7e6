"""Measures the quickstart's start: seconds from command to ready, cold and warm, and peak memory.

    python benchmarks/bench_startup.py

Cold starts with an empty compilation cache, warm with the one that the cold start left. Checkpoint
and Python files come from the operating system's page cache in both; the demo model is written
beforehand. Memory is the sum over all processes of the start, shared pages counted once.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from scripts.demo_model import ensure_demo_model

QUICKSTART = Path(__file__).resolve().parent.parent / "scripts" / "quickstart.py"
POLL_S = 0.25
TIMEOUT_S = 900.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=1, help="host processes; default: 1")
    hosts = parser.parse_args().hosts
    ensure_demo_model()
    with tempfile.TemporaryDirectory(prefix="qwen-on-ray-cache-") as cache:
        for start in ("cold", "warm"):
            seconds, peak_bytes = measure(hosts, cache)
            figures = {"start": start, "hosts": hosts, "ready_s": round(seconds, 1)}
            print(json.dumps(figures | {"peak_memory_mb": round(peak_bytes / 1e6)}), flush=True)
    return 0


def measure(hosts: int, cache: str) -> tuple[float, int]:
    """Start and stop the quickstart once.

    Returns:
        Seconds from command to ready, and the peak of memory in bytes until then.

    Raises:
        RuntimeError: It ended, or was not ready in time.
    """
    port = free_port()
    command = [sys.executable, str(QUICKSTART), "--port", str(port), "--hosts", str(hosts)]
    start_s = time.monotonic()
    process = subprocess.Popen(
        command,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak_bytes = 0
    try:
        while not is_ready(port):
            if process.poll() is not None:
                said = process.stderr.read() if process.stderr else ""
                raise RuntimeError(f"the quickstart ended with {process.returncode}: {said}")
            if time.monotonic() - start_s > TIMEOUT_S:
                raise RuntimeError(f"the quickstart was not ready within {TIMEOUT_S:.0f} s")
            peak_bytes = max(peak_bytes, family_bytes(process.pid))
            time.sleep(POLL_S)
        return time.monotonic() - start_s, max(peak_bytes, family_bytes(process.pid))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def is_ready(port: int) -> bool:
    try:
        url = f"http://127.0.0.1:{port}/health/ready"
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


def family_bytes(pid: int) -> int:
    """Memory of a process and all its descendants, in proportional shares of shared pages."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
