from typing import Any

import numpy as np

from engine.runner.batch import (
    MASKED_AT_ONCE,
    BatchBuilder,
    ChunkRow,
    FloatColumn,
    IntColumn,
    padding_plan,
)
from engine.step import Bucket, Chunk, PageUpdate, SlotParams, StepPlan

NUM_SLOTS = 4


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_params(slot: int, **changes: Any) -> SlotParams:
    fields: dict[str, Any] = {
        "slot": slot,
        "output_start": 5,
        "temperature": 0.5 + slot,
        "top_p": 0.9,
        "top_k": 10 + slot,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.4,
        "seed": 2**64 - 2,
        "choice_index": 3,
        "min_tokens": 0,
        "end_token_ids": ids(),
        "logit_bias_ids": ids(),
        "logit_bias": (),
        "token_ids": ids(),
        "rope_alpha": 1.0 + slot,
    }
    return SlotParams(**(fields | changes))


def make_plan(bucket: Bucket, **changes: Any) -> StepPlan:
    fields: dict[str, Any] = {"step": 0, "decode_slots": ids(), "decode_positions": ids()}
    return StepPlan(bucket=bucket, **(fields | changes))


def make_builder() -> BatchBuilder:
    builder = BatchBuilder(num_slots=NUM_SLOTS, pages_per_seq=6, vocab_size=70)
    builder.build(
        make_plan(
            Bucket(2),
            admissions=tuple(make_params(slot) for slot in range(NUM_SLOTS)),
            page_updates=tuple(
                PageUpdate(slot, 0, ids(10 * slot + 1, 10 * slot + 2)) for slot in range(NUM_SLOTS)
            ),
        )
    )
    return builder


def test_decodes_stand_first_and_padding_rows_belong_to_no_slot():
    inputs = make_builder().build(
        make_plan(Bucket(4), decode_slots=ids(3, 1), decode_positions=ids(7, 4))
    )
    assert inputs.row_ints[:, IntColumn.SLOT].tolist() == [3, 1, NUM_SLOTS, NUM_SLOTS]
    assert inputs.row_ints[:, IntColumn.KV_LEN].tolist() == [8, 5, 0, 0]
    assert inputs.row_ints[:, IntColumn.TOP_K].tolist() == [13, 11, 0, 0]
    assert inputs.row_floats[:, FloatColumn.TEMPERATURE].tolist() == [3.5, 1.5, 0, 0]
    assert inputs.page_indices[:, :3].tolist() == [[31, 32, 0], [11, 12, 0], [0] * 3, [0] * 3]
    assert inputs.num_decodes == 2
    assert inputs.chunk_tokens.shape == (len(ChunkRow), 0)


def test_chunks_lie_back_to_back_and_only_last_ones_sample():
    inputs = make_builder().build(
        make_plan(
            Bucket(2, 8, 3),
            decode_slots=ids(0),
            decode_positions=ids(9),
            chunks=(Chunk(2, 4, ids(50, 51, 52), False), Chunk(3, 0, ids(60, 61), True)),
        )
    )
    assert inputs.chunk_tokens[ChunkRow.TOKEN_ID].tolist() == [50, 51, 52, 60, 61, 0, 0, 0]
    assert inputs.chunk_tokens[ChunkRow.POSITION].tolist() == [4, 5, 6, 0, 1, -1, -1, -1]
    assert inputs.chunk_tokens[ChunkRow.SEQUENCE_ROW].tolist() == [2, 2, 2, 3, 3, 0, 0, 0]
    assert inputs.cu_chunk_lens.tolist() == [0, 3, 5, 5]
    assert inputs.row_ints[:, IntColumn.SLOT].tolist() == [0, NUM_SLOTS, NUM_SLOTS, 3, NUM_SLOTS]
    assert inputs.row_ints[:, IntColumn.KV_LEN].tolist() == [10, 0, 7, 2, 0]
    # A chunk that does not sample is turned by its own request's rope all the same.
    assert inputs.row_floats[:, FloatColumn.ROPE_ALPHA].tolist() == [1, 1, 3, 4, 1]
    assert inputs.row_floats[2, FloatColumn.TEMPERATURE] == 0
    assert inputs.page_indices[2, :2].tolist() == [21, 22]


def test_page_tables_grow_by_their_news():
    builder = make_builder()
    builder.build(make_plan(Bucket(2), page_updates=(PageUpdate(1, 2, ids(99, 98)),)))
    inputs = builder.build(make_plan(Bucket(2), decode_slots=ids(1), decode_positions=ids(1)))
    assert inputs.page_indices[0].tolist() == [11, 12, 99, 98, 0, 0]


