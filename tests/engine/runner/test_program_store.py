"""Programs kept on disk: found again without tracing, and only by what they were made of."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.runner.compilation import Program, compile_all
from engine.runner.program_store import ProgramStore


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[2:4]), ("tp",))


class CountedProgram:
    """cache, x → cache + x, sorted x; counts how often it is traced."""

    def __init__(self, mesh: Mesh) -> None:
        self.num_traces = 0
        self.sharding = NamedSharding(mesh, PartitionSpec("tp"))
        shape = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=self.sharding)
        jitted = jax.jit(self._function, donate_argnums=0)
        self.program = Program("add", jitted, (shape, shape))

    def _function(self, cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.num_traces += 1
        return cache + x, jnp.sort(x, axis=1)

    def argument(self, factor: float = 1.0) -> jax.Array:
        return jax.device_put(-factor * jnp.arange(32.0).reshape(4, 8), self.sharding)


def take(program: CountedProgram, store: ProgramStore) -> jax.stages.Compiled:
    return compile_all({"only": program.program}, store, lambda name: None)["only"]


def test_a_kept_program_is_not_traced_again_and_computes_the_same(tmp_path: Path, mesh: Mesh):
    cold, warm = CountedProgram(mesh), CountedProgram(mesh)
    expected = take(cold, ProgramStore(tmp_path, mesh, []))(cold.argument(), cold.argument(3))
    found = take(warm, ProgramStore(tmp_path, mesh, []))
    assert (cold.num_traces, warm.num_traces) == (1, 0)
    cache = warm.argument()
    for got, wanted in zip(found(cache, warm.argument(3)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)
    assert cache.is_deleted()
    memory = found.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 4 * 8 * 4 // 2


def test_what_a_program_depends_on_is_in_its_key(tmp_path: Path, mesh: Mesh):
    shape = CountedProgram(mesh).program.arguments[0]
    replicated = NamedSharding(mesh, PartitionSpec())
    store = ProgramStore(tmp_path, mesh, ["model"])
    others = [
        store.key("add", shape),
        store.key("subtract", shape),
        store.key("add", (shape,)),
        store.key("add", jax.ShapeDtypeStruct((4, 9), shape.dtype, sharding=shape.sharding)),
        store.key("add", jax.ShapeDtypeStruct(shape.shape, jnp.int32, sharding=shape.sharding)),
        store.key("add", jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated)),
        ProgramStore(tmp_path, mesh, ["other model"]).key("add", shape),
        ProgramStore(tmp_path, Mesh(mesh.devices[::-1], ("tp",)), ["model"]).key("add", shape),
    ]
    with jax.default_matmul_precision("highest"):
        others.append(ProgramStore(tmp_path, mesh, ["model"]).key("add", shape))
    assert len(set(others)) == len(others)
    assert ProgramStore(tmp_path, mesh, ["model"]).key("add", shape) == others[0]


def test_settings_of_the_compiler_are_in_the_key(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
):
    keys = set()
    for flags in ("", "--xla_cpu_enable_fast_math=true"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        keys.add(ProgramStore(tmp_path, mesh, []).key("add", ()))
    assert len(keys) == 2


def test_a_broken_entry_is_compiled_again(
    tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
):
    take(CountedProgram(mesh), ProgramStore(tmp_path, mesh, []))
    (entry,) = (tmp_path / "executables").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    again = CountedProgram(mesh)
    with caplog.at_level(logging.WARNING):
        take(again, ProgramStore(tmp_path, mesh, []))
    assert again.num_traces == 1
    assert str(entry) in caplog.text
    mended = CountedProgram(mesh)
    take(mended, ProgramStore(tmp_path, mesh, []))
    assert mended.num_traces == 0


def test_a_program_that_jax_has_in_its_own_cache_is_kept_and_runs(tmp_path: Path, mesh: Mesh):
    with jax_cache(tmp_path / "jax"):
        first = CountedProgram(mesh)
        first.program.jitted.lower(*first.program.arguments).compile()
        assert any(path.name.startswith("jit_") for path in (tmp_path / "jax").iterdir())
        take(CountedProgram(mesh), ProgramStore(tmp_path, mesh, []))
        warm = CountedProgram(mesh)
        found = take(warm, ProgramStore(tmp_path, mesh, []))
    assert warm.num_traces == 0
    _, ordered = found(warm.argument(), warm.argument(2))
    np.testing.assert_array_equal(ordered, np.sort(warm.argument(2), axis=1))


@contextmanager
def jax_cache(folder: Path) -> Iterator[None]:
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_entries_that_nobody_used_for_long_are_dropped(tmp_path: Path, mesh: Mesh):
    take(CountedProgram(mesh), ProgramStore(tmp_path, mesh, []))
    (entry,) = (tmp_path / "executables").iterdir()
    month_ago_s = time.time() - 32 * 24 * 3600
    os.utime(entry, (month_ago_s, month_ago_s))
    ProgramStore(tmp_path, mesh, [])
    assert not entry.exists()
