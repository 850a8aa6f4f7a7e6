"""The engine: serves token ids from arrays, with or without a cluster around it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM
    from engine.request import SamplingParams

__all__ = ["LLM", "EngineConfig", "SamplingParams"]

_HOMES = {
    "LLM": "engine.llm",
    "EngineConfig": "engine.config",
    "SamplingParams": "engine.request",
}


def __getattr__(name: str) -> Any:
    # Lazily, because importing any engine module runs this file, and planning must not import JAX.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
