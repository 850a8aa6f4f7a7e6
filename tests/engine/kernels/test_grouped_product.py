"""Products of rows with their experts' weights against NumPy's, in each way that there is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from engine.kernels.grouped_product import BLOCK_ROWS, grouped_products
from engine.kernels.packed_weight import PackedWeight, can_pack, pack_weights
from engine.kernels.tpu import grouped_matmul
from engine.kernels.tpu.kv_rows import LANES
from engine.sharding import make_mesh, named_sharding

NUM_EXPERTS = 5
# Rows of each expert: none, one, as many as a block has and one more; then rows that are no one's.
SIZES = (0, 1, BLOCK_ROWS + 1, 0, 2 * BLOCK_ROWS)
NUM_ROWS = sum(SIZES) + 3
STARTS = np.cumsum([0, *SIZES]).astype(np.int32)
EXPERT_OF_ROW = np.repeat(np.arange(NUM_EXPERTS), SIZES)


def random_array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    generator = np.random.default_rng(shape)
    if dtype == np.int8:
        return generator.integers(-128, 128, shape).astype(np.int8)
    return generator.standard_normal(shape).astype(dtype)


def expected(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of the rows that are an expert's."""
    kind = np.int64 if x.dtype == np.int8 else np.float64
    of_rows = weight.astype(kind)[EXPERT_OF_ROW]
    return np.einsum("pd,pfd->pf", x[: len(EXPERT_OF_ROW)].astype(kind), of_rows)


