"""A model run the plain way: one sequence, one prompt chunk, then one token after the other."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.kernels.attention import (
    AttentionBackend,
    AttentionMetadata,
    make_attention,
    zeroed_cache,
)
from engine.models.checkpoint import dummy_weights, load_weights
from engine.models.config import ModelConfig, load_model_config
from engine.models.quantization import Quantization
from engine.models.registry import make_model
from engine.sharding import ResidualStream, make_mesh

DATA = Path(__file__).parents[2] / "data"
PAGE_SIZE = 16
# Tokens; caches are multiples of it, so that a prompt is computed by one program whether or not an
# answer follows.
CACHE_STEP = 64


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _capacity(num_tokens: int) -> int:
    return math.ceil(num_tokens / CACHE_STEP) * CACHE_STEP


class LoadedModel:
    """A model with its weights, over `tp_size` CPU devices."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig | None = None,
        *,
        tp_size: int = 1,
        dtype: str = "float32",
        platform: str = "cpu",
        backend: str = "dense",
        dummy_seed: int | None = None,
        quantization: Quantization = "none",
        make_backend: Callable[[Mesh], AttentionBackend] | None = None,
        parallel_from: int | None = None,
    ) -> None:
        self.config = config or load_model_config(directory)
        self.dtype = dtype
        mesh = make_mesh(tp_size, jax.devices()[:tp_size])
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self.attention: AttentionBackend = (
            make_backend(mesh)
            if make_backend
            else make_attention(
                platform,
                backend,
                mesh,
                dtype=dtype,
                head_dim=self.config.head_dim,
                page_size=PAGE_SIZE,
            )
        )
        residual = ResidualStream(mesh=mesh, parallel_from=parallel_from)
        self.model = make_model(self.config, residual, self.attention, dtype, quantization)
        if dummy_seed is None:
            self.params = load_weights(
                directory, self.config, mesh, dtype, quantization=quantization
            )
        else:
            self.params = dummy_weights(
                self.config, mesh, dtype, dummy_seed, quantization=quantization
            )
        # Each program runs a few times, and is compiled in three quarters of the time for it.
        self._step = jax.jit(
            self._run_step, donate_argnums=2, compiler_options={"xla_backend_optimization_level": 0}
        )

    def _run_step(
        self,
        params: Any,
        token_ids_T: jax.Array,
        cache: Any,
        rope_alpha_T: jax.Array,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, Any]:
        hidden_TD, cache = self.model.forward(params, token_ids_T, rope_alpha_T, cache, metadata)
        # Whole on every device, so that each process of several can read it.
        logits = jax.lax.with_sharding_constraint(
            self.model.logits(params, hidden_TD), self._replicated
        )
        return logits, cache

    def make_cache(self, num_tokens: int) -> Any:
        shapes = self.attention.cache_shapes(
            num_layers=self.config.num_layers,
            num_kv_heads=self.model.layout.num_kv_heads,
            head_dim=self.config.head_dim,
            num_pages=1 + num_pages(num_tokens),
            page_size=PAGE_SIZE,
            dtype=self.dtype,
        )
        return zeroed_cache(shapes)

    def prefill(
        self,
        token_ids: Sequence[int],
        cache: Any,
        rope_alpha: float,
        *,
        capacity: int,
        padded_to: int | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Return the logits [len(token_ids), V] of a prompt in one chunk, and the cache."""
        length, padded = len(token_ids), padded_to or len(token_ids)
        metadata = chunk_metadata(length, padded, capacity)
        ids = np.zeros(padded, np.int32)
        ids[:length] = token_ids
        logits, cache = self._step(
            self.params, ids, cache, np.full(padded, rope_alpha, np.float32), metadata
        )
        return np.asarray(logits[:length], np.float32), cache

    def logits(self, token_ids: Sequence[int], padded_to: int | None = None) -> np.ndarray:
        """Return [len(token_ids), V], as for a prompt of that length."""
        alpha = self.config.rope_alpha(len(token_ids))
        capacity = _capacity(max(len(token_ids), padded_to or 0))
        cache = self.make_cache(capacity)
        return self.prefill(token_ids, cache, alpha, capacity=capacity, padded_to=padded_to)[0]

    def lowered_for(self, platform: str, num_tokens: int) -> str:
        """StableHLO of a prompt's step for a platform that need not be here."""
        metadata = chunk_metadata(num_tokens, num_tokens, num_tokens)
        exported = jax.export.export(self._step, platforms=[platform])(
            self.params,
            np.zeros(num_tokens, np.int32),
            self.make_cache(num_tokens),
            np.ones(num_tokens, np.float32),
            metadata,
        )
        return exported.mlir_module()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Decode through the cache, in a bucket of two rows of which one is padding."""
        capacity = _capacity(len(prompt) + num_tokens)
        alpha = self.config.rope_alpha(len(prompt))
        logits, cache = self.prefill(prompt, self.make_cache(capacity), alpha, capacity=capacity)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < num_tokens:
            position = len(prompt) + len(tokens) - 1
            row, cache = self.decode(tokens[-1], position, cache, (alpha, 1.0), capacity=capacity)
            tokens.append(int(row.argmax()))
        return tokens

    def decode(
        self,
        token_id: int,
        position: int,
        cache: Any,
        rope_alphas: tuple[float, float],
        *,
        capacity: int,
    ) -> tuple[np.ndarray, Any]:
        """Return the logits [V] of row 0, and the cache; row 1 is padding."""
        logits, cache = self._step(
            self.params,
            np.array([token_id, 0], np.int32),
            cache,
            np.array(rope_alphas, np.float32),
            decode_metadata(position, capacity),
        )
        return np.asarray(logits[0], np.float32), cache


def num_pages(num_tokens: int) -> int:
    return math.ceil(num_tokens / PAGE_SIZE)


def chunk_metadata(length: int, padded: int, capacity: int) -> AttentionMetadata:
    """One chunk of `length` tokens from position 0, and no decode rows."""
    positions = np.full(padded, -1, np.int32)
    positions[:length] = np.arange(length)
    return _metadata(
        position_T=positions,
        row_T=np.zeros(padded, np.int32),
        page_indices=np.arange(1, 1 + num_pages(capacity), dtype=np.int32)[None],
        kv_lens=np.array([length], np.int32),
        cu_chunk_lens=np.array([0, length], np.int32),
        num_decodes=np.int32(0),
        num_decode_rows=0,
    )


def decode_metadata(position: int, capacity: int) -> AttentionMetadata:
    """Row 0 decodes at `position`, row 1 is padding."""
    pages = np.zeros((2, num_pages(capacity)), np.int32)
    pages[0] = np.arange(1, 1 + num_pages(capacity))
    return _metadata(
        position_T=np.array([position, -1], np.int32),
        row_T=np.array([0, 1], np.int32),
        page_indices=pages,
        kv_lens=np.array([position + 1, 0], np.int32),
        cu_chunk_lens=np.array([0], np.int32),
        num_decodes=np.int32(1),
        num_decode_rows=2,
    )


def _metadata(**fields: Any) -> AttentionMetadata:
    return AttentionMetadata(page_size=PAGE_SIZE, **fields)


@functools.cache
def tiny_model(name: str, tp_size: int = 1) -> LoadedModel:
    return LoadedModel(DATA / name, tp_size=tp_size)


def max_difference(left: Any, right: Any) -> float:
    return float(jnp.max(jnp.abs(jnp.asarray(left) - jnp.asarray(right))))
