import re

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_harness import Harness, make_mesh, random_schedule
from instruction_sets import is_available

from engine.errors import ConfigError
from engine.kernels import attention_xla, packed_pages
from engine.kernels.attention import make_attention, zeroed_cache
from engine.kernels.attention_fresh import find_library
from engine.kernels.attention_xla import flash_attention
from engine.kernels.head_pages import HeadPagesAttention
from engine.kernels.native.arithmetic import AVX2, AVX512, AVX512_BFLOAT16
from engine.kernels.packed_pages import PackedPagesAttention, can_attend

FLOAT32_TOLERANCE = 2e-5

# XLA's float32 products on CPUs sum in an order that depends on the number of rows; its bfloat16
# products do not.
SHAPE_TOLERANCE = {"float32": 1e-6, "bfloat16": 0.0}


needs_packed = pytest.mark.skipif(
    not can_attend("bfloat16", head_dim=16, page_size=16), reason="no kernel for this processor"
)


@pytest.mark.parametrize("flag", ["xla", "dense"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "sliding_window", "max_len"),
    [
        (6, 2, 16, 4, None, 40),
        (4, 4, 32, 1, None, 30),
        (4, 1, 64, 16, 9, 40),
        (2, 2, 128, 128, None, 150),
        (3, 1, 16, 8, 33, 40),
    ],
)
def test_any_mix_of_chunks_and_decodes_equals_numpy(
    flag, num_heads, num_kv_heads, head_dim, page_size, sliding_window, max_len
):
    rng = np.random.default_rng(head_dim + page_size)
    lengths = [1, 7, max_len - 3, max_len // 2]
    sequences = [oracle.random_sequence(rng, n, num_heads, num_kv_heads, head_dim) for n in lengths]
    expected = [oracle.attend(sequence, sliding_window) for sequence in sequences]
    harness = Harness(
        sequences,
        flag=flag,
        page_size=page_size,
        sliding_window=sliding_window,
        max_len=max_len,
    )
    harness.check_all(random_schedule(rng, lengths), expected, atol=FLOAT32_TOLERANCE)


@needs_packed
@pytest.mark.parametrize("instruction_set", [AVX512_BFLOAT16, AVX512, AVX2])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "sliding_window", "max_len"),
    [
        (6, 2, 16, 16, None, 40),
        (8, 1, 48, 32, None, 140),
        (4, 4, 64, 16, 9, 90),
        (4, 2, 128, 128, None, 150),
        (9, 3, 64, 16, 70, 200),
    ],
)
def test_packed_pages_equal_numpy(
    instruction_set,
    num_heads,
    num_kv_heads,
    head_dim,
    page_size,
    sliding_window,
    max_len,
    monkeypatch,
):
    if not is_available(instruction_set):
        pytest.skip("this processor has other instructions")
    name = f"test_{instruction_set.lanes}_{instruction_set.panel_rows}"
    monkeypatch.setattr(packed_pages, "host_instruction_set", lambda: instruction_set)
    monkeypatch.setattr(
        packed_pages, "_target", lambda shape: f"{name}_{shape.head_dim}_{shape.page_size}"
    )
    rng = np.random.default_rng(head_dim + page_size)
    lengths = [1, 7, max_len - 3, max_len // 2]
    sequences = [oracle.random_sequence(rng, n, num_heads, num_kv_heads, head_dim) for n in lengths]
    rounded = [
        oracle.Sequence(
            **{
                name: getattr(sequence, name).astype(jnp.bfloat16).astype(np.float32)
                for name in ("q_TNH", "k_TKH", "v_TKH")
            }
        )
        for sequence in sequences
    ]
    expected = [oracle.attend(sequence, sliding_window) for sequence in rounded]
    harness = Harness(
        sequences,
        flag="auto",
        page_size=page_size,
        dtype="bfloat16",
        sliding_window=sliding_window,
        max_len=max_len,
    )
    assert isinstance(harness.backend, PackedPagesAttention)
    # Weights and results are rounded to bfloat16, eight bits of them each.
    harness.check_all(random_schedule(rng, lengths), expected, rtol=0.004, atol=0.004)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_sequences_longer_than_a_key_block_equal_numpy(platform, sliding_window):
    rng = np.random.default_rng(5)
    length = 8 * attention_xla.CPU_BLOCKS.num_keys + 9
    sequences = [oracle.random_sequence(rng, n, 2, 1, 16) for n in (length, 20)]
    expected = [oracle.attend(sequence, sliding_window) for sequence in sequences]
    harness = Harness(sequences, platform=platform, page_size=16, sliding_window=sliding_window)
    prompt_len = length - 3
    got = harness.prefill(0, 0, prompt_len)
    got |= harness.prefill(1, 0, 18, bucket=32)
    for step in range(2):
        got |= harness.run(
            oracle.Step(
                decodes=[1, 0],
                chunks=[],
                starts=[prompt_len + step, 18 + step],
                num_decode_rows=2,
                num_chunk_tokens=0,
                num_chunks=0,
            )
        )
    for (seq, position), out_NH in got.items():
        np.testing.assert_allclose(out_NH, expected[seq][position], atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "flag"), [("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", "auto")]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (2, 2)])
