"""A Ray of the test session's own, started by the first test that asks for it."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ray reads these once, when imported; without a token it would write one into the user's home.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import ray

_TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, as a laptop has, and a temporary folder and a token of its own."""
    # Ray's socket paths must stay under 108 characters, so pytest's own folders are too long.
    folder = tempfile.mkdtemp(prefix="qor-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
        # Host programs of the tests lie beside this file.
        runtime_env={"env_vars": {"PYTHONPATH": f"{_TESTS}:{_TESTS.parents[1]}"}},
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
