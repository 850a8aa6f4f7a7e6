"""The short form of `scaling.py`: engines follow a load from one to two, to none and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.openai.sse import COMMENT_PERIOD_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("scaling.py")


def test_engines_follow_the_load_and_no_answer_is_lost(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--long-tokens=0", "--downscale-delay-s=6"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags, f"--json={figures}"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcome = json.loads(figures.read_text())
    answers, held = outcome["answers"], outcome["held"]
    assert answers["num_answers"] > 24
    assert (answers["errors"], answers["num_wrong"]) == ([], 0)
    # A request that came when there was no engine was answered, and told meanwhile that it waits.
    assert held["text"]
    assert held["num_comments"] >= (held["first_text_s"] > COMMENT_PERIOD_S + 1)
