"""The TPU's kernels, interpreted on a CPU, against numpy; with the race detector on."""

import attention_oracle as oracle
import numpy as np
import pytest
from attention_harness import Harness, make_mesh, random_schedule
from jax.experimental.pallas import tpu as pltpu

from engine.kernels.attention_pallas import PallasAttention
from engine.kernels.tpu import decode

V6E = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def backend(**options: object) -> PallasAttention:
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return PallasAttention(make_mesh(1), V6E, interpret=interpret, **options)  # type: ignore[arg-type]


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
        (7, 1, 128, 64, None, 150, "bfloat16", 2**19),
        (6, 3, 64, 8, None, 40, "bfloat16", 2**19),
        (4, 1, 128, 128, 33, 140, "bfloat16", 2**19),
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
    for step in random_schedule(rng, lengths, num_chunk_tokens=96):
        for (seq, position), got in harness.run(step).items():
            np.testing.assert_allclose(got, expected[seq][position], atol=TOLERANCE[dtype])
