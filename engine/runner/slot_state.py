"""What the device remembers of each slot between steps, and how a request's admission sets it.

Last tokens stay on the device so that a step can be planned before its input tokens are known, and
so do the logits of rows whose masks are not known yet. Token counts and biases stay there because
they are large. Everything else that sampling needs comes with each step.
"""

from dataclasses import dataclass, replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from engine.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS
from engine.step import SlotParams

MAX_END_TOKENS = MAX_STOP_TOKENS + 16
"""End tokens of a request and of its model together."""

ADMISSION_TOKENS = 4096
"""Tokens that one call of the admission program counts."""

IN_PROMPT = 1
"""Bit of a token's count that says it stands in the prompt; the output's count is above it."""

ONE_OUTPUT = 2
"""Context lengths stay far below what 32 bits count in steps of this."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """Arrays indexed by slot; the row after the last slot takes what padding rows write.

    Attributes:
        last_token: int32 [num_slots + 1], the token sampled last.
        token_counts: int32 [num_slots + 1, V], see `IN_PROMPT` and `ONE_OUTPUT`. In 16 bits, rows
            by slot would take TPUs' compiler 7 s for every program.
        bias_ids: int32 [num_slots + 1, MAX_LOGIT_BIAS], V where unused.
        bias_values: float32, the same shape.
        end_token_ids: int32 [num_slots + 1, MAX_END_TOKENS], V where unused.
        logits: float32 [num_slots + 1, V], kept between a step and the sampling of its masked rows.
    """

    last_token: jax.Array
    token_counts: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    end_token_ids: jax.Array
    logits: jax.Array

    @property
    def num_slots(self) -> int:
        return len(self.last_token) - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """One call of the admission program.

    Attributes:
        slot: int32 [].
        is_first: bool [], whether to forget what the slot held.
        token_ids: int32 [ADMISSION_TOKENS], V where unused.
        num_prompt_tokens: int32 [], how many of `token_ids` belong to the prompt.
        bias_ids, bias_values, end_token_ids: As in `SlotState`, of this slot.
    """

    slot: jax.Array
    is_first: jax.Array
    token_ids: jax.Array
    num_prompt_tokens: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    end_token_ids: jax.Array


def init_slot_state(num_slots: int, vocab_size: int) -> SlotState:
    """Make the state of an engine without requests."""
    rows = num_slots + 1
    return SlotState(
        last_token=jnp.zeros(rows, jnp.int32),
        token_counts=jnp.zeros((rows, vocab_size), jnp.int32),
        bias_ids=jnp.full((rows, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
        bias_values=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32),
        end_token_ids=jnp.full((rows, MAX_END_TOKENS), vocab_size, jnp.int32),
        logits=jnp.zeros((rows, vocab_size), jnp.float32),
    )


def needs_admission(params: SlotParams) -> bool:
    """Whether a request uses anything that lies on the device by slot."""
    return params.has_penalties or len(params.logit_bias) > 0 or params.min_tokens > 0


def make_admissions(params: SlotParams, vocab_size: int) -> list[Admission]:
    """Split a request's admission into calls of the admission program, the first one first."""
    chunks = [
        params.token_ids[start : start + ADMISSION_TOKENS]
        for start in range(0, max(1, len(params.token_ids)), ADMISSION_TOKENS)
    ]
    return [
        _admission(
            slot=params.slot,
            is_first=index == 0,
            token_ids=chunk,
            num_prompt_tokens=params.output_start - index * ADMISSION_TOKENS,
            bias_ids=params.logit_bias_ids,
            bias_values=params.logit_bias,
            end_token_ids=params.end_token_ids,
            vocab_size=vocab_size,
        )
        for index, chunk in enumerate(chunks)
    ]


def padding_admission(num_slots: int, vocab_size: int) -> Admission:
    """An admission that concerns no slot: for shapes, and to warm the program up."""
    return _admission(
        slot=num_slots,
        is_first=True,
        token_ids=(),
        num_prompt_tokens=0,
        bias_ids=(),
        bias_values=(),
        end_token_ids=(),
        vocab_size=vocab_size,
    )


