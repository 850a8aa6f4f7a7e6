"""Which file implements an architecture, and the model that a runner calls.

A model is pure functions over a plain dict of arrays: the modules are merged with the parameters
while a step is traced, so that dispatching a compiled step never walks them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from engine.kernels.attention import AttentionBackend, AttentionMetadata, Cache
from engine.kernels.packed_weight import products
from engine.models import qwen, qwen2, qwen2_moe, qwen3, qwen3_moe
from engine.models.config import Architecture, ModelConfig
from engine.models.layer_stack import LayerStack
from engine.models.layers import (
    Build,
    DecoderLayer,
    Embedding,
    Linear,
    RMSNorm,
    StepContext,
)
from engine.models.names import CheckpointTensor
from engine.models.quantization import Quantization, dequantize, quantized_product
from engine.models.rope import log_n_scale, rope_tables
from engine.sharding import ResidualStream, ShardLayout, make_layout, named_sharding

Params = dict[str, Any]
"""embed_tokens, layers, norm and, unless tied, lm_head.

layers is a list with one dict per layer, which are unrolled; `lay_out_for_cpu` puts a `LayerStack`
in the place of several that follow each other, which are scanned.
"""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model's file gives: the modules of a layer, and where parameters lie on disk.

    Attributes:
        make_layer: Of a layer with one MLP.
        checkpoint_names: Parameter → tensor.
        make_sparse_layer: Of a layer with experts.
    """

    make_layer: Callable[[Build], DecoderLayer]
    checkpoint_names: dict[str, CheckpointTensor]
    make_sparse_layer: Callable[[Build], DecoderLayer] | None = None


MODEL_FILES: dict[Architecture, ModelFile] = {
    "QWenLMHeadModel": ModelFile(qwen.make_layer, qwen.CHECKPOINT_NAMES),
    "Qwen2ForCausalLM": ModelFile(qwen2.make_layer, qwen2.CHECKPOINT_NAMES),
    "Qwen3ForCausalLM": ModelFile(qwen3.make_layer, qwen3.CHECKPOINT_NAMES),
    "Qwen2MoeForCausalLM": ModelFile(
        qwen2.make_layer, qwen2_moe.CHECKPOINT_NAMES, qwen2_moe.make_sparse_layer
    ),
    "Qwen3MoeForCausalLM": ModelFile(
        qwen3.make_layer, qwen3_moe.CHECKPOINT_NAMES, qwen3_moe.make_sparse_layer
    ),
}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter's padded shape and what its axes mean."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


