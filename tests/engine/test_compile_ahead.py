"""Programs that one machine compiles and another loads; and those of slices that are not there."""

import logging
from pathlib import Path
from typing import Any

import pytest

from engine.compile_ahead import compile_ahead, compile_here, compile_some
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.runner.model_runner import ModelRunner
from engine.runner.program_store import ProgramStore
from engine.sharding import make_mesh
from engine.tpu_slice import Slice

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"


def make_config(**changes: Any) -> EngineConfig:
    fields = {
        "model_path": str(TINY),
        "max_running_requests": 2,
        "chunked_prefill_size": 32,
        "context_length": 64,
        "mem_fraction_static": 0.3,
    }
    return EngineConfig(**(fields | changes))


def start(config: EngineConfig) -> None:
    runner = ModelRunner(config)
    try:
        runner.start(lambda progress: None)
    finally:
        runner.close()


def test_a_start_with_programs_compiled_elsewhere_compiles_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    store, own = tmp_path / "store", tmp_path / "own"
    num_programs = compile_here(
        make_config(device="cpu"), store, lambda done, total, note: told.append((done, total))
    )
    assert told[-1] == (num_programs, num_programs)
    caplog.set_level(logging.INFO, "engine.runner.compilation")
    start(
        make_config(
            device="cpu", jax_compilation_cache_dir=str(own), compiled_programs=f"file://{store}"
        )
    )
    compiled = [record.getMessage() for record in caplog.records if "compiled" in record.msg]
    assert [line.split()[0] for line in compiled] == ["0", "0"]
    found = sum(int(line.split(", ")[1].split()[0]) for line in compiled)
    assert found == num_programs
    assert len(list((own / "executables").iterdir())) == num_programs

    # Those of another model are of no use, which is said.
    ProgramStore(own, make_mesh(1), ["another model"], str(store))
    assert "of no use here: model" in caplog.text


def test_an_address_without_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--compiled-programs"):
        start(
            make_config(
                jax_compilation_cache_dir=str(tmp_path), compiled_programs=str(tmp_path / "none")
            )
        )


def test_hosts_of_a_gang_of_cpus_compile_for_themselves(tmp_path: Path) -> None:
    config = make_config(device="cpu", nnodes=2, tp_size=2)
    with pytest.raises(ConfigError, match="--nnodes=2"):
        compile_here(config, tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model_path": "/nowhere/at-all"}, CheckpointError, "/nowhere/at-all"),
        ({"tp_size": 8}, Exception, "--tp-size=8"),
    ],
)
def test_what_cannot_start_cannot_be_compiled_and_says_the_same(
    changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        compile_ahead(make_config(device="tpu", **changes), Slice.parse("v6e:2x2"))


def test_who_waits_for_the_compiler_waits_no_longer_than_is_said() -> None:
    config = make_config(device="tpu", start_timeout_s=0.1)
    with pytest.raises(EngineError, match=r"--start-timeout-s=0\.1"):
        compile_some(config, Slice.parse("v6e:1x1"), [])
