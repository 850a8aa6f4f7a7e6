import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.rope import rotate, rotate_by_product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_by_a_product_is_the_rotation(head_dim: int, dtype: str) -> None:
    rng = np.random.default_rng(head_dim)
    x_TNH = jnp.asarray(rng.standard_normal((17, 3, head_dim)), dtype)
    angles = rng.uniform(0, 1000, (17, head_dim // 2)).astype(np.float32)
    tables = jnp.cos(angles), jnp.sin(angles)
    turned_TNH = rotate_by_product(x_TNH, *tables)
    assert turned_TNH.dtype == x_TNH.dtype
    np.testing.assert_array_equal(turned_TNH, rotate(x_TNH, *tables))
