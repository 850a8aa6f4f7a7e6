import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import threading
import numpy as np
from engine.config import EngineConfig
from engine.runner.platform import configure_jax, keep_freed_memory

def faults_of_ten_allocations():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

configure_jax(EngineConfig(model_path="any", device="cpu"))
mapped = faults_of_ten_allocations()
keep_freed_memory()
kept = []
thread = threading.Thread(
    target=lambda: kept.extend([faults_of_ten_allocations(), faults_of_ten_allocations()])
)
thread.start()
thread.join()
print(mapped, kept[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_comes_back_without_page_faults_in_any_thread(tmp_path):
    # A process of its own, because the setting is the process's.
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "XDG_CACHE_HOME": str(tmp_path)},
        check=True,
        timeout=120,
    )
    mapped, kept = map(int, done.stdout.split())
    assert mapped > 1000, "huge pages would hide what this is about"
    assert kept < mapped / 100
