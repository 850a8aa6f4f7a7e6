"""The short form of `scaling.py`: one engine, two, one, none and one again, and no client notices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("scaling.py")
COMMENT_PERIOD_S = 10


def test_no_answer_is_lost_while_engines_come_and_go(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--long-tokens=0", "--tokens=100", "--downscale-delay-s=5", f"--json={figures}"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcome = json.loads(figures.read_text())
    assert (outcome["answers"]["errors"], outcome["answers"]["num_wrong"]) == ([], 0)
    assert outcome["answers"]["num_answers"] >= 24
    held = outcome["held"]
    assert held["text"]
    # On a quick machine the engine is there before a stream that waits has to be told.
    assert held["num_comments"] >= held["first_text_s"] // COMMENT_PERIOD_S - 1
    if held["num_comments"]:
        assert held["first_comment_s"] >= COMMENT_PERIOD_S
