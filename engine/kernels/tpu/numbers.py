"""Arithmetic on numbers that a kernel knows while it is traced, or only when it runs.

What is known is computed in Python, so that a kernel built for constant lengths has constant loops.
In a kernel `//` on traced numbers would ask the device for its kind; `lax.div` does not.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Number = int | jax.Array
T = TypeVar("T")


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


def clip(number: Number, lowest: Number, highest: Number) -> Number:
    return smaller(larger(number, lowest), highest)


def where(condition: bool | jax.Array, left: Number, right: Number) -> Number:
    if isinstance(condition, bool):
        return left if condition else right
    return jnp.where(condition, left, right)


def choose(branches: list[tuple[bool | jax.Array, Callable[[], T]]]) -> T:
    """What the first function returns whose condition holds; the last one needs none."""
    (condition, body), *others = branches
    if not others or condition is True:
        return body()
    if condition is False:
        return choose(others)
    return lax.cond(condition, body, lambda: choose(others))


def repeat(stop: Number, body: Callable[[Number], None], *, first: Number = 0) -> None:
    """Call the body for each number from `first` to before `stop`, in a loop."""
    if isinstance(first, int) and isinstance(stop, int) and stop <= first:
        return
    lax.fori_loop(first, stop, lambda number, _: body(number), None)


def unroll(stop: Number, body: Callable[[Number], None], *, first: Number = 0) -> None:
    """As `repeat`, of known numbers, without a loop."""
    assert isinstance(first, int)
    assert isinstance(stop, int)
    for number in range(first, stop):
        body(number)
