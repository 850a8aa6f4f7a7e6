"""A mixture of experts in place of a layer's MLP: routing, the experts' products, their sum.

Every device has a part of every expert, as it has of a dense MLP: devices never wait for one whose
experts are in demand, and one sum over the devices ends the layer. Each device chooses a token's
experts for itself, in float32. Tokens of a bucket's padding have none.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from engine.kernels.grouped_product import grouped_products
from engine.kernels.packed_weight import PackedWeight, products
from engine.kernels.token_experts import likeliest_experts, running_counts, sum_of_experts
from engine.models.layers import Build, GatedMLP, StepContext, parameter, weight_scale
from engine.models.names import CheckpointTensor
from engine.models.quantization import quantize_rows
from engine.sharding import TENSOR_AXIS, named_sharding

_Arrays = tuple[Any, Any]
"""A map's weights of all experts and their scales, None where they are not quantised."""


class RoutingMap(nnx.Module):
    """x W^T in float32: its sums are compared, and those that bfloat16 would tie are not alike."""

    def __init__(self, build: Build, out_axis: str) -> None:
        self.weight = parameter(build, out_axis, "embed")
        self._mesh = build.mesh

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] → float32 [T, out]."""
        weight = self.weight.get_value()
        (out,) = products(x_TD, [weight], jnp.float32, self._mesh)
        return out


class ExpertsLinear(nnx.Module):
    """The same linear map of all experts, [E, out, in]."""

    def __init__(self, build: Build, out_axis: str, in_axis: str) -> None:
        self.weight = parameter(build, "experts", out_axis, in_axis)
        self.scale = weight_scale(build, "experts", out_axis)
        self._mesh = build.mesh
        self._axes = ("experts", out_axis, in_axis)

    @property
    def arrays(self) -> _Arrays:
        """For `jax.shard_map` to cut."""
        return self.weight.get_value(), None if self.scale is None else self.scale[...]

    @property
    def partition_specs(self) -> _Arrays:
        """How `arrays` go over the mesh."""
        weight, scale = self.arrays
        spec = named_sharding(self._mesh, self._axes).spec
        scale_spec = None if scale is None else named_sharding(self._mesh, self._axes[:2]).spec
        return weight.partition_specs if isinstance(weight, PackedWeight) else spec, scale_spec


class Experts(nnx.Module):
    """down(silu(gate(x)) * up(x)), with weights of one's own for each expert."""

    def __init__(self, build: Build) -> None:
        self.gate_proj = ExpertsLinear(build, "expert_ffn", "embed")
        self.up_proj = ExpertsLinear(build, "expert_ffn", "embed")
        self.down_proj = ExpertsLinear(build, "embed", "expert_ffn")


