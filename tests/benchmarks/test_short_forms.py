"""Each benchmark in its shortest form: that it runs and prints its rows; figures prove nothing."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-qwen2"

SHORT_FORMS = {
    "bench_kernels.py": (
        "--config smollm2-135m --rows 1 2 --context 32 --chunk 32 --runs 1",
        [
            r"attention, 2 rows at 32 tokens +[\d.]+ ms",
            r"attention, last 32 of 32 tokens +[\d.]+ ms +\d+ GFLOP/s",
            r"head, 1 rows, int8, plain +[\d.]+ ms",
            r"sampling, 2 rows, top_k 50, top_p 0.9 +[\d.]+ ms",
        ],
    ),
    "bench_step.py": ("--running 1 4 --steps 20", [r"\n +4( +[\d.]+){5}"]),
    "bench_growth.py": (
        f"--model-path {TINY} --device cpu --contexts 16 --concurrencies 2 --context 16 "
        "--output-len 4",
        [r"\| 1 \| 18 \| [\d.]+ \|", r"\| 2 \| 18 \| [\d.]+ \|"],
    ),
    "tpu_static.py": (
        "--only '7 q'",
        [r"7 q / 1 kv heads, page 64: roofline ÷ static cycles +[\d.]+ %"],
    ),
    # HAProxy's own ports are the same for all servers of a machine, and another test may run one.
    "bench_stream.py": ("--streams 2 --tokens 10 --proxy python", [r"\n +2\.0( +[\d.]+){9}"]),
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORT_FORMS)
def test_a_benchmark_runs_and_prints_its_rows(name: str):
    arguments, rows = SHORT_FORMS[name]
    process = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *shlex.split(arguments)],
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for row in rows:
        assert re.search(row, process.stdout), process.stdout
