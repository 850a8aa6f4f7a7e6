"""Which changes of a checkpoint, or of how it is computed, its name must show."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.runner.fingerprint import model_fingerprint

CHECKPOINT = Path(__file__).parents[2] / "data" / "tiny-qwen2"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(CHECKPOINT, tmp_path / "copy")
    return tmp_path / "copy"


def fingerprint(directory: Path, **changes: object) -> str:
    how = {"dtype": "bfloat16", "tp_size": 1, "load_format": "auto"} | changes
    return model_fingerprint(directory, **how)  # type: ignore[arg-type]


def test_a_copy_elsewhere_has_the_same_name(copy: Path):
    assert fingerprint(copy) == fingerprint(CHECKPOINT)


def test_how_it_is_computed_is_in_the_name():
    names = {
        fingerprint(CHECKPOINT),
        fingerprint(CHECKPOINT, dtype="float32"),
        fingerprint(CHECKPOINT, tp_size=2),
        fingerprint(CHECKPOINT, load_format="dummy"),
    }
    assert len(names) == 4


def test_another_configuration_is_another_model(copy: Path):
    path = copy / "config.json"
    path.write_text(path.read_text().replace("{", '{"rope_scaling": null,', 1))
    assert fingerprint(copy) != fingerprint(CHECKPOINT)


def test_a_fine_tuning_of_equal_shapes_is_another_model(copy: Path):
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    save_file(
        {
            name: (tensor * np.float32(1.001)).astype(tensor.dtype)
            for name, tensor in tensors.items()
        },
        path,
        metadata={"format": "pt"},
    )
    assert path.stat().st_size == next(CHECKPOINT.glob("*.safetensors")).stat().st_size
    assert fingerprint(copy) != fingerprint(CHECKPOINT)