class SparseMLP(nnx.Module):
    """Each token through the experts that it is routed to; through a shared one, if there is one.

    The shared expert's output is weighed by the sigmoid of a map of its own.
    """

    def __init__(self, build: Build) -> None:
        config = build.config.experts
        assert config is not None, "a sparse layer has experts"
        self.gate = RoutingMap(build, "experts")
        self.experts = Experts(build)
        has_shared = config.shared_intermediate_size > 0
        self.shared_expert = GatedMLP(build, "shared_ffn") if has_shared else None
        self.shared_expert_gate = RoutingMap(build, "shared_gate") if has_shared else None
        self._config = config
        self._residual = build.residual
        self._platform = build.mesh.devices.flat[0].platform

    def __call__(self, x_TD: jax.Array, step: StepContext) -> jax.Array:
        with jax.named_scope("route"):
            weight_TX, expert_TX = self._route(x_TD, step.metadata.position_T >= 0)
        with jax.named_scope("experts"):
            out_TD = self._run_experts(x_TD, weight_TX, expert_TX)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return out_TD
        with jax.named_scope("shared_expert"):
            weight_T1 = jax.nn.sigmoid(self.shared_expert_gate(x_TD))
            shared_TD = self.shared_expert(x_TD, step)
            return out_TD + (weight_T1 * shared_TD).astype(out_TD.dtype)

    def _route(self, x_TD: jax.Array, is_real_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Choose experts: float32 [T, X], what each one's output is multiplied by, and which.

        Padding's number is that of an expert behind the last one.
        """
        probabilities_TE = jax.nn.softmax(self.gate(x_TD), axis=-1)
        weight_TX, expert_TX = likeliest_experts(
            probabilities_TE, self._config.experts_per_token, platform=self._platform
        )
        if self._config.has_normed_weights:
            weight_TX = weight_TX / jnp.sum(weight_TX, axis=-1, keepdims=True)
        return weight_TX, jnp.where(is_real_T[:, None], expert_TX, self._config.num_experts)

    def _run_experts(
        self, x_TD: jax.Array, weight_TX: jax.Array, expert_TX: jax.Array
    ) -> jax.Array:
        """[T, D], the weighted sum of each token's experts, lying as the residual stream does."""
        mesh, num_experts = self._residual.mesh, self._config.num_experts
        out_spec = self._residual.sharding(len(x_TD)).spec
        linears = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj

        def run_part(
            x_TD: jax.Array, weight_TX: jax.Array, expert_TX: jax.Array, *arrays: _Arrays
        ) -> jax.Array:
            pairs = sort_pairs(expert_TX, num_experts, platform=self._platform)
            part = _ExpertsPart(pairs, x_TD.dtype, self._platform, mesh.size)
            out_TD = part.weighted_sum(x_TD, weight_TX, *arrays)
            if out_spec[0] is None:
                return jax.lax.psum(out_TD, TENSOR_AXIS)
            return jax.lax.psum_scatter(out_TD, TENSOR_AXIS, tiled=True)

        whole = PartitionSpec()
        return jax.shard_map(
            run_part,
            mesh=mesh,
            in_specs=(whole, whole, whole, *(linear.partition_specs for linear in linears)),
            out_specs=out_spec,
            check_vma=False,
        )(x_TD, weight_TX, expert_TX, *(linear.arrays for linear in linears))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs (P = T * X) of a token and one of its experts, sorted by expert.

    Worked for three tokens of two experts each, of three; the last token is padding:

        expert_TX     2 0    0 1    3 3
        token_P         0 1     1     0   0 0      of experts 0, 1, 2 and none
        starts          0       2     3   4
        place_TX      3 0    1 2    anywhere

    Attributes:
        token_P: int32: whose pair it is; behind the last expert's pairs any token.
        starts: int32 [E + 1]: where each expert's pairs begin, and where the last one's end.
        place_TX: int32: where a token's pairs are; for padding any place.
        is_real_T: bool: whether the token has experts.
    """

    token_P: jax.Array
    starts: jax.Array
    place_TX: jax.Array
    is_real_T: jax.Array

    @property
    def expert_of_pair(self) -> jax.Array:
        """int32 [P]: whose rows a pair is among; behind the last expert's pairs the last one."""
        place_P = jnp.arange(len(self.token_P), dtype=jnp.int32)
        ends_E = self.starts[1:-1]
        return jnp.sum(ends_E[None, :] <= place_P[:, None], axis=1, dtype=jnp.int32)


def sort_pairs(expert_TX: jax.Array, num_experts: int, *, platform: str) -> Pairs:
    """Sort tokens' experts, each expert's by token.

    By counting, because over a sort the TPU's compiler takes ten seconds, and there is one a layer;
    and one choice after the other, over which it takes a tenth of what it does over all at once.

    Args:
        expert_TX: int32, of a token all different; `num_experts` for each of a padding token's.
        num_experts: In all.
        platform: Of the device.
    """
    num_tokens, num_chosen = expert_TX.shape
    expert_TE = jax.lax.broadcasted_iota(jnp.int32, (num_tokens, num_experts), 1)
    number_TX = jax.lax.broadcasted_iota(jnp.int32, expert_TX.shape, 1)

    def is_choice(number: jax.Array) -> jax.Array:
        return expert_TE == jax.lax.dynamic_slice_in_dim(expert_TX, number, 1, axis=1)

    def choose(number: jax.Array, chosen_TE: jax.Array) -> jax.Array:
        return chosen_TE + is_choice(number)

    chosen_TE = jax.lax.fori_loop(0, num_chosen, choose, jnp.zeros_like(expert_TE))
    up_to_TE = running_counts(chosen_TE, platform=platform)
    starts = jnp.pad(jnp.cumsum(up_to_TE[-1]), (1, 0))
    place_TE = starts[None, :-1] + up_to_TE - chosen_TE

    def find_place(number: jax.Array, place_TX: jax.Array) -> jax.Array:
        place_T1 = jnp.sum(jnp.where(is_choice(number), place_TE, 0), axis=1, keepdims=True)
        return jnp.where(number_TX == number, place_T1, place_TX)

    place_TX = jax.lax.fori_loop(0, num_chosen, find_place, jnp.zeros_like(expert_TX))
    is_real_T = expert_TX[:, 0] < num_experts
    # Padding's pairs have no place, and are dropped.
    to_TX = jnp.where(is_real_T[:, None], place_TX, num_tokens * num_chosen)
    token_TX = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], to_TX.shape)
    nothing_P = jnp.zeros(num_tokens * num_chosen, jnp.int32)
    return Pairs(
        token_P=nothing_P.at[to_TX.reshape(-1)].set(token_TX.reshape(-1), mode="drop"),
        starts=starts,
        place_TX=place_TX,
        is_real_T=is_real_T,
    )


