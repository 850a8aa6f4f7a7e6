"""The TPU's kernels, interpreted on a CPU, against numpy; with the race detector on."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import attention_oracle as oracle
import numpy as np
import pytest
from attention_harness import Harness, make_mesh, ragged_schedule, random_schedule
from jax.experimental.pallas import tpu as pltpu

from engine.kernels import attention_pallas
from engine.kernels.attention_pallas import PallasAttention
from engine.kernels.tpu import decode
from engine.kernels.tpu.block_sizes import AttentionBlocks
from engine.kernels.tpu.chunks import ChunkBlocks
from engine.kernels.tpu.decode import DecodeBlocks

V6E = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def no_race(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """JAX 0.12 raises where it finds a race, 0.10 prints it."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


INTERPRETED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def backend(**options: Any) -> PallasAttention:
    return PallasAttention(make_mesh(1), V6E, interpret=replace(INTERPRETED, **options))


@pytest.mark.parametrize(
    (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "page_size",
        "sliding_window",
        "max_len",
        "dtype",
        "most_table_bytes",
    ),
    [
        (2, 2, 128, 16, None, 40, "float32", 2**19),
        (7, 1, 128, 128, 33, 140, "bfloat16", 2**19),
        pytest.param(6, 3, 64, 8, None, 40, "bfloat16", 2**19, marks=pytest.mark.long),
        (4, 2, 64, 1, 9, 20, "float32", 2**19),
        # The table stays in HBM.
        (4, 2, 64, 1, 9, 20, "float32", 0),
    ],
)
def test_any_mix_of_chunks_and_decodes_equals_numpy(
    monkeypatch,
    num_heads,
    num_kv_heads,
    head_dim,
    page_size,
    sliding_window,
    max_len,
    dtype,
    most_table_bytes,
):
    monkeypatch.setattr(decode, "MOST_TABLE_BYTES", most_table_bytes)
    rng = np.random.default_rng(head_dim + page_size)
    lengths = [1, 7, max_len - 3, max_len // 2]
    sequences = [oracle.random_sequence(rng, n, num_heads, num_kv_heads, head_dim) for n in lengths]
    expected = [oracle.attend(sequence, sliding_window) for sequence in sequences]
    harness = Harness(
        sequences,
        page_size=page_size,
        sliding_window=sliding_window,
        max_len=max_len,
        dtype=dtype,
        backend=backend(),
    )
    steps = random_schedule(rng, lengths, num_chunk_tokens=96)
    harness.check_all(steps, expected, atol=TOLERANCE[dtype])


SMALL_BLOCKS = AttentionBlocks(
    decode=DecodeBlocks(num_keys=128, group=1, num_buffers=2),
    chunk=ChunkBlocks(num_queries=128, num_tiles=3, num_keys=128, num_beside=2, num_careful=1),
    vmem_limit_bytes=2**24,
)


@pytest.mark.parametrize(
    ("num_heads", "sliding_window", "soft_cap", "dtype", "sharpness"),
    [
        (1, None, None, "bfloat16", 1.0),
        (3, 150, 1.5, "bfloat16", 1.0),
        # Scores that differ by hundreds: weights relative to early keys' best one overflow.
        (1, None, None, "float32", 100.0),
    ],
)
def test_ragged_batches_over_several_blocks_equal_xla_and_numpy(
    monkeypatch, num_heads, sliding_window, soft_cap, dtype, sharpness
):
    monkeypatch.setattr(attention_pallas, "choose_blocks", lambda *_, **__: SMALL_BLOCKS)
    rng = np.random.default_rng(num_heads)
    page_size = 16
    # One token, around a page's end, whole pages and blocks, and several blocks.
    around = int(rng.integers(2, 5)) * page_size
    lengths = [1, around - 1, around, around + 1, 129, int(rng.integers(420, 500))]
    sequences = [
        oracle.random_sequence(rng, length, num_heads, 1, 128, sharpness=sharpness)
        for length in lengths
    ]
    steps = ragged_schedule(rng, lengths)
    expected = [oracle.attend(sequence, sliding_window, soft_cap) for sequence in sequences]
    ours = PallasAttention(make_mesh(1), V6E, soft_cap=soft_cap, interpret=INTERPRETED)
    # XLA's has no cap.
    for attention in (ours, None) if soft_cap is None else (ours,):
        harness = Harness(
            sequences,
            page_size=page_size,
            sliding_window=sliding_window,
            dtype=dtype,
            backend=attention,
        )
        harness.check_all(steps, expected, atol=TOLERANCE[dtype] * sharpness)


class WithoutWaiting:
    """Pallas for TPUs, where copies are started and never waited for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pltpu, name)

    def make_async_copy(self, *arguments: Any) -> Any:
        copy = pltpu.make_async_copy(*arguments)
        return SimpleNamespace(start=copy.start, wait=lambda: None)


def test_the_race_detector_finds_a_copy_that_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(decode, "pltpu", WithoutWaiting())
    rng = np.random.default_rng(3)
    sequences = [oracle.random_sequence(rng, 20, 2, 2, 128)]
    eager = backend(dma_execution_mode="eager")
    harness = Harness(sequences, page_size=16, max_len=40, backend=eager)
    harness.prefill(0, 0, 19)
    step = oracle.Step(
        decodes=[0], chunks=[], starts=[19], num_decode_rows=2, num_chunk_tokens=0, num_chunks=0
    )
    try:
        harness.run(step)
        found = capfd.readouterr().out
    except Exception as error:
        found = str(error)
        pltpu.reset_tpu_interpret_mode_state()
    assert "race" in found.lower()
