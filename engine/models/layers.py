"""What the architectures are built of: linear maps, norms, the gated MLP, the frame of a layer.

Modules hold shapes while a model is put together, and arrays only inside a traced step, where
`Model` merges them with the step's parameters. Weights lie as in the checkpoint, [out, in]: XLA's
fast bfloat16 matmul on the CPU wants that order, the TPU takes either; or packed, where
`layer_stack` found a kernel of our own for this machine's processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from engine.kernels.attention import AttentionBackend, AttentionMetadata, Cache
from engine.kernels.packed_weight import PackedWeight, products
from engine.models.config import ModelConfig
from engine.models.quantization import Quantization, dequantize, quantize_activations
from engine.models.rope import rotate, rotate_by_product
from engine.sharding import ResidualStream, ShardLayout, named_sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What every module needs to know when it is made.

    Attributes:
        config: The model's.
        layout: Padded sizes.
        residual: How hidden states lie between the blocks, and on which mesh.
        dtype: Of parameters and activations.
        quantization: Of linear weights and the embedding table.
    """

    config: ModelConfig
    layout: ShardLayout
    residual: ResidualStream
    dtype: jnp.dtype
    quantization: Quantization = "none"

    @property
    def mesh(self) -> Mesh:
        """Where activations are sharded to."""
        return self.residual.mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What all layers of one step share.

    Attributes:
        attention: The kernel that owns the KV cache.
        metadata: The step's tokens and pages.
        cosines: float32 [T, head_dim / 2].
        sines: float32 [T, head_dim / 2].
        query_scale: float32 [T, 1, 1], or None: a factor on the rotated queries.
    """

    attention: AttentionBackend
    metadata: AttentionMetadata
    cosines: jax.Array
    sines: jax.Array
    query_scale: jax.Array | None


def parameter(build: Build, *axes: str) -> nnx.Param:
    """Declare a parameter by the meaning of its axes; it holds its padded shape."""
    shape = tuple(build.layout.padded_size(axis) for axis in axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, build.dtype), logical_axes=axes)


def weight_scale(build: Build, *axes: str) -> nnx.Param | None:
    """Declare the scales of a quantised weight's rows; None where weights are not quantised."""
    return None if build.quantization == "none" else parameter(build, *axes)


class Linear(nnx.Module):
    """x W^T + b, with a weight of [out, in]."""

    def __init__(
        self, build: Build, out_axis: str, in_axis: str, *, has_bias: bool = False
    ) -> None:
        self.weight = parameter(build, out_axis, in_axis)
        self.scale = weight_scale(build, out_axis)
        self.bias = parameter(build, out_axis) if has_bias else None
        self.mesh = build.mesh
        self._dtype = build.dtype
        self._residual = build.residual if out_axis == "embed" else None
        self._sharding = named_sharding(build.mesh, (None, out_axis))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Map [T, in] to [T, out], sharded as `out_axis` is."""
        (out_TF,) = apply_linears((self,), x_TD)
        return out_TF

    def finish(self, product_TF: jax.Array, scale_T1: jax.Array | None) -> jax.Array:
        """Make the map's output of its product, and of the activations' scale if it has one."""
        # The constraint stands before scales and bias: with `in_axis` sharded it is where partial
        # sums of the devices are added up.
        sharding = self._sharding
        if self._residual is not None:
            sharding = self._residual.sharding(len(product_TF))
        out_TF = jax.lax.with_sharding_constraint(product_TF, sharding)
        if self.scale is not None:
            assert scale_T1 is not None
            out_TF = dequantize(out_TF, scale_T1, self.scale[...], self._dtype)
        return out_TF if self.bias is None else out_TF + self.bias[...][None, :]


def apply_linears(linears: Sequence[Linear], x_TD: jax.Array) -> list[jax.Array]:
    """Map the same [T, in] by each of them: in one product, where weights lie side by side.

    Args:
        linears: One, or those of a group of `layer_stack.JOINED`, in its order.
    """
    weights = [linear.weight.get_value() for linear in linears]
    scale_T1: jax.Array | None = None
    dtype = x_TD.dtype
    if linears[0].scale is not None:
        x_TD, scale_T1 = quantize_activations(x_TD)
        dtype = jnp.dtype(jnp.int32)
    found = products(x_TD, weights, dtype, linears[0].mesh)
    return [
        linear.finish(product_TF, scale_T1)
        for linear, product_TF in zip(linears, found, strict=True)
    ]


class Embedding(nnx.Module):
    """Token id → row of the table; the table's rows are shared out over the devices."""

    def __init__(self, build: Build) -> None:
        self.weight = parameter(build, "vocab", "embed")
        self.scale = weight_scale(build, "vocab")
        self._dtype = build.dtype
        self._residual = build.residual

    def __call__(self, token_ids_T: jax.Array) -> jax.Array:
        weight = self.weight.get_value()
        is_packed = isinstance(weight, PackedWeight)
        x_TD = weight.rows(token_ids_T, self._residual.mesh) if is_packed else weight[token_ids_T]
        if self.scale is not None:
            x_TD = (x_TD * self.scale[...][token_ids_T][:, None]).astype(self._dtype)
        return jax.lax.with_sharding_constraint(x_TD, self._residual.sharding(len(x_TD)))


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, build: Build, axis: str) -> None:
        self.weight = parameter(build, axis)
        self._eps = build.config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        # The mean of squares is taken in float32: in bfloat16 a sum over thousands of dimensions
        # stops growing at 256 times its terms. Rounded before the weight, as the models were
        # trained.
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self._eps)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse_rms).astype(x.dtype) * weight


