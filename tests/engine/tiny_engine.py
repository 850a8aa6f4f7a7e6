"""A whole engine over a tiny checkpoint, whose programs all tests that use it compile once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import EngineConfig
from engine.llm import LLM

DATA = Path(__file__).parents[1] / "data"


@contextmanager
def tiny_engine(checkpoint: str = "tiny-qwen2", **overrides: object) -> Iterator[LLM]:
    fields = {
        "model_path": str(DATA / checkpoint),
        "device": "cpu",
        "dtype": "float32",
        "page_size": 16,
        "context_length": 256,
        "max_total_tokens": 2048,
        "max_running_requests": 8,
        "chunked_prefill_size": 128,
        "random_seed": 1,
    }
    with LLM(EngineConfig.model_validate(fields | overrides)) as llm:
        yield llm
        llm.core.check_integrity()
