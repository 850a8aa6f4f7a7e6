"""What an import brings with it, seen from a fresh interpreter."""

import subprocess
import sys

import pytest

import engine


@pytest.mark.parametrize(
    "module", ["serve_app", "cluster.router", "engine.core", "engine.text.chat_template"]
)
def test_leader_and_routers_leave_jax_alone(module: str):
    """JAX takes seconds and hundreds of megabytes, and may seize the chips of the host."""
    _assert_not_imported(module, "jax", "flax")


@pytest.mark.parametrize("module", ["engine.llm", "engine.core"])
def test_engine_works_without_ray_and_http(module: str):
    _assert_not_imported(module, "ray", "fastapi", "starlette")


def test_engine_exports_its_three_names():
    assert sorted(engine.__all__) == ["EngineConfig", "LLM", "SamplingParams"]
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name


def _assert_not_imported(module: str, *forbidden: str) -> None:
    program = (
        f"import sys; import {module}; "
        f"found = sorted(set({forbidden!r}) & set(sys.modules)); "
        "sys.exit(', '.join(found) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"import {module}: {done.stderr}"
