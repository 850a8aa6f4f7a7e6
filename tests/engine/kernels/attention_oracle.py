"""Random ragged batches, and attention over them in plain numpy, in float64."""

from dataclasses import dataclass

import numpy as np

from engine.kernels.metadata import AttentionMetadata


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Whole keys, values and queries of one sequence, of which a step computes the last tokens."""

    q_TNH: np.ndarray
    k_TKH: np.ndarray
    v_TKH: np.ndarray

    @property
    def length(self) -> int:
        return len(self.q_TNH)


def random_sequence(
    rng: np.random.Generator,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    sharpness: float = 1.0,
) -> Sequence:
    """Scores are about as large as `sharpness`."""

    def normal(heads: int) -> np.ndarray:
        return rng.standard_normal((length, heads, head_dim)).astype(np.float32)

    return Sequence(
        q_TNH=sharpness * normal(num_heads), k_TKH=normal(num_kv_heads), v_TKH=normal(num_kv_heads)
    )


def attend(
    sequence: Sequence, sliding_window: int | None = None, soft_cap: float | None = None
) -> np.ndarray:
    """[T, N, H] float64: causal attention of all tokens, without pages, batches or blocks."""
    q_TNH, k_SKH, v_SKH = (
        x.astype(np.float64) for x in (sequence.q_TNH, sequence.k_TKH, sequence.v_TKH)
    )
    group = q_TNH.shape[1] // k_SKH.shape[1]
    out_TNH = np.zeros_like(q_TNH)
    for token in range(sequence.length):
        first = 0 if sliding_window is None else max(0, token - sliding_window + 1)
        for head in range(q_TNH.shape[1]):
            keys = k_SKH[first : token + 1, head // group]
            scores = keys @ q_TNH[token, head] * q_TNH.shape[2] ** -0.5
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out_TNH[token, head] = weights @ v_SKH[first : token + 1, head // group] / weights.sum()
    return out_TNH


@dataclass(frozen=True, kw_only=True)
class Step:
    """Which tokens of which sequences one step computes.

    Attributes:
        decodes: Sequence indices that compute the one token at their `starts`.
        chunks: (sequence index, number of tokens), computed from their `starts` on.
        starts: Per sequence, tokens that were computed before.
        num_decode_rows, num_chunk_tokens, num_chunks: The bucket.
    """

    decodes: list[int]
    chunks: list[tuple[int, int]]
    starts: list[int]
    num_decode_rows: int
    num_chunk_tokens: int
    num_chunks: int

    def tokens(self) -> list[tuple[int, int, int]]:
        """(place on the token axis, sequence, position) of every real token."""
        found = [(place, seq, self.starts[seq]) for place, seq in enumerate(self.decodes)]
        place = self.num_decode_rows
        for seq, length in self.chunks:
            for offset in range(length):
                found.append((place, seq, self.starts[seq] + offset))
                place += 1
        return found

    def metadata(self, page_tables: np.ndarray, page_size: int) -> AttentionMetadata:
        num_tokens = self.num_decode_rows + self.num_chunk_tokens
        num_rows = self.num_decode_rows + self.num_chunks
        position_T = np.full(num_tokens, -1, np.int32)
        row_T = np.zeros(num_tokens, np.int32)
        page_indices = np.zeros((num_rows, page_tables.shape[1]), np.int32)
        kv_lens = np.zeros(num_rows, np.int32)
        rows = {seq: row for row, seq in enumerate(self.decodes)}
        rows |= {seq: self.num_decode_rows + row for row, (seq, _) in enumerate(self.chunks)}
        for place, seq, position in self.tokens():
            position_T[place] = position
            row_T[place] = rows[seq]
            page_indices[rows[seq]] = page_tables[seq]
            kv_lens[rows[seq]] = max(kv_lens[rows[seq]], position + 1)
        lengths = [length for _, length in self.chunks] + [0] * (self.num_chunks - len(self.chunks))
        return AttentionMetadata(
            position_T=position_T,  # pyright: ignore[reportArgumentType]
            row_T=row_T,  # pyright: ignore[reportArgumentType]
            page_indices=page_indices,  # pyright: ignore[reportArgumentType]
            kv_lens=kv_lens,  # pyright: ignore[reportArgumentType]
            cu_chunk_lens=np.cumsum([0, *lengths], dtype=np.int32),  # pyright: ignore[reportArgumentType]
            num_decodes=np.int32(len(self.decodes)),  # pyright: ignore[reportArgumentType]
            page_size=page_size,
            num_decode_rows=self.num_decode_rows,
        )

    def gather(self, sequences: list[Sequence], name: str) -> np.ndarray:
        """Put one of the sequences' arrays ("q_TNH", ..) on the token axis; padding is garbage."""
        shape = getattr(sequences[0], name).shape[1:]
        out = np.full((self.num_decode_rows + self.num_chunk_tokens, *shape), 7.5, np.float32)
        for place, seq, position in self.tokens():
            out[place] = getattr(sequences[seq], name)[position]
        return out