class Model:
    """One architecture put together for one mesh. Holds no arrays.

    Attributes:
        config: The model's.
        layout: Sizes after padding: `num_heads` and `num_kv_heads` are what the kernel sees.
    """

    def __init__(self, build: Build, attention: AttentionBackend) -> None:
        self.config = build.config
        self.layout = build.layout
        self._attention = attention
        parts, layers = _make_modules(build)
        self._parts = {name: nnx.graphdef(module) for name, module in parts.items()}
        # By whether a layer is sparse.
        self._layers = {is_sparse: nnx.graphdef(layer) for is_sparse, layer in layers.items()}
        self._mesh = build.mesh
        self._logits_sharding = named_sharding(build.mesh, (None, "vocab"))

    def forward(
        self,
        params: Params,
        token_ids_T: jax.Array,
        rope_alpha_T: jax.Array,
        cache: Cache,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, Cache]:
        """Run all layers over one step's tokens.

        Args:
            params: As `load_weights` made them.
            token_ids_T: int32; any valid id for padding.
            rope_alpha_T: float32, each token's `ModelConfig.rope_alpha`; models without dynamic NTK
                do not read it.
            cache: The attention backend's; donate it.
            metadata: The step's.

        Returns:
            Normalised hidden states [T, D], for `logits`; and the cache.
        """
        config = self.config
        position_T = metadata.position_T
        cosines, sines = rope_tables(config.rope, config.head_dim, position_T, rope_alpha_T)
        query_scale = None
        if config.rope.log_n_len is not None:
            query_scale = log_n_scale(position_T, config.rope.log_n_len)[:, None, None]
        step = StepContext(
            attention=self._attention,
            metadata=metadata,
            cosines=cosines,
            sines=sines,
            query_scale=query_scale,
        )
        with jax.named_scope("embed_tokens"):
            x_TD = self._part("embed_tokens", params)(token_ids_T)
        x_TD, cache = self._run_layers(params["layers"], x_TD, cache, step)
        with jax.named_scope("norm"):
            return self._part("norm", params)(x_TD), cache

    def logits(self, params: Params, hidden_RD: jax.Array) -> jax.Array:
        """Project hidden states to the vocabulary.

        Returns:
            float32 [R, V] over the real vocabulary, sharded over it where tp divides it.
        """
        head = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        with jax.named_scope("lm_head"):
            # Sums are accumulated in float32 anyway; rounding them to bfloat16 would tie tokens
            # whose logits differ by less than 1 in 256.
            weight_VD = params[head]["weight"]
            if "scale" in params[head]:
                product_RV, scale_R1 = quantized_product(hidden_RD, weight_VD, self._mesh)
                logits_RV = dequantize(product_RV, scale_R1, params[head]["scale"], jnp.float32)
            else:
                (logits_RV,) = products(hidden_RD, [weight_VD], jnp.float32, self._mesh)
            logits_RV = jax.lax.with_sharding_constraint(logits_RV, self._logits_sharding)
            return logits_RV[:, : self.config.vocab_size]

    def _run_layers(
        self, layers: list[Params | LayerStack], x_TD: jax.Array, cache: Cache, step: StepContext
    ) -> tuple[jax.Array, Cache]:
        layer = 0
        for params in layers:
            with jax.named_scope(f"layers.{layer}"):
                if isinstance(params, LayerStack):
                    x_TD, cache = self._scan_layers(params, layer, x_TD, cache, step)
                    layer += params.num_layers
                else:
                    x_TD, cache = self._run_layer(layer, params, layer, x_TD, cache, step)
                    layer += 1
        return x_TD, cache

    def _scan_layers(
        self, stack: LayerStack, first: int, x_TD: jax.Array, cache: Cache, step: StepContext
    ) -> tuple[jax.Array, Cache]:
        def run_layer(
            carry: tuple[jax.Array, Cache], xs: tuple[Params, jax.Array]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            slices, number = xs
            params = stack.layer(slices, number)
            return self._run_layer(first, params, first + number, *carry, step), None

        numbers = jnp.arange(stack.num_layers, dtype=jnp.int32)
        # The cache must be carried: passed as xs and ys it would be copied.
        carry, _ = jax.lax.scan(run_layer, (x_TD, cache), (stack.scanned_part, numbers))
        return carry

    def _run_layer(
        self,
        kin: int,
        params: Params,
        layer: ArrayLike,
        x_TD: jax.Array,
        cache: Cache,
        step: StepContext,
    ) -> tuple[jax.Array, Cache]:
        """Run a layer that is made as `kin` is; its own number may be traced."""
        module = nnx.merge(self._layers[self.config.is_sparse(kin)], params)
        return module(x_TD, cache, layer, step, self.config.sliding_windows[kin])

    def _part(self, name: str, params: Params) -> Any:
        return nnx.merge(self._parts[name], params[name])


def make_model(
    model_config: ModelConfig,
    residual: ResidualStream,
    attention: AttentionBackend,
    dtype: DTypeLike | None = None,
    quantization: Quantization = "none",
) -> Model:
    """Put a model together.

    Args:
        model_config: Says which architecture, and its sizes.
        residual: On which mesh, of `engine.sharding.make_mesh`, and how hidden states lie there.
        attention: Stores keys and values, and attends.
        dtype: Of weights and activations; by default the checkpoint's.
        quantization: What `load_weights` was told.
    """
    return Model(_make_build(model_config, residual, dtype, quantization), attention)


def parameter_specs(
    model_config: ModelConfig, mesh: Mesh, dtype: DTypeLike | None = None
) -> Params:
    """Return the parameters in the form of `Params`, with a `ParameterSpec` for each array."""
    build = _make_build(model_config, ResidualStream(mesh=mesh), dtype)
    parts, layers = _make_modules(build)
    specs: Params = {name: _specs(module) for name, module in parts.items()}
    of_layer = {is_sparse: _specs(layer) for is_sparse, layer in layers.items()}
    specs["layers"] = [
        of_layer[model_config.is_sparse(layer)] for layer in range(model_config.num_layers)
    ]
    return specs


def _make_build(
    model_config: ModelConfig,
    residual: ResidualStream,
    dtype: DTypeLike | None,
    quantization: Quantization = "none",
) -> Build:
    return Build(
        config=model_config,
        layout=model_layout(model_config, residual.mesh.size),
        residual=residual,
        dtype=jnp.dtype(dtype or model_config.dtype),
        quantization=quantization,
    )


def _make_modules(build: Build) -> tuple[dict[str, nnx.Module], dict[bool, DecoderLayer]]:
    """Modules outside of the layers by name, and of each kind of layer by whether it is sparse."""
    parts: dict[str, nnx.Module] = {
        "embed_tokens": Embedding(build),
        "norm": RMSNorm(build, "embed"),
    }
    if not build.config.tie_word_embeddings:
        parts["lm_head"] = Linear(build, "vocab", "embed")
    file = MODEL_FILES[build.config.architecture]
    layers = {False: file.make_layer(build)}
    if file.make_sparse_layer is not None:
        layers[True] = file.make_sparse_layer(build)
    return parts, layers


def model_layout(model_config: ModelConfig, tp_size: int) -> ShardLayout:
    """Pad the model's sizes for that many devices."""
    experts = model_config.experts
    expert_sizes = (
        {}
        if experts is None
        else {
            "num_experts": experts.num_experts,
            "expert_size": experts.intermediate_size,
            "shared_expert_size": experts.shared_intermediate_size,
        }
    )
    return make_layout(
        tp_size=tp_size,
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.intermediate_size,
        vocab_size=model_config.vocab_size,
        **expert_sizes,
    )


def _specs(module: nnx.Module) -> Params:
    specs: Params = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        parent = specs
        for key in path[:-1]:
            parent = parent.setdefault(str(key), {})
        parent[str(path[-1])] = ParameterSpec(
            tuple(variable.get_value().shape), variable.get_metadata()["logical_axes"]
        )
    return specs