def test_an_admission_replaces_all_that_a_slot_held():
    builder = make_builder()
    builder.build(
        make_plan(
            Bucket(2),
            admissions=(
                make_params(
                    2,
                    top_k=0,
                    seed=(7 << 32) | 9,
                    min_tokens=4,
                    token_ids=ids(1),
                    logit_bias_ids=ids(3),
                    logit_bias=(1.0,),
                ),
            ),
        )
    )
    inputs = builder.build(make_plan(Bucket(2), decode_slots=ids(2), decode_positions=ids(5)))
    row = inputs.row_ints[0]
    assert row[IntColumn.TOP_K] == 0
    assert (row[IntColumn.SEED_HIGH], row[IntColumn.SEED_LOW]) == (7, 9)
    assert row[IntColumn.MIN_LEN] == 9
    assert row[IntColumn.HAS_PENALTIES] == 1
    assert row[IntColumn.HAS_LOGIT_BIAS] == 1


def test_seeds_keep_all_their_bits():
    inputs = make_builder().build(
        make_plan(Bucket(2), decode_slots=ids(1), decode_positions=ids(1))
    )
    seed = np.asarray(inputs.row_ints[0, [IntColumn.SEED_HIGH, IntColumn.SEED_LOW]])
    assert seed.view(np.uint32).tolist() == [2**32 - 1, 2**32 - 2]


def test_a_plan_without_rows_is_all_padding():
    inputs = make_builder().build(padding_plan(Bucket(2, 4, 1)))
    assert not np.asarray(inputs.row_ints[:, IntColumn.KV_LEN]).any()
    assert (np.asarray(inputs.chunk_tokens[ChunkRow.POSITION]) == -1).all()


def test_masked_rows_are_sampled_the_cheapest_way_first_and_as_they_want_once_masks_are_there():
    builder = make_builder()
    plan = make_plan(
        Bucket(4, 8, 2),
        decode_slots=ids(3, 1),
        decode_positions=ids(7, 4),
        chunks=(Chunk(0, 2, ids(9, 9, 9), False), Chunk(2, 0, ids(5, 6), True)),
        masked_rows=ids(1, 3),
        has_logprobs=True,
    )
    inputs = builder.build(plan)
    # Rows of chunks stand behind all four rows of decodes.
    assert inputs.num_masked_rows == 2
    assert np.asarray(inputs.masked_rows[:2]).tolist() == [1, 5]
    is_masked = np.asarray(inputs.row_ints[:, IntColumn.IS_MASKED])
    assert is_masked.tolist() == [0, 1, 0, 0, 0, 1]
    temperature = np.asarray(inputs.row_floats[:, FloatColumn.TEMPERATURE])
    assert temperature.tolist() == [3.5, 0, 0, 0, 0, 0]

    (call,) = builder.build_masked(plan, (ids(1 << 7), ids()))
    slots = np.asarray(call.row_ints[:, IntColumn.SLOT]).tolist()
    assert slots == [1, 2] + [NUM_SLOTS] * (MASKED_AT_ONCE - 2)
    assert np.asarray(call.row_ints[:2, IntColumn.KV_LEN]).tolist() == [5, 2]
    assert np.asarray(call.row_floats[:2, FloatColumn.TEMPERATURE]).tolist() == [1.5, 2.5]
    # Ids behind the last word are not allowed; no words allow all.
    assert np.asarray(call.masks[:2]).tolist() == [[1 << 7, 0, 0], [-1, -1, -1]]
    assert call.has_logprobs


def test_any_number_of_masked_rows_is_laid_out():
    num_rows = 2 * MASKED_AT_ONCE + 1
    builder = BatchBuilder(num_slots=num_rows, pages_per_seq=1, vocab_size=70)
    slots = np.arange(num_rows, dtype=np.int32)
    plan = make_plan(
        Bucket(num_rows), decode_slots=slots, decode_positions=slots, masked_rows=slots
    )
    builder.build(plan)
    calls = builder.build_masked(plan, [ids(row) for row in range(num_rows)])
    assert len(calls) == 3
    laid_out = np.concatenate([np.asarray(call.row_ints[:, IntColumn.SLOT]) for call in calls])
    assert laid_out[:num_rows].tolist() == slots.tolist()
    first_words = np.concatenate([np.asarray(call.masks[:, 0]) for call in calls])
    assert first_words[:num_rows].tolist() == slots.tolist()
