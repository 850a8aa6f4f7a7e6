"""Names → directories, against a small hub on loopback; each fetch in a process of its own.

The hub's library reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from engine.errors import CheckpointError
from engine.hub import resolve_checkpoint

ROOT = Path(__file__).parents[2]
FILES = {
    "config.json": b"{}",
    "qwen.tiktoken": b"IQ== 0\n",
    "merges.txt": b"#version: 0.2\n",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(300_000),
    "pytorch_model.bin": b"pickle",
    "modeling_qwen.py": b"raise SystemExit",
}
PROGRAM = """
import json, sys
from engine.errors import CheckpointError
from engine.hub import resolve_checkpoint
calls = []
options = json.loads(sys.argv[2])
try:
    directory = resolve_checkpoint(
        sys.argv[1], on_progress=lambda done, total: calls.append((done, total)), **options
    )
    files = sorted(path.name for path in directory.iterdir())
    print(json.dumps({"files": files, "progress": calls, "jax": "jax" in sys.modules}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    server = HubServer("Qwen/Tiny", FILES)
    yield server
    server.close()


def resolve(name: str, endpoint: str, *, offline: bool = False, **options: Any) -> dict[str, Any]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_name_is_fetched_with_progress_and_neither_pickles_nor_code(
    hub: HubServer, tmp_path: Path
) -> None:
    found = resolve("Qwen/Tiny", hub.endpoint, download_dir=str(tmp_path))
    wanted = sorted(set(FILES) - {"pytorch_model.bin", "modeling_qwen.py"})
    assert found["files"] == wanted
    assert not {"pytorch_model.bin", "modeling_qwen.py"} & set(hub.fetched)
    total = sum(len(FILES[name]) for name in wanted)
    assert found["progress"][-1] == [total, total]
    assert found["jax"] is False
    # What was fetched is found without the hub.
    again = resolve("Qwen/Tiny", "http://127.0.0.1:9", offline=True, download_dir=str(tmp_path))
    assert again["files"] == wanted


def test_configuration_and_tokenizer_can_be_fetched_alone(hub: HubServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"download_dir": str(tmp_path), "has_weights": False}
    found = resolve("Qwen/Tiny", hub.endpoint, **options)
    assert "model.safetensors" not in found["files"]
    assert "config.json" in found["files"]


def test_an_unknown_name_and_a_repository_of_pickles_are_refused(tmp_path: Path) -> None:
    server = HubServer("Qwen/Pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    try:
        options: dict[str, Any] = {"download_dir": str(tmp_path)}
        pickles = resolve("Qwen/Pickles", server.endpoint, **options)
        unknown = resolve("Qwen/Unknown", server.endpoint, **options)
    finally:
        server.close()
    assert "no safetensors" in pickles["error"]
    assert "neither a directory nor a model" in unknown["error"]


def test_an_unreachable_hub_is_told_from_offline_mode(tmp_path: Path) -> None:
    options: dict[str, Any] = {"download_dir": str(tmp_path)}
    offline = resolve("Qwen/Tiny", "http://127.0.0.1:9", offline=True, **options)
    assert "HF_HUB_OFFLINE is set" in offline["error"]
    unreachable = resolve("Qwen/Tiny", "http://127.0.0.1:9", **options)
    assert "cannot be reached" in unreachable["error"]


def test_a_connection_that_breaks_is_a_checkpoint_error(tmp_path: Path) -> None:
    server = HubServer("Qwen/Tiny", FILES, cut_short="model.safetensors")
    try:
        found = resolve("Qwen/Tiny", server.endpoint, download_dir=str(tmp_path))
    finally:
        server.close()
    assert "cannot be reached" in found["error"]


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        resolve_checkpoint(path)
