"""The short form of `faults.py`: an engine's leader is killed under load, and no client notices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("faults.py")


def test_no_stream_is_lost_or_wrong_when_a_leader_is_killed(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--faults=leader-killed", "--injections=1", "--streams=3", "--hosts=1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags, f"--json={figures}"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    [outcome] = json.loads(figures.read_text())
    assert outcome["requests"] >= 3
    assert (outcome["injections"], outcome["lost"], outcome["wrong"]) == (1, 0, 0)
