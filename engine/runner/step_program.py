"""One step as a pure function: forward, sample, remember. Everything in it is traced once.

Knows the device's side only; what a plan is, `batch` knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from engine.kernels.attention import AttentionMetadata, Cache
from engine.models.registry import Model
from engine.runner.batch import ChunkRow, FloatColumn, IntColumn, MaskedInputs, StepInputs
from engine.runner.likeliest import Likeliest
from engine.runner.sampler import Logprobs, SamplingInputs, logprobs_of, no_logprobs, sample
from engine.runner.slot_state import SlotState, keep_logits, record_tokens, rows_of_slots

PROMPT_LOGPROBS_BLOCK = 64
"""Chunk tokens whose logits exist at the same time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """What a step gives back; log probabilities are zeros unless asked for.

    Attributes:
        token_ids: int32 [R], sampled.
        logprobs: Theirs.
        prompt_logprobs: [num_chunk_tokens]: of the token that follows each.
        hidden: float32 [num_chunks, D], normalised hidden states of the chunks' last tokens.
    """

    token_ids: jax.Array
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    hidden: jax.Array


StepFunction = Callable[[Any, Cache, SlotState, StepInputs], tuple[StepOutputs, Cache, SlotState]]


def make_step(model: Model, *, page_size: int, likeliest: Likeliest) -> StepFunction:
    """Make the function that a bucket's program compiles; donate cache and state.

    Args:
        model: The architecture, without parameters.
        page_size: Tokens in a page.
        likeliest: How sampling finds the likeliest tokens.
    """

    def step(
        params: Any, cache: Cache, state: SlotState, inputs: StepInputs
    ) -> tuple[StepOutputs, Cache, SlotState]:
        metadata = _attention_metadata(inputs, page_size)
        num_decode_rows = metadata.num_decode_rows
        # A decode row's input is what its slot sampled last, which the host may not know yet.
        decode_ids = state.last_token[inputs.row_ints[:num_decode_rows, IntColumn.SLOT]]
        token_ids_T = jnp.concatenate([decode_ids, inputs.chunk_tokens[ChunkRow.TOKEN_ID]])
        rope_alpha_T = inputs.row_floats[metadata.row_T, FloatColumn.ROPE_ALPHA]
        hidden_TD, cache = model.forward(params, token_ids_T, rope_alpha_T, cache, metadata)

        last_of_chunk = jnp.maximum(inputs.cu_chunk_lens[1:] - 1, 0)
        sampled_token_R = jnp.concatenate(
            [jnp.arange(num_decode_rows), num_decode_rows + last_of_chunk]
        )
        # They stay sharded over the vocabulary: what is gathered is candidates, not logits.
        hidden_RD = hidden_TD[sampled_token_R]
        logits_RV = model.logits(params, hidden_RD)
        sampling = _sampling_inputs(inputs)
        token_ids, logprobs = sample(logits_RV, sampling, state, likeliest)
        is_masked_R = inputs.row_ints[:, IntColumn.IS_MASKED] > 0
        state = keep_logits(
            state, logits_RV, sampling.slot, inputs.masked_rows, inputs.num_masked_rows
        )
        recorded_slot_R = jnp.where(is_masked_R, state.num_slots, sampling.slot)
        state = record_tokens(state, recorded_slot_R, token_ids, sampling.has_penalties)
        with jax.named_scope("prompt_logprobs"):
            prompt_logprobs = _prompt_logprobs(
                lambda some_TD, next_T: logprobs_of(
                    model.logits(params, some_TD), next_T, likeliest
                ),
                hidden_TD,
                inputs,
            )
        outputs = StepOutputs(
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden=hidden_RD[num_decode_rows:].astype(jnp.float32),
        )
        return outputs, cache, state

    return step


MaskedSampling = Callable[[SlotState, MaskedInputs], tuple[jax.Array, Logprobs, SlotState]]


def make_masked_sampling(likeliest: Likeliest) -> MaskedSampling:
    """Make the function that samples rows of the step before; donate the state.

    It gives int32 [M] tokens, their log probabilities, and the state.
    """

    def sample_masked(
        state: SlotState, inputs: MaskedInputs
    ) -> tuple[jax.Array, Logprobs, SlotState]:
        sampling = _sampling_inputs(inputs)
        logits_MV = rows_of_slots(state.logits, sampling.slot)
        token_ids, logprobs = sample(logits_MV, sampling, state, likeliest, inputs.masks)
        state = record_tokens(state, sampling.slot, token_ids, sampling.has_penalties)
        return token_ids, logprobs, state

    return sample_masked


