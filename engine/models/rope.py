"""Rotary position embedding: plain, stretched by YaRN, and Qwen1's dynamic NTK.

Angles are computed in float32 from integer positions: at position 30,000 a bfloat16 angle would be
off by more than a whole turn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.rope_config import RopeConfig, YarnConfig


def inverse_wavelengths(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return float32 [head_dim / 2], radians per position of each pair of dimensions."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.yarn is not None:
        plain = _stretch(plain, rope.theta, rope.yarn, head_dim)
    return plain.astype(np.float32)


def _stretch(plain: np.ndarray, theta: float, yarn: YarnConfig, head_dim: int) -> np.ndarray:
    """Blend plain and `factor` times longer wavelengths, as section 3.2 of arXiv:2309.00071."""

    def dimension(num_turns: float) -> float:
        # The pair of dimensions that turns that often within the trained context.
        wavelength = yarn.original_len / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)
    stretched_share = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return plain * (1 - stretched_share) + plain / yarn.factor * stretched_share


def rope_tables(
    rope: RopeConfig, head_dim: int, position_T: jax.Array, rope_alpha_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute cosines and sines for one step's tokens.

    Args:
        rope: The model's.
        head_dim: Dimensions of a head.
        position_T: int32; padding's -1 gives values that nobody reads.
        rope_alpha_T: float32, each token's factor on the base; read only by models with dynamic
            NTK.

    Returns:
        Two float32 arrays [T, head_dim / 2].
    """
    wavelengths = jnp.asarray(inverse_wavelengths(rope, head_dim))[None, :]
    if rope.dynamic_ntk_len is not None:
        # (theta * alpha ** (H / (H - 2))) ** (-2i / H), with alpha's part as a factor, so that
        # alpha 1 changes no bit.
        exponent = -np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim - 2)
        wavelengths = wavelengths * rope_alpha_T[:, None] ** exponent[None, :]
    angles = position_T.astype(jnp.float32)[:, None] * wavelengths
    scale = rope.yarn.attention_factor if rope.yarn is not None else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_TNH: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turn each pair (h, h + H/2) of every head by its token's angle.

    Computed in float32 and rounded once: in bfloat16 the two products would each lose bits that
    their difference needs.
    """
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[:, None, :], sines[:, None, :]
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(x_TNH.dtype)


def rotate_by_product(x_TNH: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """As `rotate`, to the last bit, with whole vectors where that works on halves of them.

    The halves of a head change places in a product with a permutation, which is exact: each sum has
    one term that is not zero. A TPU has a unit for products, and none for vectors of 64.
    """
    half = x_TNH.shape[-1] // 2
    swap = np.roll(np.eye(2 * half, dtype=np.float32), half, axis=1)
    swapped_TNH = jax.lax.dot_general(
        x_TNH,
        jnp.asarray(swap, x_TNH.dtype),
        (((2,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cosines = jnp.concatenate([cosines, cosines], axis=-1)[:, None, :]
    sines = jnp.concatenate([-sines, sines], axis=-1)[:, None, :]
    turned_TNH = x_TNH.astype(jnp.float32) * cosines + swapped_TNH * sines
    return turned_TNH.astype(x_TNH.dtype)


def log_n_scale(position_T: jax.Array, trained_len: int) -> jax.Array:
    """Return float32 [T], Qwen1's factor on queries: log_trained(position + 1), at least 1."""
    length_T = jnp.maximum(position_T + 1, trained_len).astype(jnp.float32)
    return jnp.log(length_T) / math.log(trained_len)
