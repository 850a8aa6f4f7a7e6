"""Measures the quickstart's start: seconds from command to first token, cold and warm, and memory.

    python benchmarks/bench_startup.py

Cold starts with an empty compilation cache, warm with the one that the cold start left. Checkpoint
and Python files come from the operating system's page cache in both; environment and demo model are
made beforehand. Where the time goes is what the quickstart itself prints of its steps. Memory is
the peak over all processes of the start, sampled once a second, shared pages counted once.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from scripts.demo_model import ensure_demo_model

QUICKSTART = Path(__file__).resolve().parent.parent / "scripts" / "quickstart"
SAMPLE_PERIOD_S = 1.0
TIMEOUT_S = 900.0
STEP = re.compile(r"✓ (\S+) .* ([0-9.]+) s$")
FIRST_TOKEN = re.compile(r"the first after ([0-9]+) ms")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=1, help="host processes; default: 1")
    parser.add_argument("--repeat", type=int, default=1, help="warm starts; default: 1")
    arguments = parser.parse_args()
    ensure_demo_model()
    with tempfile.TemporaryDirectory(prefix="qwen-on-ray-cache-") as cache:
        for start in ["cold"] + ["warm"] * arguments.repeat:
            figures = {"start": start, "hosts": arguments.hosts}
            print(json.dumps(figures | measure(arguments.hosts, cache)), flush=True)
    return 0


def measure(hosts: int, cache: str) -> dict[str, Any]:
    """Start and stop the quickstart once.

    Returns:
        Seconds from command to ready and to the first token, peak of memory in megabytes until
        then, and seconds by step.

    Raises:
        RuntimeError: It ended without an answer, or took too long.
    """
    start_s = time.monotonic()
    process = subprocess.Popen(
        [str(QUICKSTART), "--hosts", str(hosts)],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    has_answer = threading.Event()
    memory = MemoryPeak(process.pid, has_answer)
    too_late = threading.Timer(TIMEOUT_S, process.kill)
    too_late.start()
    lines: list[str] = []
    ready_s = first_token_s = 0.0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.lstrip().startswith("You "):
                ready_s = time.monotonic() - start_s
            elif match := FIRST_TOKEN.search(line):
                first_token_s = ready_s + int(match[1]) / 1000
                break
        else:
            raise RuntimeError("the quickstart gave no answer:\n" + "\n".join(lines[-20:]))
    finally:
        too_late.cancel()
        has_answer.set()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return {
        "ready_s": round(ready_s, 1),
        "first_token_s": round(first_token_s, 1),
        "peak_memory_mb": round(memory.read() / 1e6),
        "steps_s": {match[1]: float(match[2]) for line in lines if (match := STEP.search(line))},
    }


class MemoryPeak:
    """The most memory that a process and its descendants had at one time.

    Pages are counted in proportional shares; reading those takes milliseconds a process, hence
    once a second, in a thread.
    """

    def __init__(self, pid: int, end: threading.Event) -> None:
        self._parent = psutil.Process(pid)
        self._end = end
        self._peak_bytes = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def read(self) -> int:
        """The peak in bytes, after the end."""
        self._thread.join()
        return self._peak_bytes

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_PERIOD_S):
            total = 0
            try:
                family = [self._parent, *self._parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self._peak_bytes = max(self._peak_bytes, total)


if __name__ == "__main__":
    sys.exit(main())
