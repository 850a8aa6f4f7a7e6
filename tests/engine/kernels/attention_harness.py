"""Steps through an attention backend, over a cache that is full of garbage at first."""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from engine.kernels.attention import AttentionBackend, make_attention, zeroed_cache


def make_mesh(tp_size: int) -> Mesh:
    return jax.make_mesh(
        (tp_size,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:tp_size]
    )


class Harness:
    """A cache with garbage in it, shuffled pages, and steps run through one backend."""

    def __init__(
        self,
        sequences: list[oracle.Sequence],
        *,
        platform: str = "cpu",
        flag: str = "xla",
        page_size: int = 4,
        tp_size: int = 1,
        dtype: str = "float32",
        sliding_window: int | None = None,
        seed: int = 0,
        max_len: int | None = None,
        garbage: float = np.nan,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.sequences = sequences
        self.page_size = page_size
        self.dtype = dtype
        self.sliding_window = sliding_window
        _, num_kv_heads, self.head_dim = sequences[0].k_TKH.shape
        pages_per_seq = -(-(max_len or max(s.length for s in sequences)) // page_size)
        num_pages = 1 + pages_per_seq * len(sequences)
        rng = np.random.default_rng(seed)
        self.page_tables = 1 + rng.permutation(num_pages - 1).reshape(len(sequences), -1).astype(
            np.int32
        )
        self.backend = backend or make_attention(
            platform,
            flag,
            make_mesh(tp_size),
            dtype=dtype,
            head_dim=self.head_dim,
            page_size=page_size,
        )
        shapes = self.backend.cache_shapes(
            num_layers=1,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
        )
        cache = zeroed_cache(shapes)
        # A word of the cache may hold two numbers.
        stored = np.full(2, garbage, jnp.dtype(dtype)).view(jax.tree.leaves(cache)[0].dtype)[0]
        self.cache = jax.tree.map(lambda pages: jnp.full_like(pages, stored), cache)
        self.attend = jax.jit(
            lambda q, k, v, cache, metadata: self.backend.attend(
                q,
                k,
                v,
                cache,
                0,
                metadata,
                sm_scale=self.head_dim**-0.5,
                sliding_window=self.sliding_window,
            )
        )

    def run(self, step: oracle.Step) -> dict[tuple[int, int], np.ndarray]:
        """(sequence, position) → [N, H] of each token; checks that padding rows are zero."""
        arrays = [
            jnp.asarray(step.gather(self.sequences, name), self.dtype)
            for name in ("q_TNH", "k_TKH", "v_TKH")
        ]
        metadata = step.metadata(self.page_tables, self.page_size)
        out, self.cache = self.attend(*arrays, self.cache, metadata)
        out_TNH = np.asarray(out.astype(jnp.float32))
        tokens = step.tokens()
        padding = np.ones(len(out_TNH), bool)
        padding[[place for place, _, _ in tokens]] = False
        assert not out_TNH[padding].any()
        return {(seq, position): out_TNH[place] for place, seq, position in tokens}

    def check_all(
        self,
        steps: list[oracle.Step],
        expected: list[np.ndarray],
        *,
        atol: float,
        rtol: float = 1e-7,
    ) -> None:
        """Run the steps and hold every token of every sequence to what is expected of it."""
        num_tokens = 0
        for step in steps:
            for (seq, position), out_NH in self.run(step).items():
                np.testing.assert_allclose(out_NH, expected[seq][position], rtol=rtol, atol=atol)
                num_tokens += 1
        assert num_tokens == sum(sequence.length for sequence in self.sequences)

    def prefill(self, seq: int, start: int, length: int, bucket: int | None = None):
        starts = [0] * len(self.sequences)
        starts[seq] = start
        return self.run(
            oracle.Step(
                decodes=[],
                chunks=[(seq, length)],
                starts=starts,
                num_decode_rows=2,
                num_chunk_tokens=bucket or length,
                num_chunks=2,
            )
        )


def ragged_schedule(rng: np.random.Generator, lengths: list[int]) -> list[oracle.Step]:
    """Three steps that compute all sequences: two of chunks, cut anywhere, and one of decodes."""
    last = [length - 1 for length in lengths]
    cuts = [int(rng.integers(0, stop + 1)) for stop in last]
    nothing = [0] * len(lengths)
    steps = []
    for starts, stops in ((nothing, cuts), (cuts, last)):
        chunks = [
            (seq, stops[seq] - starts[seq])
            for seq in rng.permutation(len(lengths)).tolist()
            if stops[seq] > starts[seq]
        ]
        steps.append(
            oracle.Step(
                decodes=[],
                chunks=chunks,
                starts=list(starts),
                num_decode_rows=len(lengths) + 1,
                num_chunk_tokens=sum(last) + 3,
                num_chunks=len(lengths),
            )
        )
    decodes = rng.permutation(len(lengths)).tolist()
    return [
        *steps,
        oracle.Step(
            decodes=decodes,
            chunks=[],
            starts=last,
            num_decode_rows=len(lengths) + 1,
            num_chunk_tokens=0,
            num_chunks=0,
        ),
    ]


def random_schedule(
    rng: np.random.Generator, lengths: list[int], *, num_chunk_tokens: int = 160
) -> list[oracle.Step]:
    """Steps that compute all sequences: chunks of random sizes beside decodes of the others."""
    starts = [0] * len(lengths)
    prompts = [int(rng.integers(1, length + 1)) for length in lengths]
    steps = []
    while any(start < length for start, length in zip(starts, lengths, strict=True)):
        decodes, chunks = [], []
        for seq in rng.permutation(len(lengths)).tolist():
            if starts[seq] >= lengths[seq] or rng.random() < 0.2:
                continue
            if starts[seq] >= prompts[seq]:
                decodes.append(seq)
            else:
                room = num_chunk_tokens - sum(length for _, length in chunks)
                longest = min(room, prompts[seq] - starts[seq])
                if longest:
                    chunks.append((seq, int(rng.integers(1, longest + 1))))
        steps.append(
            oracle.Step(
                decodes=decodes,
                chunks=chunks,
                starts=list(starts),
                num_decode_rows=4,
                num_chunk_tokens=num_chunk_tokens,
                num_chunks=4,
            )
        )
        for seq in decodes:
            starts[seq] += 1
        for seq, length in chunks:
            starts[seq] += length
    return steps
