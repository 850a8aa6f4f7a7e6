"""Sizes of the TPU kernels' blocks: they fit whatever the shape, and tuned ones are taken."""

from dataclasses import replace
from itertools import product

import pytest

from engine.errors import CapacityError
from engine.kernels.tpu import block_sizes
from engine.kernels.tpu.block_sizes import TunedRow, choose_blocks, choose_by_rule
from engine.kernels.tpu.kv_rows import RowLayout
from engine.topology import chip_of
from engine.tpu_slice import GENERATIONS


def layout_of(num_heads: int, num_kv_heads: int, head_dim: int = 128) -> RowLayout:
    return RowLayout(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, is_float32=False
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_blocks_fit_the_chip_whatever_the_heads_and_pages(generation):
    heads = [(32, 32, 128), (8, 8, 128), (7, 1, 128), (14, 2, 64), (3, 3, 64)]
    for shape, page_size, max_len, tokens, is_float32 in product(
        heads, (1, 8, 16, 64, 128), (100, 2048, 32768), (0, 1, 16, 8192), (False, True)
    ):
        layout = replace(layout_of(*shape), is_float32=is_float32)
        blocks = choose_blocks(
            layout,
            page_size=page_size,
            max_len=max_len,
            num_chunk_tokens=tokens,
            chip=chip_of(generation),
        )
        assert blocks.decode.num_keys % page_size == 0
        assert blocks.chunk.num_keys % page_size == 0
        assert max(blocks.chunk.num_beside, blocks.chunk.num_careful) <= blocks.chunk.num_tiles


def test_every_tuned_row_is_taken_where_it_is_for():
    rows = TunedRow.read()
    assert rows
    for row in rows:
        found = choose_blocks(
            layout_of(row.num_heads, row.num_kv_heads, row.head_dim),
            page_size=row.page_size,
            max_len=4096,
            num_chunk_tokens=4096,
            chip=chip_of(row.generation),
        )
        assert row.decode in (found.decode, None)
        assert row.chunk in (found.chunk, None)


def test_without_a_row_the_rule_chooses(monkeypatch, tmp_path):
    monkeypatch.setattr(block_sizes, "BLOCK_SIZES", tmp_path / "missing.json")
    case = {"page_size": 16, "max_len": 4096, "num_chunk_tokens": 512, "chip": chip_of("v6e")}
    assert choose_blocks(layout_of(8, 8), **case) == choose_by_rule(layout_of(8, 8), **case)


def test_pages_larger_than_the_vector_memory_are_refused():
    with pytest.raises(CapacityError, match=r"pages of 8192 tokens .* Lower --page-size"):
        choose_blocks(
            layout_of(32, 32),
            page_size=8192,
            max_len=8192,
            num_chunk_tokens=0,
            chip=chip_of("v7x"),
        )
