"""How a mixture of experts is made up, out of config.json.

Must not import JAX: the leader and the routers read configurations too.
"""

from dataclasses import dataclass

from engine.errors import CheckpointError
from engine.models.json_fields import JsonFields

EXPERTS_REQUIRED = (
    ("num_experts", "num_local_experts"),
    ("num_experts_per_tok",),
    ("moe_intermediate_size",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The experts of a model's sparse layers.

    Attributes:
        num_experts: Of a sparse layer.
        experts_per_token: How many of them a token goes through.
        intermediate_size: Width of one expert, which is a gated MLP.
        shared_intermediate_size: Width of the expert that every token goes through beside its own;
            0 = there is none.
        has_normed_weights: Whether the weights of a token's experts are made to sum to 1.
        sparse_layers: Per layer, whether it has experts; else it has a dense MLP.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    has_normed_weights: bool
    sparse_layers: tuple[bool, ...]


def read_experts_config(
    fields: JsonFields, num_layers: int, *, has_shared_expert: bool
) -> ExpertsConfig:
    """Read what config.json says of experts.

    Args:
        fields: Of config.json.
        num_layers: Of the model.
        has_shared_expert: Whether the architecture has one.

    Raises:
        CheckpointError: A value is malformed, or no layer would have experts.
    """
    num_experts = fields.integer("num_experts", "num_local_experts")
    experts_per_token = fields.integer("num_experts_per_tok")
    if experts_per_token > num_experts:
        raise CheckpointError(
            f"{fields.path}: num_experts_per_tok {experts_per_token} is more than num_experts "
            f"{num_experts}."
        )
    dense_layers = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in dense_layers
    ):
        raise CheckpointError(
            f"{fields.path}: mlp_only_layers is {dense_layers!r}; it must be a list of layers."
        )
    sparse_step = fields.integer("decoder_sparse_step", default=1)
    sparse_layers = tuple(
        layer not in dense_layers and (layer + 1) % sparse_step == 0 for layer in range(num_layers)
    )
    if not any(sparse_layers):
        raise CheckpointError(
            f"{fields.path}: decoder_sparse_step {sparse_step} and mlp_only_layers leave none of "
            f"{num_layers} layers with experts."
        )
    return ExpertsConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        intermediate_size=fields.integer("moe_intermediate_size"),
        shared_intermediate_size=(
            fields.integer("shared_expert_intermediate_size") if has_shared_expert else 0
        ),
        has_normed_weights=fields.flag("norm_topk_prob", False),
        sparse_layers=sparse_layers,
    )