def compute(
    x: np.ndarray, weights: list[Any], dtype: Any, *, platform: str = "cpu", starts: Any = STARTS
) -> list[np.ndarray]:
    run = jax.jit(
        lambda x, starts: grouped_products(
            x, weights, starts, dtype, platform=platform, num_shards=1
        )
    )
    found = run(x, starts)
    return [np.asarray(product)[: starts[-1]] for product in found]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_products_are_those_of_numpy(platform: str) -> None:
    x, weight = random_array(NUM_ROWS, 24), random_array(NUM_EXPERTS, 40, 24)
    other = random_array(NUM_EXPERTS, 7, 24)
    found = compute(x, [jnp.asarray(weight), jnp.asarray(other)], jnp.float32, platform=platform)
    for got, each in zip(found, (weight, other), strict=True):
        np.testing.assert_allclose(got, expected(x, each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_products_of_integers_are_exact(platform: str) -> None:
    x = random_array(NUM_ROWS, 24, dtype=np.int8)
    weight = random_array(NUM_EXPERTS, 40, 24, dtype=np.int8)
    (got,) = compute(x, [jnp.asarray(weight)], jnp.int32, platform=platform)
    np.testing.assert_array_equal(got, expected(x, weight))


# As the TPU's layout has them, and with inputs along the sublanes; outputs in one tile and several.
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs"), [(40, 24), (48, 128), (256, 48), (300, 2 * LANES)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_kernel_of_tpus_interpreted_gives_the_products_of_numpy(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, num_outputs: int, num_inputs: int
) -> None:
    monkeypatch.setattr(grouped_matmul, "MOST_WEIGHT_BYTES", 2**16)
    x = random_array(NUM_ROWS, num_inputs, dtype=dtype)
    weight = random_array(NUM_EXPERTS, num_outputs, num_inputs, dtype=dtype)
    out = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def run(x: jax.Array, weight: jax.Array, starts: jax.Array) -> jax.Array:
        visits = grouped_matmul.plan_visits(starts, NUM_ROWS, dtype)
        return grouped_matmul.grouped_matmul(x, weight, visits, out, interpret=True)

    got = np.asarray(jax.jit(run)(x, weight, STARTS))[: STARTS[-1]]
    if dtype == jnp.int8:
        np.testing.assert_array_equal(got, expected(x, weight))
    else:
        np.testing.assert_allclose(got, expected(x, weight), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_each_tile_is_visited_once_by_each_expert_with_rows_in_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 40, 12) * generator.integers(0, 2, 12)
    starts = np.cumsum([0, *sizes]).astype(np.int32)
    num_rows = int(starts[-1]) + 5
    visits = grouped_matmul.plan_visits(jnp.asarray(starts), num_rows, jnp.float32)
    wanted = [
        (expert, tile)
        for expert in range(12)
        for tile in range(-(-num_rows // visits.tile_rows))
        if set(range(starts[expert], starts[expert + 1]))
        & set(range(tile * visits.tile_rows, (tile + 1) * visits.tile_rows))
    ]
    number = int(visits.number)
    pairs = zip(visits.expert.tolist(), visits.tile.tolist(), strict=True)
    assert list(pairs)[:number] == wanted


def pack(*maps: list[np.ndarray], tp_size: int = 1, axes: tuple[str, ...]) -> PackedWeight:
    sharding = named_sharding(make_mesh(tp_size, jax.devices()[:tp_size]), axes)
    return pack_weights(*[[jax.device_put(weight, sharding) for weight in each] for each in maps])


OUTWARD, INWARD = ("experts", "expert_ffn", "embed"), ("experts", "embed", "expert_ffn")


def compute_packed(
    packed: PackedWeight, x: np.ndarray, dtype: Any, tp_size: int, axes: tuple[str, ...]
) -> list[np.ndarray]:
    """The whole products, of a weight that lies over devices as its axes say."""
    mesh = make_mesh(tp_size, jax.devices()[:tp_size])
    is_inward = axes == INWARD
    split = PartitionSpec(None, "tp")

    def run(x: jax.Array, packed: PackedWeight) -> list[jax.Array]:
        found = grouped_products(
            x, [packed], jnp.asarray(STARTS), dtype, platform="cpu", num_shards=tp_size
        )
        return [jax.lax.psum(out, "tp") if is_inward else out for out in found]

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(split if is_inward else PartitionSpec(), packed.partition_specs),
        out_specs=PartitionSpec() if is_inward else split,
        check_vma=False,
    )
    return [np.asarray(product)[: STARTS[-1]] for product in jax.jit(sharded)(x, packed)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(
    ("tp_size", "axes"), [(1, OUTWARD), (1, INWARD), (3, OUTWARD), (3, INWARD)]
)
def test_packed_weights_give_the_products_of_numpy(
    dtype: Any, tp_size: int, axes: tuple[str, ...]
) -> None:
    if not can_pack(dtype):
        pytest.skip("no kernel for this processor")
    # A third of either is neither whole panels nor, for inputs, whole words.
    num_outputs, num_inputs = 150, 129
    layers = [random_array(NUM_EXPERTS, num_outputs, num_inputs, dtype=dtype) for _ in range(2)]
    layers[1] = layers[1][::-1].copy()
    packed = pack(list(layers), tp_size=tp_size, axes=axes)
    x = random_array(NUM_ROWS, num_inputs, dtype=dtype)
    out = jnp.int32 if dtype == jnp.int8 else jnp.float32
    for layer, weight in enumerate(layers):
        (got,) = compute_packed(packed.at_layer(layer), x, out, tp_size, axes)
        if dtype == jnp.int8:
            np.testing.assert_array_equal(got, expected(x, weight))
        else:
            np.testing.assert_allclose(got, expected(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not can_pack(jnp.bfloat16), reason="no kernel for this processor")
def test_maps_side_by_side_give_what_each_gives_alone() -> None:
    maps = [random_array(NUM_EXPERTS, size, 66, dtype=jnp.bfloat16) for size in (70, 150)]
    x = random_array(NUM_ROWS, 66, dtype=jnp.bfloat16)
    joined = pack(*[[weight] for weight in maps], tp_size=1, axes=OUTWARD)
    together = compute_packed(joined, x, jnp.bfloat16, 1, OUTWARD)
    for got, weight in zip(together, maps, strict=True):
        alone = pack([weight], axes=OUTWARD)
        (expected_alone,) = compute_packed(alone, x, jnp.bfloat16, 1, OUTWARD)
        np.testing.assert_array_equal(got, expected_alone)


def test_weights_of_experts_are_given_up_as_they_are_packed() -> None:
    if not can_pack(jnp.bfloat16):
        pytest.skip("no kernel for this processor")
    sharding = named_sharding(make_mesh(1, jax.devices()[:1]), OUTWARD)
    weights = [jax.device_put(random_array(3, 64, 64, dtype=jnp.bfloat16), sharding)]
    pack_weights(weights)
    assert not weights


def by_blocks(weight: np.ndarray) -> Any:
    return jnp.asarray(weight)


def packed_in_bfloat16(weight: np.ndarray) -> Any:
    return pack([weight.astype(jnp.bfloat16)], axes=OUTWARD)


@pytest.mark.parametrize("prepare", [by_blocks, packed_in_bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    prepare: Callable[[np.ndarray], Any],
) -> None:
    is_packed = prepare is packed_in_bfloat16
    if is_packed and not can_pack(jnp.bfloat16):
        pytest.skip("no kernel for this processor")
    dtype = jnp.bfloat16 if is_packed else jnp.float32
    weight = prepare(random_array(NUM_EXPERTS, 40, 512))
    x = random_array(NUM_ROWS, 512).astype(dtype)
    (together,) = compute(x, [weight], jnp.float32)
    # One row of expert 2, first in its group, last in it, and with others' rows before it.
    for row in (1, BLOCK_ROWS, BLOCK_ROWS + 1):
        few = np.concatenate([x[row : row + 1]] * 4)
        starts = np.array([0, 0, 0, 2, 2, 2], np.int32)
        (alone,) = compute(few, [weight], jnp.float32, starts=starts)
        np.testing.assert_array_equal(alone, np.stack([together[row]] * 2))
