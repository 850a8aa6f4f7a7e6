"""Plan → the few padded arrays that a compiled step takes. Host side, numpy only, no devices.

Everything that sampling and attention must know of a row is one row of two tables, one of integers
and one of floats, gathered by slot: so that building a decode batch is a handful of numpy calls
whatever its size, and a step takes few arguments, each of which costs time to hand over.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np

from engine.step import NO_INTS, Bucket, SlotParams, StepPlan

MASKED_AT_ONCE = 8
"""Masked rows that one call samples."""


class IntColumn(enum.IntEnum):
    """Columns of `StepInputs.row_ints`."""

    SLOT = 0
    """Where the row's token is remembered; num_slots if the row does not sample."""
    KV_LEN = 1
    """Cached tokens, this step's included, which is the position of the sampled token; 0 = pad."""
    TOP_K = 2
    SEED_HIGH = 3
    SEED_LOW = 4
    CHOICE_INDEX = 5
    MIN_LEN = 6
    """Below this position no end token may be sampled."""
    HAS_PENALTIES = 7
    HAS_LOGIT_BIAS = 8
    IS_MASKED = 9
    """The row's token is sampled later, once it is known which it may be."""


_ADJUSTING = [IntColumn.HAS_PENALTIES, IntColumn.HAS_LOGIT_BIAS, IntColumn.MIN_LEN]


