"""Host arrays that JAX's CPU devices take as they are, without copying them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64
"""Bytes. What XLA's code for CPUs may count on; arrays that begin elsewhere are copied."""


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Make a C-contiguous array of zeros whose memory `jax.device_put` can share on CPUs.

    Whoever puts it on a device must not write to it any more.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def from_device_arrays(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, parts: Mapping[Any, np.ndarray]
) -> jax.Array:
    """Make one array of what this process's devices are to hold of it."""
    placed = [jax.device_put(part, device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)
