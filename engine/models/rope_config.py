"""How a checkpoint's positions turn its queries and keys, as config.json says it. No JAX here."""

import math
from dataclasses import dataclass

from engine.errors import CheckpointError
from engine.models.json_fields import JsonFields

_MAX_YARN_FACTOR = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn queries and keys.

    Attributes:
        theta: Base of the wavelengths.
        yarn: Stretched by YaRN (arXiv:2309.00071), or None.
        dynamic_ntk_len: Prompts longer than this raise the base (Qwen1), or None.
        log_n_len: Queries at positions past this are scaled by log_len(position + 1) (Qwen1), or
            None.
    """

    theta: float
    yarn: "YarnConfig | None" = None
    dynamic_ntk_len: int | None = None
    log_n_len: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN's parameters.

    Attributes:
        factor: How many times longer the context is than the trained one.
        original_len: Context that the model was trained with.
        beta_fast: Wavelengths that turn more often than this in `original_len` stay.
        beta_slow: Wavelengths that turn less often than this are stretched by `factor`.
        attention_factor: Factor on cosines and sines.
        truncate: Whether the bounds between them are rounded outwards to whole dimensions.
    """

    factor: float
    original_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True


def read_rope_config(fields: JsonFields, max_position: int) -> RopeConfig:
    """Read the configurations of Qwen2 and Qwen3, in old and new spelling.

    Args:
        fields: config.json.
        max_position: Its max_position_embeddings.

    Raises:
        CheckpointError: Values out of bounds, or a kind of scaling that is not supported.
    """
    # transformers 5 writes one object, rope_parameters; before, rope_theta stood at the top level
    # and rope_scaling held the rest, its kind called "type" in the oldest.
    rope = fields.mapping("rope_parameters")
    if not rope.values:
        rope = fields.mapping("rope_scaling")
    theta = (rope if rope.values.get("rope_theta") else fields).number(
        "rope_theta", default=10000.0
    )
    if theta <= 1:
        raise CheckpointError(f"{fields.path}: rope_theta is {theta}; it must be above 1.")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise CheckpointError(
            f"{fields.path}: rope scaling {kind!r} is not supported. Supported: default, yarn."
        )
    original_len = rope.integer("original_max_position_embeddings", default=max_position)
    factor = rope.number("factor", default=max_position / original_len)
    if not 1 <= factor <= _MAX_YARN_FACTOR:
        raise CheckpointError(
            f"{fields.path}: YaRN's factor is {factor}; it must be 1 to {_MAX_YARN_FACTOR}."
        )
    return RopeConfig(
        theta=theta,
        yarn=YarnConfig(
            factor=factor,
            original_len=original_len,
            beta_fast=rope.number("beta_fast", default=32.0),
            beta_slow=rope.number("beta_slow", default=1.0),
            attention_factor=rope.number("attention_factor", default=0.1 * math.log(factor) + 1.0),
            truncate=rope.flag("truncate", True),
        ),
    )