class FloatColumn(enum.IntEnum):
    """Columns of `StepInputs.row_floats`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    PRESENCE_PENALTY = 3
    FREQUENCY_PENALTY = 4
    REPETITION_PENALTY = 5
    ROPE_ALPHA = 6


class ChunkRow(enum.IntEnum):
    """Rows of `StepInputs.chunk_tokens`."""

    TOKEN_ID = 0
    POSITION = 1
    SEQUENCE_ROW = 2
    NEXT_TOKEN_ID = 3
    """The token that follows, whose log probability may be wanted; 0 where it is not known."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What the host hands to one compiled step; numpy outside of it, traced inside.

    Attributes:
        row_ints: int32 [R, len(IntColumn)].
        row_floats: float32 [R, len(FloatColumn)].
        page_indices: int32 [R, pages_per_seq].
        chunk_tokens: int32 [len(ChunkRow), num_chunk_tokens].
        cu_chunk_lens: int32 [num_chunks + 1].
        num_decodes: int32 [].
        has_logprobs: bool [].
        has_prompt_logprobs: bool [].
        masked_rows: int32 [R], those whose tokens are sampled later, and zeros.
        num_masked_rows: int32 [].
    """

    row_ints: jax.Array
    row_floats: jax.Array
    page_indices: jax.Array
    chunk_tokens: jax.Array
    cu_chunk_lens: jax.Array
    num_decodes: jax.Array
    has_logprobs: jax.Array
    has_prompt_logprobs: jax.Array
    masked_rows: jax.Array
    num_masked_rows: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedInputs:
    """What the host hands to one sampling of masked rows; M is MASKED_AT_ONCE.

    Attributes:
        row_ints: int32 [M, len(IntColumn)].
        row_floats: float32 [M, len(FloatColumn)].
        masks: int32 [M, ceil(V / 32)], a bit for each token that may be sampled.
        has_logprobs: bool [].
    """

    row_ints: jax.Array
    row_floats: jax.Array
    masks: jax.Array
    has_logprobs: jax.Array


class BatchBuilder:
    """Page tables and parameters of all slots, as plans told them; one per host.

    Invariant: after `build(plan)` the tables hold what every plan so far said, in order. The row
    after the last slot belongs to padding: no pages, greedy, no features.
    """

    def __init__(self, *, num_slots: int, pages_per_seq: int, vocab_size: int) -> None:
        self._num_slots = num_slots
        self._num_mask_words = -(-vocab_size // 32)
        self._page_table = np.zeros((num_slots + 1, pages_per_seq), np.int32)
        self._slot_ints = np.zeros((num_slots + 1, len(IntColumn)), np.int32)
        self._slot_ints[:, IntColumn.SLOT] = np.arange(num_slots + 1)
        self._slot_floats = np.zeros((num_slots + 1, len(FloatColumn)), np.float32)
        self._slot_floats[:, [FloatColumn.TOP_P, FloatColumn.REPETITION_PENALTY]] = 1
        self._slot_floats[:, FloatColumn.ROPE_ALPHA] = 1

    def build(self, plan: StepPlan) -> StepInputs:
        """Take in a plan's news and lay out its rows."""
        for params in plan.admissions:
            self._admit(params)
        for update in plan.page_updates:
            stop = update.first + len(update.pages)
            self._page_table[update.slot, update.first : stop] = update.pages

        bucket = plan.bucket
        num_rows = bucket.num_seqs + bucket.num_chunks
        slot_R = np.full(num_rows, self._num_slots, np.int32)
        sampling_slot_R = np.full(num_rows, self._num_slots, np.int32)
        kv_len_R = np.zeros(num_rows, np.int32)
        num_decodes = len(plan.decode_slots)
        slot_R[:num_decodes] = plan.decode_slots
        sampling_slot_R[:num_decodes] = plan.decode_slots
        kv_len_R[:num_decodes] = plan.decode_positions
        kv_len_R[:num_decodes] += 1

        chunk_tokens = np.zeros((len(ChunkRow), bucket.num_chunk_tokens), np.int32)
        chunk_tokens[ChunkRow.POSITION] = -1
        cu_chunk_lens = np.zeros(bucket.num_chunks + 1, np.int32)
        offset = 0
        for index, chunk in enumerate(plan.chunks):
            row = bucket.num_seqs + index
            stop = offset + len(chunk.token_ids)
            end = chunk.start + len(chunk.token_ids)
            chunk_tokens[ChunkRow.TOKEN_ID, offset:stop] = chunk.token_ids
            chunk_tokens[ChunkRow.POSITION, offset:stop] = np.arange(chunk.start, end)
            chunk_tokens[ChunkRow.SEQUENCE_ROW, offset:stop] = row
            chunk_tokens[ChunkRow.NEXT_TOKEN_ID, offset : stop - 1] = chunk.token_ids[1:]
            chunk_tokens[ChunkRow.NEXT_TOKEN_ID, stop - 1] = max(chunk.next_token_id, 0)
            slot_R[row] = chunk.slot
            kv_len_R[row] = end
            if chunk.is_last:
                sampling_slot_R[row] = chunk.slot
            offset = stop
            cu_chunk_lens[index + 1] = offset
        cu_chunk_lens[len(plan.chunks) + 1 :] = offset

        row_ints = self._slot_ints[sampling_slot_R]
        row_ints[:, IntColumn.KV_LEN] = kv_len_R
        row_floats = self._slot_floats[sampling_slot_R]
        row_floats[:, FloatColumn.ROPE_ALPHA] = self._slot_floats[slot_R, FloatColumn.ROPE_ALPHA]
        num_masked = len(plan.masked_rows)
        masked_rows = np.zeros(num_rows, np.int32)
        if num_masked:
            is_chunk = plan.masked_rows >= num_decodes
            masked_rows[:num_masked] = plan.masked_rows
            masked_rows[:num_masked][is_chunk] += bucket.num_seqs - num_decodes
            # What is sampled of them now counts for nothing, so it takes the cheapest way.
            masked = masked_rows[:num_masked]
            row_ints[masked, IntColumn.IS_MASKED] = True
            row_ints[masked[:, None], _ADJUSTING] = 0
            row_floats[masked, FloatColumn.TEMPERATURE] = 0
        arrays = {
            "row_ints": row_ints,
            "row_floats": row_floats,
            "page_indices": self._page_table[slot_R],
            "chunk_tokens": chunk_tokens,
            "cu_chunk_lens": cu_chunk_lens,
            "num_decodes": np.int32(num_decodes),
            "has_logprobs": np.bool_(plan.has_logprobs),
            "has_prompt_logprobs": np.bool_(plan.has_prompt_logprobs),
            "masked_rows": masked_rows,
            "num_masked_rows": np.int32(num_masked),
        }
        # Host arrays where the compiled program takes device arrays: it copies them itself.
        return StepInputs(**cast("dict[str, jax.Array]", arrays))

    def build_masked(self, plan: StepPlan, words: Sequence[np.ndarray]) -> list[MaskedInputs]:
        """Lay out the masked rows of the plan that was built last, `MASKED_AT_ONCE` in each call.

        Args:
            plan: With masked rows, or none for a call of padding.
            words: As in `StepMasks`.
        """
        calls = []
        for start in range(0, max(1, len(words)), MASKED_AT_ONCE):
            slot_M = np.full(MASKED_AT_ONCE, self._num_slots, np.int32)
            kv_len_M = np.zeros(MASKED_AT_ONCE, np.int32)
            masks = np.full((MASKED_AT_ONCE, self._num_mask_words), -1, np.int32)
            rows = plan.masked_rows[start : start + MASKED_AT_ONCE].tolist()
            for place, row in enumerate(rows):
                slot_M[place], kv_len_M[place] = plan.slot_and_end(row)
                given = words[start + place][: self._num_mask_words]
                if len(given):
                    masks[place, : len(given)] = given
                    masks[place, len(given) :] = 0
            row_ints = self._slot_ints[slot_M]
            row_ints[:, IntColumn.KV_LEN] = kv_len_M
            arrays = {
                "row_ints": row_ints,
                "row_floats": self._slot_floats[slot_M],
                "masks": masks,
                "has_logprobs": np.bool_(plan.has_logprobs),
            }
            calls.append(MaskedInputs(**cast("dict[str, jax.Array]", arrays)))
        return calls

    def _admit(self, params: SlotParams) -> None:
        ints = self._slot_ints[params.slot]
        ints[IntColumn.TOP_K] = params.top_k
        seed = np.array([params.seed], np.uint64).view(np.int32)
        ints[IntColumn.SEED_LOW], ints[IntColumn.SEED_HIGH] = seed
        ints[IntColumn.CHOICE_INDEX] = params.choice_index
        ints[IntColumn.MIN_LEN] = _min_len(params)
        ints[IntColumn.HAS_PENALTIES] = params.has_penalties
        ints[IntColumn.HAS_LOGIT_BIAS] = len(params.logit_bias) > 0
        floats = self._slot_floats[params.slot]
        floats[FloatColumn.TEMPERATURE] = params.temperature
        floats[FloatColumn.TOP_P] = params.top_p
        floats[FloatColumn.MIN_P] = params.min_p
        floats[FloatColumn.PRESENCE_PENALTY] = params.presence_penalty
        floats[FloatColumn.FREQUENCY_PENALTY] = params.frequency_penalty
        floats[FloatColumn.REPETITION_PENALTY] = params.repetition_penalty
        floats[FloatColumn.ROPE_ALPHA] = params.rope_alpha


def padding_plan(bucket: Bucket) -> StepPlan:
    """A plan that computes nothing: for shapes, and to warm a program up."""
    return StepPlan(step=0, bucket=bucket, decode_slots=NO_INTS, decode_positions=NO_INTS)


def _min_len(params: SlotParams) -> int:
    if params.min_tokens == 0:
        return 0
    return min(params.output_start + params.min_tokens, np.iinfo(np.int32).max)
