"""One step as a pure function: forward, sample, remember. Everything in it is traced once.

Knows the device's side only; what a plan is, `batch` knows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from engine.kernels.attention import AttentionMetadata, Cache
from engine.models.registry import Model
from engine.runner.batch import ChunkRow, FloatColumn, IntColumn, StepInputs
from engine.runner.sampler import Sampled, SamplingInputs, sample
from engine.runner.slot_state import SlotState, record_tokens

StepFunction = Callable[[Any, Cache, SlotState, StepInputs], tuple[Sampled, Cache, SlotState]]


def make_step(model: Model, *, page_size: int, replicated: NamedSharding) -> StepFunction:
    """Make the function that a bucket's program compiles; donate cache and state.

    Args:
        model: The architecture, without parameters.
        page_size: Tokens in a page.
        replicated: Sharding of an array that every device holds whole.
    """

    def step(
        params: Any, cache: Cache, state: SlotState, inputs: StepInputs
    ) -> tuple[Sampled, Cache, SlotState]:
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
        logits_RV = model.logits(params, hidden_TD[sampled_token_R])
        logits_RV = jax.lax.with_sharding_constraint(
            logits_RV, NamedSharding(replicated.mesh, PartitionSpec())
        )
        sampling = _sampling_inputs(inputs)
        sampled = sample(logits_RV, sampling, state)
        state = record_tokens(state, sampling.slot, sampled.token_ids, sampling.has_penalties)
        return sampled, cache, state

    return step


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


def _sampling_inputs(inputs: StepInputs) -> SamplingInputs:
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
