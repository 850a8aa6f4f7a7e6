"""What a server tells of itself: its version and its configuration, without what is secret."""

import importlib.metadata
import re
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cluster.openai.engine_client import EngineInfo
from engine.config import EngineConfig

_PROJECT = "qwen-on-ray"
# What such a field holds, or where it lies, is nobody's business.
_SECRET_FIELD = re.compile(r"key|secret|password|credential")
# A name and a password within an address.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


@cache
def project_version() -> str:
    """The version that is installed, or that of the source tree where nothing is."""
    try:
        return importlib.metadata.version(_PROJECT)
    except importlib.metadata.PackageNotFoundError:
        source = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if not source.is_file():
            return "unknown"
        return tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"]


def describe_server(
    config: EngineConfig, status: EngineInfo, engines: Sequence[EngineInfo]
) -> dict[str, Any]:
    """The configuration, field by field, with the engines' limits and what they do.

    Args:
        config: As the router has it, after all defaults.
        status: Of all engines together.
        engines: Each that can be asked.
    """
    fields = {
        name: _CREDENTIALS.sub("", value) if isinstance(value, str) else value
        for name, value in config.model_dump(mode="json").items()
        if not _SECRET_FIELD.search(name)
    }
    return {
        **fields,
        "version": project_version(),
        "model_names": list(config.model_names),
        "is_ready": status.is_ready,
        "status": status.status,
        "engines": [_describe_engine(info) for info in engines],
    }


def _describe_engine(info: EngineInfo) -> dict[str, Any]:
    stats = info.stats
    return {
        "engine_id": info.engine_id,
        "is_ready": info.is_ready,
        "epoch": info.epoch,
        "context_length": info.context_length,
        "vocab_size": info.vocab_size,
        "page_size": info.page_size,
        "max_total_num_tokens": stats.num_pages * info.page_size,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
    }