def test_chunked_equals_whole_in_bfloat16_to_the_last_bit(dtype, flag, num_heads, num_kv_heads):
    rng = np.random.default_rng(1)
    length = 2 * attention_xla.CPU_BLOCKS.num_keys + 60
    sequences = [oracle.random_sequence(rng, length, num_heads, num_kv_heads, 64)]
    whole = Harness(sequences, flag=flag, dtype=dtype, page_size=16).prefill(0, 0, length)
    harness = Harness(sequences, flag=flag, dtype=dtype, page_size=16, seed=9)
    chunked = {}
    for start, stop in ((0, 5), (5, 130), (130, 131), (131, length)):
        chunked |= harness.prefill(0, start, stop - start, bucket=256)
    for key, out_NH in whole.items():
        np.testing.assert_allclose(chunked[key], out_NH, rtol=0, atol=SHAPE_TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "flag"), [("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", "auto")]
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (2, 2)])
def test_decode_equals_prefill_in_bfloat16_to_the_last_bit(dtype, flag, num_heads, num_kv_heads):
    rng = np.random.default_rng(2)
    length = 4 * attention_xla.CPU_BLOCKS.num_keys + 20
    sequences = [oracle.random_sequence(rng, length, num_heads, num_kv_heads, 64)]
    whole = Harness(sequences, flag=flag, dtype=dtype, page_size=16).prefill(0, 0, length)
    harness = Harness(sequences, flag=flag, dtype=dtype, page_size=16)
    harness.prefill(0, 0, length - 40)
    for position in range(length - 40, length):
        got = harness.run(
            oracle.Step(
                decodes=[0],
                chunks=[],
                starts=[position],
                num_decode_rows=2,
                num_chunk_tokens=0,
                num_chunks=0,
            )
        )
        np.testing.assert_allclose(
            got[0, position], whole[0, position], rtol=0, atol=SHAPE_TOLERANCE[dtype]
        )


@pytest.mark.parametrize(
    ("dtype", "flag"), [("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", "auto")]
)
def test_alone_equals_in_any_batch_in_bfloat16_to_the_last_bit(dtype, flag):
    rng = np.random.default_rng(3)
    lengths = [30, 300, 4, 77]
    sequences = [oracle.random_sequence(rng, n, 6, 2, 64) for n in lengths]
    alone = Harness(sequences, flag=flag, dtype=dtype, page_size=16)
    expected = alone.prefill(0, 0, 29) | alone.run(
        oracle.Step(
            decodes=[0],
            chunks=[],
            starts=[29, 0, 0, 0],
            num_decode_rows=2,
            num_chunk_tokens=0,
            num_chunks=0,
        )
    )
    batch = Harness(sequences, flag=flag, dtype=dtype, page_size=16, seed=4)
    got = batch.run(
        oracle.Step(
            decodes=[],
            chunks=[(1, 299), (0, 29), (2, 3)],
            starts=[0, 0, 0, 0],
            num_decode_rows=8,
            num_chunk_tokens=512,
            num_chunks=4,
        )
    )
    got |= batch.run(
        oracle.Step(
            decodes=[1, 2, 0],
            chunks=[(3, 76)],
            starts=[29, 299, 3, 0],
            num_decode_rows=8,
            num_chunk_tokens=128,
            num_chunks=4,
        )
    )
    for key, out_NH in expected.items():
        np.testing.assert_allclose(got[key], out_NH, rtol=0, atol=SHAPE_TOLERANCE[dtype])


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_prompts_attended_among_themselves_equal_numpy(num_heads, sliding_window):
    """What GPUs give to cuDNN, by JAX's own code for the same function."""
    rng = np.random.default_rng(5)
    lengths = [1, 7, 40, 31]
    sequences = [oracle.random_sequence(rng, n, num_heads, 2, 16) for n in lengths]
    expected = [oracle.attend(sequence, sliding_window) for sequence in sequences]
    backend = HeadPagesAttention(make_mesh(1), flash_attention, "xla")
    harness = Harness(sequences, sliding_window=sliding_window, backend=backend)
    for chunks, decodes, starts in (
        # All begin; some begin beside a decode; one goes on, so that pages are read.
        ([(0, 1), (1, 6), (2, 30)], [], [0, 0, 0, 0]),
        ([(3, 31)], [1], [1, 6, 30, 0]),
        ([(2, 10)], [], [1, 7, 30, 31]),
    ):
        step = oracle.Step(
            decodes=decodes,
            chunks=chunks,
            starts=starts,
            num_decode_rows=2,
            num_chunk_tokens=48,
            num_chunks=4,
        )
        for (seq, position), got in harness.run(step).items():
            np.testing.assert_allclose(got, expected[seq][position], atol=FLOAT32_TOLERANCE)


