"""Arithmetic on numbers that a kernel knows while it is traced, or only when it runs.

What is known is computed in Python, so that a kernel built for constant lengths has constant loops.
In a kernel `//` on traced numbers would ask the device for its kind; `lax.div` does not.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Number = int | jax.Array


def floor_div(number: Number, divisor: int) -> Number:
    """For numbers that are not negative."""
    return number // divisor if isinstance(number, int) else lax.div(number, jnp.int32(divisor))


def ceil_div(number: Number, divisor: int) -> Number:
    """For numbers that are not negative."""
    return floor_div(number + (divisor - 1), divisor)


def remainder(number: Number, divisor: int) -> Number:
    """For numbers that are not negative."""
    return number % divisor if isinstance(number, int) else lax.rem(number, jnp.int32(divisor))


def larger(left: Number, right: Number) -> Number:
    is_known = isinstance(left, int) and isinstance(right, int)
    return max(left, right) if is_known else jnp.maximum(left, right)


def smaller(left: Number, right: Number) -> Number:
    is_known = isinstance(left, int) and isinstance(right, int)
    return min(left, right) if is_known else jnp.minimum(left, right)


def where(condition: bool | jax.Array, left: Number, right: Number) -> Number:
    if isinstance(condition, bool):
        return left if condition else right
    return jnp.where(condition, left, right)


def repeat(stop: Number, body: Callable[[Number], None], *, first: Number = 0) -> None:
    """Call the body for each number from `first` to before `stop`, in a loop."""
    if isinstance(first, int) and isinstance(stop, int) and stop <= first:
        return
    lax.fori_loop(first, stop, lambda number, _: body(number), None)
