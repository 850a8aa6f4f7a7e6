"""The short form of `clients.py`: the clients that install quickly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).with_name("clients.py")
QUICK = ("openai", "langchain", "litellm", "instructor")


def test_clients_of_others_can_do_what_they_promise(demo_checkpoint: Path, tmp_path: Path) -> None:
    found = tmp_path / "outcomes.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", *QUICK, f"--json={found}"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    outcomes = {outcome["name"]: outcome for outcome in json.loads(found.read_text())}
    assert sorted(outcomes) == sorted(QUICK)
    for outcome in outcomes.values():
        assert len(outcome["checks"]) >= 5, outcome
