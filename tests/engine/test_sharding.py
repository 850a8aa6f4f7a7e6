"""Padded sizes, where their rows come from, and the mesh."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CapacityError
from engine.sharding import ShardLayout, make_layout, make_mesh, named_sharding


def layout_for(num_heads: int, num_kv_heads: int, tp_size: int, head_dim: int = 2) -> ShardLayout:
    return make_layout(
        tp_size=tp_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=8,
        intermediate_size=10,
        vocab_size=11,
    )


@pytest.mark.parametrize(
    ("heads", "tp_size", "padded"),
    [
        ((9, 3), 1, (9, 3)),
        ((9, 3), 2, (12, 4)),
        ((9, 3), 3, (9, 3)),
        ((9, 3), 4, (12, 4)),
        ((28, 4), 4, (28, 4)),
        ((28, 4), 8, (32, 8)),
        ((32, 32), 4, (32, 32)),
        ((64, 8), 16, (64, 16)),
        ((14, 2), 8, (16, 8)),
    ],
)
def test_heads_are_padded_as_little_as_a_tp_size_needs(
    heads: tuple[int, int], tp_size: int, padded: tuple[int, int]
) -> None:
    layout = layout_for(*heads, tp_size)
    assert (layout.num_heads, layout.num_kv_heads) == padded


def test_the_worked_example_of_nine_heads_on_two_devices() -> None:
    layout = layout_for(9, 3, 2, head_dim=1)
    assert layout.rows["kv_heads"].tolist() == [0, 1, 2, -1]
    assert layout.rows["heads"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1]


def test_replicated_kv_heads_share_out_their_queries() -> None:
    layout = layout_for(6, 2, 4, head_dim=1)
    assert layout.rows["kv_heads"].tolist() == [0, 0, 1, 1]
    assert layout.rows["heads"].tolist() == [0, 1, 2, -1, 3, 4, 5, -1]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 16), st.sampled_from([1, 2, 4]))
def test_every_query_meets_its_own_keys_on_one_device(
    num_kv_heads: int, group: int, tp_size: int, head_dim: int
) -> None:
    layout = layout_for(num_kv_heads * group, num_kv_heads, tp_size, head_dim)
    assert layout.num_heads % layout.num_kv_heads == 0
    assert layout.num_kv_heads % tp_size == 0
    queries = layout.rows["heads"].reshape(layout.num_heads, head_dim)
    keys = layout.rows["kv_heads"].reshape(layout.num_kv_heads, head_dim)
    real = queries[:, 0] >= 0
    # Each query head of the checkpoint stands in exactly one place, whole.
    assert sorted(queries[real].reshape(-1).tolist()) == list(range(layout.sizes["heads"]))
    padded_group = layout.num_heads // layout.num_kv_heads
    for place in np.flatnonzero(real):
        query_head = queries[place, 0] // head_dim
        assert keys[place // padded_group, 0] // head_dim == query_head // group


@given(st.integers(1, 200), st.integers(1, 16))
def test_padding_stands_at_the_end_of_vocab_and_ffn(size: int, tp_size: int) -> None:
    layout = make_layout(
        tp_size=tp_size,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        hidden_size=2,
        intermediate_size=size,
        vocab_size=size,
    )
    for axis in ("vocab", "ffn"):
        rows = layout.rows[axis]
        assert len(rows) % tp_size == 0
        assert len(rows) - size < tp_size
        assert rows[:size].tolist() == list(range(size))
        assert (rows[size:] == -1).all()


def test_a_mesh_takes_as_many_devices_as_asked_for() -> None:
    assert make_mesh(3).size == 3
    assert make_mesh(8).axis_names == ("tp",)
    assert list(make_mesh(2, jax.devices()[4:6]).devices.flat) == jax.devices()[4:6]


def test_too_few_devices_are_a_capacity_error_that_names_the_flag() -> None:
    with pytest.raises(CapacityError, match=r"--tp-size=9 needs 9 cpu devices.*has 8"):
        make_mesh(9)


def test_an_axis_is_sharded_as_the_table_says() -> None:
    sharding = named_sharding(make_mesh(4), ("heads", "embed"))
    assert sharding.shard_shape((16, 6)) == (4, 6)
    assert named_sharding(make_mesh(4), (None, "ffn")).shard_shape((5, 8)) == (5, 2)