@dataclass(frozen=True, slots=True)
class _ExpertsPart:
    """What one device does of a step's experts, within `jax.shard_map`."""

    pairs: Pairs
    dtype: jnp.dtype
    platform: str
    num_shards: int

    def weighted_sum(
        self, x_TD: jax.Array, weight_TX: jax.Array, gate: _Arrays, up: _Arrays, down: _Arrays
    ) -> jax.Array:
        """This device's part of the sum over each token's experts: [T, D]."""
        pairs = self.pairs
        is_quantized = gate[1] is not None
        x, scale_T = quantize_rows(x_TD) if is_quantized else (x_TD, None)
        scale_P = None if scale_T is None else scale_T[pairs.token_P]
        gate_PF, up_PF = self._map(x[pairs.token_P], scale_P, gate, up)
        hidden, scale_P = jax.nn.silu(gate_PF) * up_PF, None
        if is_quantized:
            # A row's inputs of the last map lie on all devices, and have one scale.
            hidden, scale_P = quantize_rows(hidden, axis_name=TENSOR_AXIS)
        (out_PD,) = self._map(hidden, scale_P, down)
        out_TD = sum_of_experts(out_PD, pairs.place_TX, weight_TX, platform=self.platform)
        # Of padding nothing was computed, and anything may stand there.
        return jnp.where(pairs.is_real_T[:, None], out_TD, 0).astype(self.dtype)

    def _map(
        self, x_PD: jax.Array, scale_P: jax.Array | None, *linears: _Arrays
    ) -> list[jax.Array]:
        found = grouped_products(
            x_PD,
            [weight for weight, _ in linears],
            self.pairs.starts,
            self.dtype if scale_P is None else jnp.int32,
            platform=self.platform,
            num_shards=self.num_shards,
        )
        if scale_P is None:
            return found
        scales = [scale_EF[self.pairs.expert_of_pair] for _, scale_EF in linears]
        return [
            (product.astype(jnp.float32) * scale_P[:, None] * scale_PF).astype(self.dtype)
            for product, scale_PF in zip(found, scales, strict=True)
        ]


SPARSE_NAMES = {
    "layers.*.mlp.gate.weight": CheckpointTensor("model.layers.*.mlp.gate.weight"),
    **{
        f"layers.*.mlp.experts.{name}.weight": CheckpointTensor(
            f"model.layers.*.mlp.experts.#.{name}.weight"
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}
"""Where a sparse layer's parameters lie in a checkpoint, but for a shared expert's."""
