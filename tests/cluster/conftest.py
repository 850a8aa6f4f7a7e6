"""A Ray of the test session's own, started by the first test that asks for it."""

from collections.abc import Iterator

import pytest
from own_ray import own_ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray as `own_ray` makes it."""
    with own_ray():
        yield
