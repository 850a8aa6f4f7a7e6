"""A checkpoint that is fast enough to be broken amid many streams; its text means nothing."""

import json
import shutil
from pathlib import Path

from tiny_tokenizer import write_tiny_tokenizer

_TINY = Path(__file__).with_name("data") / "tiny-qwen2"


def tiny_checkpoint(folder: Path, *, context_length: int | None = None) -> Path:
    """Write a model and a tokenizer into a folder; returns the folder.

    Args:
        context_length: Of the model; default: its own, 512.
    """
    shutil.copytree(_TINY, folder, dirs_exist_ok=True)
    if context_length is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "max_position_embeddings": context_length}))
    return write_tiny_tokenizer(folder)