def _prompt_logprobs(
    score: Callable[[jax.Array, jax.Array], Logprobs], hidden_TD: jax.Array, inputs: StepInputs
) -> Logprobs:
    """Log probabilities of the tokens that follow the chunk tokens, a block of them at a time.

    Where none are wanted, the loop has no turns.
    """
    num_tokens = inputs.chunk_tokens.shape[1]
    block = min(PROMPT_LOGPROBS_BLOCK, num_tokens)
    if num_tokens == 0:
        return no_logprobs(0)
    num_decode_rows = len(hidden_TD) - num_tokens
    padding = -num_tokens % block
    next_T = jnp.pad(inputs.chunk_tokens[ChunkRow.NEXT_TOKEN_ID], (0, padding))

    def add_block(index: jax.Array, found: Logprobs) -> Logprobs:
        start = index * block
        # Taken in the loop: hidden states that are shared out over devices come together only
        # where somebody asks.
        token = jnp.minimum(num_decode_rows + start + jnp.arange(block), len(hidden_TD) - 1)
        some_TD = hidden_TD[token]
        of_block = score(some_TD, jax.lax.dynamic_slice_in_dim(next_T, start, block))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0),
            found,
            of_block,
        )

    num_real = jnp.where(inputs.has_prompt_logprobs, inputs.cu_chunk_lens[-1], 0)
    num_blocks = (num_real + block - 1) // block
    found = jax.lax.fori_loop(0, num_blocks, add_block, no_logprobs(num_tokens + padding))
    return jax.tree.map(lambda array: array[:num_tokens], found)


def _attention_metadata(inputs: StepInputs, page_size: int) -> AttentionMetadata:
    kv_len_R = inputs.row_ints[:, IntColumn.KV_LEN]
    num_decode_rows = kv_len_R.shape[0] - (inputs.cu_chunk_lens.shape[0] - 1)
    return AttentionMetadata(
        position_T=jnp.concatenate(
            [kv_len_R[:num_decode_rows] - 1, inputs.chunk_tokens[ChunkRow.POSITION]]
        ),
        row_T=jnp.concatenate(
            [
                jnp.arange(num_decode_rows, dtype=jnp.int32),
                inputs.chunk_tokens[ChunkRow.SEQUENCE_ROW],
            ]
        ),
        page_indices=inputs.page_indices,
        kv_lens=kv_len_R,
        cu_chunk_lens=inputs.cu_chunk_lens,
        num_decodes=inputs.num_decodes,
        page_size=page_size,
        num_decode_rows=num_decode_rows,
    )


def _sampling_inputs(inputs: StepInputs | MaskedInputs) -> SamplingInputs:
    def ints(column: IntColumn) -> jax.Array:
        return inputs.row_ints[:, column]

    def floats(column: FloatColumn) -> jax.Array:
        return inputs.row_floats[:, column]

    seed = jnp.stack([ints(IntColumn.SEED_HIGH), ints(IntColumn.SEED_LOW)], axis=1)
    return SamplingInputs(
        slot=ints(IntColumn.SLOT),
        temperature=floats(FloatColumn.TEMPERATURE),
        top_k=ints(IntColumn.TOP_K),
        top_p=floats(FloatColumn.TOP_P),
        min_p=floats(FloatColumn.MIN_P),
        presence_penalty=floats(FloatColumn.PRESENCE_PENALTY),
        frequency_penalty=floats(FloatColumn.FREQUENCY_PENALTY),
        repetition_penalty=floats(FloatColumn.REPETITION_PENALTY),
        has_penalties=ints(IntColumn.HAS_PENALTIES) > 0,
        has_logit_bias=ints(IntColumn.HAS_LOGIT_BIAS) > 0,
        bans_end_tokens=ints(IntColumn.KV_LEN) < ints(IntColumn.MIN_LEN),
        seed=jax.lax.bitcast_convert_type(seed, jnp.uint32),
        choice_index=ints(IntColumn.CHOICE_INDEX),
        position=ints(IntColumn.KV_LEN),
        has_logprobs=inputs.has_logprobs,
    )
