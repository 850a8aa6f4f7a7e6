"""scripts/setup where an environment is there already; it makes one in tests of whole machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "scripts" / "setup"


def run_setup(environment: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SETUP, *words],
        env=os.environ | {"UV_PROJECT_ENVIRONMENT": environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("--dev",), ("--tpu",), ("--gcp",)])
def test_environment_that_is_named_is_taken_as_it_is(words: tuple[str, ...]):
    before = {path.name for path in Path(sys.prefix).iterdir()}
    done = run_setup(sys.prefix, *words)
    assert (done.returncode, done.stdout) == (0, f"{sys.prefix}\n"), done.stderr
    assert {path.name for path in Path(sys.prefix).iterdir()} == before


def test_folder_without_the_packages_is_refused(tmp_path: Path):
    done = run_setup(str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"UV_PROJECT_ENVIRONMENT={tmp_path} is no environment with jax ray" in done.stderr
    assert list(tmp_path.iterdir()) == []
