from pathlib import Path

import huggingface_hub.constants
import pytest

from engine.errors import CheckpointError
from engine.text.files import locate_text_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds the tokenizer of Qwen/Tiny, as an earlier download left it."""
    repository = tmp_path / "models--Qwen--Tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate_text_files(str(tmp_path)) == tmp_path


def test_a_name_is_found_in_the_cache_without_a_network(cache: Path) -> None:
    directory = locate_text_files("Qwen/Tiny", download_dir=str(cache))
    assert (directory / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["Qwen/Absent", "not a name", "/absent/directory"])
def test_what_is_neither_a_directory_nor_on_the_hub_is_refused(name: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="--model-path") as raised:
        locate_text_files(name, download_dir=str(cache))
    assert name in str(raised.value)


def test_another_revision_than_the_cached_one_is_not_taken(cache: Path) -> None:
    with pytest.raises(CheckpointError):
        locate_text_files("Qwen/Tiny", revision="v2", download_dir=str(cache))
