"""Our own product on CPUs against NumPy's, in float64, for every instruction set that is here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from instruction_sets import is_available

from engine.kernels import packed_weight
from engine.kernels.native.arithmetic import (
    AVX2,
    AVX512,
    AVX512_BFLOAT16,
    InstructionSet,
    host_instruction_set,
)
from engine.kernels.packed_weight import PackedWeight, can_pack, pack_weights
from engine.sharding import make_mesh, named_sharding

pytestmark = pytest.mark.skipif(not can_pack(jnp.bfloat16), reason="no kernel for this processor")

NUM_LAYERS = 2
# As many rows as go through a panel together, one more, one less, and several times that.
ROWS = (1, 2, 4, 5, 6, 7, 13)


@pytest.fixture(params=["AVX512_BFLOAT16", "AVX512", "AVX2"])
def isa(request, monkeypatch) -> InstructionSet:
    """Each instruction set, its products registered under names of their own."""
    isa = globals()[request.param]
    if not is_available(isa):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(packed_weight, "host_instruction_set", lambda: isa)
    monkeypatch.setattr(
        packed_weight, "_target", lambda dtype: f"{request.param}_{jnp.dtype(dtype).name}"
    )
    return isa


def random_weights(num_outputs: int, num_inputs: int) -> list[np.ndarray]:
    generator = np.random.default_rng(num_outputs * 1000 + num_inputs)
    return [
        generator.standard_normal((num_outputs, num_inputs)).astype(jnp.bfloat16)
        for _ in range(NUM_LAYERS)
    ]


def pack(weights: list[np.ndarray], tp_size: int, *axes: str) -> PackedWeight:
    sharding = named_sharding(make_mesh(tp_size, jax.devices()[:tp_size]), axes)
    return pack_weights([jax.device_put(weight, sharding) for weight in weights])


def product(packed: PackedWeight, x: np.ndarray, dtype: str, tp_size: int = 1) -> np.ndarray:
    mesh = make_mesh(tp_size, jax.devices()[:tp_size])
    return np.asarray(jax.jit(lambda w, x: w.product(x, dtype, mesh))(packed, jnp.asarray(x)))


# Whole panels; a panel that is not full; fewer outputs than a panel; inputs that do not pair up.
@pytest.mark.parametrize("shape", [(128, 64), (150, 66), (3, 130), (70, 33)])
def test_products_are_those_of_numpy(isa: InstructionSet, shape: tuple[int, int]):
    weights = random_weights(*shape)
    packed = pack(weights, 1, "ffn", "embed")
    for num_rows in ROWS:
        x = np.random.default_rng(num_rows).standard_normal((num_rows, shape[1]))
        x = x.astype(jnp.bfloat16)
        for layer, weight in enumerate(weights):
            expected = x.astype(np.float64) @ weight.astype(np.float64).T
            exact = product(packed.at_layer(layer), x, "float32")
            np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-4)
            rounded = product(packed.at_layer(layer), x, "bfloat16")
            np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.skipif(not can_pack(jnp.int8), reason="no kernel for this processor")
@pytest.mark.parametrize(
    ("shape", "tp_size", "axes"),
    [
        ((128, 64), 1, ("ffn", "embed")),
        ((70, 33), 1, ("ffn", "embed")),
        ((150, 129), 3, ("ffn", "embed")),
        ((150, 129), 3, ("embed", "ffn")),
    ],
)
def test_products_of_integers_are_exact(
    shape: tuple[int, int], tp_size: int, axes: tuple[str, str]
):
    generator = np.random.default_rng(0)
    weights = [generator.integers(-128, 128, shape).astype(np.int8) for _ in range(NUM_LAYERS)]
    packed = pack(weights, tp_size, *axes)
    for num_rows in ROWS:
        x = generator.integers(-128, 128, (num_rows, shape[1])).astype(np.int8)
        for layer, weight in enumerate(weights):
            got = product(packed.at_layer(layer), x, "int32", tp_size)
            np.testing.assert_array_equal(got, x.astype(np.int64) @ weight.astype(np.int64).T)


@pytest.mark.parametrize("axes", [("ffn", "embed"), ("embed", "ffn")])
def test_devices_share_outputs_or_inputs(isa: InstructionSet, axes: tuple[str, str]):
    # A third of either is neither whole panels nor, for inputs, whole pairs.
    weights = random_weights(150, 129)
    packed = pack(weights, 3, *axes)
    x = np.random.default_rng(0).standard_normal((5, 129)).astype(jnp.bfloat16)
    expected = x.astype(np.float64) @ weights[1].astype(np.float64).T
    got = product(packed.at_layer(1), x, "float32", tp_size=3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_maps_side_by_side_give_what_each_gives_alone(tp_size: int, dtype: str):
    if not can_pack(dtype):
        pytest.skip("no kernel for this processor")
    mesh = make_mesh(tp_size, jax.devices()[:tp_size])
    sharding = named_sharding(mesh, ("ffn", "embed"))
    # Whole panels, less than one, and a rest at the end of a device's share.
    maps = [
        [jnp.asarray(weight * 40, dtype) for weight in random_weights(num_outputs, 66)]
        for num_outputs in (384, 9, 150)
    ]

    def placed(weights: list[jax.Array]) -> list[jax.Array]:
        return [jax.device_put(weight, sharding) for weight in weights]

    joined = pack_weights(*map(placed, maps))
    out = "int32" if dtype == "int8" else "bfloat16"
    for num_rows in (1, 7):
        x = np.random.default_rng(num_rows).standard_normal((num_rows, 66)) * 40
        x = jnp.asarray(x, dtype)
        for layer in range(NUM_LAYERS):
            got = jax.jit(lambda w, x: w.products(x, out, mesh))(joined.at_layer(layer), x)
            for part, weights in zip(got, maps, strict=True):
                alone = pack_weights(placed(weights)).at_layer(layer)
                np.testing.assert_array_equal(part, product(alone, np.asarray(x), out, tp_size))


def test_a_row_does_not_depend_on_the_rows_beside_it(isa: InstructionSet):
    packed = pack(random_weights(128, 512), 1, "ffn", "embed")
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(jnp.bfloat16)
    together = product(packed, x, "float32")
    for row in (0, 5, 39):
        np.testing.assert_array_equal(
            product(packed, x[row : row + 1], "float32")[0], together[row]
        )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_what_is_not_finite_stays_so(isa: InstructionSet, value: float):
    packed = pack([np.full((20, 8), 2, jnp.bfloat16)], 1, "ffn", "embed")
    x = np.zeros((2, 8), jnp.bfloat16)
    x[1, 3] = value
    got = product(packed, x, "bfloat16").astype(np.float32)
    assert (got[0] == 0).all()
    # Twice the last is beyond what a float holds.
    np.testing.assert_array_equal(got[1], np.full(20, np.inf if value > 1 else value))


@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_rows_of_an_embedding_table_come_back_as_they_were(tp_size: int, dtype: type):
    if not can_pack(dtype):
        pytest.skip("no kernel for this processor")
    weights = [(weight * 40).astype(dtype) for weight in random_weights(501, 34)]
    packed = pack(weights, tp_size, "vocab", "embed")
    mesh = make_mesh(tp_size, jax.devices()[:tp_size])
    ids = np.array([0, 500, 166, 167, 334, 7], np.int32)
    got = jax.jit(lambda w, ids: w.rows(ids, mesh))(packed, jnp.asarray(ids))
    np.testing.assert_array_equal(got, weights[0][ids])


def test_weights_are_given_up_as_they_are_packed():
    sharding = named_sharding(make_mesh(1, jax.devices()[:1]), ("ffn", "embed"))
    weights = [jax.device_put(weight, sharding) for weight in random_weights(64, 64)]
    pack_weights(weights)
    assert not weights


def test_the_kernel_for_this_machine_is_the_best_that_it_has():
    best = next(isa for isa in (AVX512_BFLOAT16, AVX512, AVX2) if is_available(isa))
    chosen = host_instruction_set()
    assert chosen is not None
    assert replace(chosen, has_int8_dot=False) == best