class FeedForward(Protocol):
    """The part of a layer behind attention, which takes each token by itself."""

    def __call__(self, x_TD: jax.Array, step: StepContext) -> jax.Array:
        """Return [T, D]; of padding tokens anything that is finite."""
        ...


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, build: Build, axis: str = "ffn") -> None:
        self.gate_proj = Linear(build, axis, "embed")
        self.up_proj = Linear(build, axis, "embed")
        self.down_proj = Linear(build, "embed", axis)

    def __call__(self, x_TD: jax.Array, step: StepContext) -> jax.Array:
        gate_TF, up_TF = apply_linears((self.gate_proj, self.up_proj), x_TD)
        return self.down_proj(jax.nn.silu(gate_TF) * up_TF)


class SelfAttention(Protocol):
    """The part of a layer that each architecture writes itself."""

    def __call__(
        self,
        x_TD: jax.Array,
        cache: Cache,
        layer: ArrayLike,
        step: StepContext,
        sliding_window: int | None,
    ) -> tuple[jax.Array, Cache]:
        """Return [T, D] and the cache with this step's keys and values in it."""
        ...


class DecoderLayer(nnx.Module):
    """A pre-norm transformer layer: attention, then MLP, each added to what came in."""

    def __init__(self, build: Build, self_attn: SelfAttention, mlp: FeedForward) -> None:
        self.input_layernorm = RMSNorm(build, "embed")
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(build, "embed")
        self.mlp = mlp
        self._residual = build.residual

    def __call__(
        self,
        x_TD: jax.Array,
        cache: Cache,
        layer: ArrayLike,
        step: StepContext,
        sliding_window: int | None,
    ) -> tuple[jax.Array, Cache]:
        with jax.named_scope("self_attn"):
            attended_TD, cache = self.self_attn(
                self._whole(self.input_layernorm(x_TD)), cache, layer, step, sliding_window
            )
            x_TD = x_TD + attended_TD
        with jax.named_scope("mlp"):
            x_TD = x_TD + self.mlp(self._whole(self.post_attention_layernorm(x_TD)), step)
        return x_TD, cache

    def _whole(self, x_TD: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x_TD, self._residual.whole)


class HeadAttention:
    """Rotation, the kernel and the reshapes between them: what comes between the projections.

    Holds no parameters, so that each architecture's attention shows its own projections and norms.
    """

    def __init__(self, build: Build) -> None:
        self._num_heads = build.layout.num_heads
        self._num_kv_heads = build.layout.num_kv_heads
        self._head_dim = build.config.head_dim
        is_tpu = build.mesh.devices.flat[0].platform == "tpu"
        self._rotate = rotate_by_product if is_tpu else rotate

    def split_query(self, q: jax.Array) -> jax.Array:
        """[T, N * H] → [T, N, H]."""
        return q.reshape(q.shape[0], self._num_heads, self._head_dim)

    def split_kv(self, kv: jax.Array) -> jax.Array:
        """[T, K * H] → [T, K, H]."""
        return kv.reshape(kv.shape[0], self._num_kv_heads, self._head_dim)

    def __call__(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: ArrayLike,
        step: StepContext,
        sliding_window: int | None,
    ) -> tuple[jax.Array, Cache]:
        """Rotate, store, attend.

        Returns:
            [T, N * H] in the dtype of `q_TNH`, and the cache.
        """
        q_TNH = self._rotate(q_TNH, step.cosines, step.sines)
        k_TKH = self._rotate(k_TKH, step.cosines, step.sines)
        if step.query_scale is not None:
            q_TNH = (q_TNH.astype(jnp.float32) * step.query_scale).astype(q_TNH.dtype)
        out_TNH, cache = step.attention.attend(
            q_TNH,
            k_TKH,
            v_TKH,
            cache,
            layer,
            step.metadata,
            sm_scale=self._head_dim**-0.5,
            sliding_window=sliding_window,
        )
        return out_TNH.reshape(out_TNH.shape[0], -1), cache