def admit(state: SlotState, admission: Admission) -> SlotState:
    """Set what the device holds of one slot. Meant to be compiled, with `state` donated."""
    slot = admission.slot
    counts_V = state.token_counts[slot]
    counts_V = jnp.where(admission.is_first, jnp.zeros_like(counts_V), counts_V)
    is_prompt = jnp.arange(ADMISSION_TOKENS) < admission.num_prompt_tokens
    vocab_size = counts_V.shape[0]
    # Ids of V are out of range, and what is written out of range is dropped.
    prompt_ids = jnp.where(is_prompt, admission.token_ids, vocab_size)
    output_ids = jnp.where(is_prompt, vocab_size, admission.token_ids)
    in_prompt_V = jnp.zeros_like(counts_V).at[prompt_ids].set(IN_PROMPT, mode="drop")
    counts_V = (counts_V | in_prompt_V).at[output_ids].add(ONE_OUTPUT, mode="drop")
    return replace(
        state,
        token_counts=state.token_counts.at[slot].set(counts_V),
        bias_ids=state.bias_ids.at[slot].set(admission.bias_ids),
        bias_values=state.bias_values.at[slot].set(admission.bias_values),
        end_token_ids=state.end_token_ids.at[slot].set(admission.end_token_ids),
    )


def keep_logits(
    state: SlotState,
    logits_RV: jax.Array,
    slot_R: jax.Array,
    row_M: jax.Array,
    num_rows: jax.Array,
) -> SlotState:
    """Keep the logits of some rows by their slots; where there are none it costs nothing.

    Args:
        state: Before the step.
        logits_RV: float32.
        slot_R: int32.
        row_M: int32, the rows.
        num_rows: int32 [], how many of `row_M` there are.
    """

    def keep(place: jax.Array, kept: jax.Array) -> jax.Array:
        row = row_M[place]
        logits_1V = jax.lax.dynamic_slice_in_dim(logits_RV, row, 1)
        return jax.lax.dynamic_update_slice_in_dim(kept, logits_1V, slot_R[row], axis=0)

    return replace(state, logits=jax.lax.fori_loop(0, num_rows, keep, state.logits))


def rows_of_slots(array: jax.Array, slot_R: jax.Array) -> jax.Array:
    """The rows of some slots, one after another.

    As a gather, the compiler for TPUs would take 3 s over rows as long as a vocabulary.
    """

    def copy_row(place: jax.Array, rows: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(array, slot_R[place], 1)
        return jax.lax.dynamic_update_slice_in_dim(rows, row, place, axis=0)

    rows = jnp.zeros((len(slot_R), array.shape[1]), array.dtype)
    return jax.lax.fori_loop(0, len(slot_R), copy_row, rows)


def record_tokens(
    state: SlotState, slot_R: jax.Array, token_R: jax.Array, has_penalties_R: jax.Array
) -> SlotState:
    """Remember the tokens that a step sampled.

    Args:
        state: Before the step.
        slot_R: int32, slot of each row; num_slots for rows that did not sample.
        token_R: int32, sampled tokens.
        has_penalties_R: bool, rows whose tokens are counted.
    """

    def count(token_counts: jax.Array) -> jax.Array:
        row_R = jnp.where(has_penalties_R, slot_R, token_counts.shape[0])
        return token_counts.at[row_R, token_R].add(ONE_OUTPUT, mode="drop")

    return replace(
        state,
        last_token=state.last_token.at[slot_R].set(token_R),
        token_counts=count(state.token_counts),
    )


def _admission(
    *,
    slot: int,
    is_first: bool,
    token_ids: ArrayLike,
    num_prompt_tokens: int,
    bias_ids: ArrayLike,
    bias_values: ArrayLike,
    end_token_ids: ArrayLike,
    vocab_size: int,
) -> Admission:
    def padded(values: ArrayLike, size: int, fill: int, dtype: type) -> np.ndarray:
        array = np.full(size, fill, dtype)
        given = np.asarray(values, dtype)
        array[: len(given)] = given
        return array

    arrays = {
        "slot": np.int32(slot),
        "is_first": np.bool_(is_first),
        "token_ids": padded(token_ids, ADMISSION_TOKENS, vocab_size, np.int32),
        "num_prompt_tokens": np.int32(np.clip(num_prompt_tokens, 0, ADMISSION_TOKENS)),
        "bias_ids": padded(bias_ids, MAX_LOGIT_BIAS, vocab_size, np.int32),
        "bias_values": padded(bias_values, MAX_LOGIT_BIAS, 0, np.float32),
        "end_token_ids": padded(end_token_ids, MAX_END_TOKENS, vocab_size, np.int32),
    }
    # Host arrays where the compiled program takes device arrays: it copies them itself.
    return Admission(**cast("dict[str, jax.Array]", arrays))