def test_a_library_that_is_not_there_is_not_used():
    assert find_library(head_dim=16, dtype="bfloat16") is None


def test_heads_spread_over_devices_give_the_same():
    rng = np.random.default_rng(4)
    sequences = [oracle.random_sequence(rng, 50, 8, 4, 16)]
    expected = Harness(sequences).prefill(0, 0, 50)
    for tp_size in (2, 4):
        harness = Harness(sequences, tp_size=tp_size)
        shards = jax.tree.leaves(harness.cache)[0].addressable_shards
        assert {shard.data.shape[2] for shard in shards} == {4 // tp_size}
        got = harness.prefill(0, 0, 50)
        for key, out_NH in expected.items():
            np.testing.assert_allclose(got[key], out_NH, atol=1e-6)


@pytest.mark.parametrize("flag", ["xla", "auto"])
def test_the_cache_is_updated_in_place(flag: str):
    rng = np.random.default_rng(6)
    sequences = [oracle.random_sequence(rng, 32, 6, 2, 16)]
    harness = Harness(sequences, flag=flag, page_size=16, dtype="bfloat16", max_len=1 << 17)
    step = oracle.Step(
        decodes=[0],
        chunks=[(0, 20)],
        starts=[0],
        num_decode_rows=2,
        num_chunk_tokens=32,
        num_chunks=2,
    )
    arrays = [
        jnp.asarray(step.gather(sequences, name), "bfloat16")
        for name in ("q_TNH", "k_TKH", "v_TKH")
    ]
    metadata = step.metadata(harness.page_tables, 16)
    program = (
        jax.jit(harness.attend, donate_argnums=3).lower(*arrays, harness.cache, metadata).compile()
    )
    cache_bytes = sum(pages.nbytes for pages in jax.tree.leaves(harness.cache))
    pages_shape = jax.tree.leaves(harness.cache)[0].shape
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    whole_cache = re.escape(f"{','.join(map(str, pages_shape[1:]))}]")
    copies = re.findall(rf"{whole_cache}\S* (?:copy|convert|bitcast-convert)\(.*", text)
    assert not copies


# The second can be packed where there is a kernel for it.
@pytest.mark.parametrize("page_size", [1, 16])
def test_the_cache_is_what_its_shapes_say(page_size: int):
    backend = make_attention(
        "cpu", "auto", make_mesh(2), dtype="bfloat16", head_dim=16, page_size=page_size
    )
    shapes = backend.cache_shapes(
        num_layers=3,
        num_kv_heads=4,
        head_dim=16,
        num_pages=10,
        page_size=page_size,
        dtype="bfloat16",
    )
    cache = zeroed_cache(shapes)
    for described, made in zip(jax.tree.leaves(shapes), jax.tree.leaves(cache), strict=True):
        assert (made.shape, made.dtype) == (described.shape, described.dtype)
        assert made.sharding == described.sharding
        assert not made.any()


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(ConfigError, match="--attention-backend=magic"):
        make_attention("cpu", "magic", make_mesh(1), dtype="bfloat16", head_dim=16, page_size=16)
