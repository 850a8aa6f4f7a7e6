"""The table of compiled program shapes, and which of them a step takes. Knows no JAX."""

import logging
from collections.abc import Sequence

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.step import Bucket

logger = logging.getLogger(__name__)

MIN_CHUNK_TOKENS = 32
"""Smaller prefills are padded to this: a program more would cost more than the padding."""

CHUNK_TOKENS_PER_CHUNK = 16
"""A bucket has a chunk row for each so many chunk tokens, up to `max_running_requests`."""

FEW_SEQS = 8
"""Decode rows of the smaller mixed shapes: they cost little beside `MIN_CHUNK_TOKENS`."""


def bucket_table(config: EngineConfig, *, context_length: int) -> tuple[Bucket, ...]:
    """List every program shape that an engine compiles, cheapest first.

    Decode-only shapes have 2, 4, 8 .. rows (a single row is padded to two, because a matrix product
    of one row is far slower on CPUs than one of two). Mixed shapes carry all decode rows; where
    these are many, also a few, so that a prefill with few decodes beside it does not pay for all.

    Args:
        config: Gives `max_running_requests`, the chunk size and the extra paddings.
        context_length: No chunk is longer than this, so no bucket need be, for few slots.
    """
    max_seqs = round_up_to_power_of_two(max(2, config.max_running_requests))
    decode_sizes = _powers_of_two(2, max_seqs)
    most_tokens = min(config.prefill_chunk_tokens, context_length * config.max_running_requests)
    # A prefill step takes as long as its shape: a prompt of 256 tokens in one of 512 waits double.
    token_sizes = {most_tokens, *_powers_of_two(MIN_CHUNK_TOKENS, most_tokens)}
    for padding in config.jax_precompile_prefill_token_paddings:
        if padding <= most_tokens:
            token_sizes.add(padding)
        else:
            logger.warning(
                "--jax-precompile-prefill-token-paddings=%d is not compiled: no step computes more "
                "than %d prompt tokens. Raise --chunked-prefill-size or leave it out.",
                padding,
                most_tokens,
            )
    buckets = [Bucket(size) for size in decode_sizes]
    for tokens in sorted(token_sizes):
        chunks = _num_chunks(tokens, config.max_running_requests)
        for num_seqs in sorted({min(max_seqs, FEW_SEQS), max_seqs}):
            buckets.append(Bucket(num_seqs, tokens, chunks))
    return tuple(buckets)


def choose_bucket(
    buckets: Sequence[Bucket], num_decodes: int, chunk_tokens: int, num_chunks: int
) -> Bucket:
    """Take the cheapest shape that holds a step.

    Args:
        buckets: From `bucket_table`.
        num_decodes: Decode rows of the step.
        chunk_tokens: Tokens of all its chunks together.
        num_chunks: Its chunks.

    Raises:
        EngineError: None is large enough.
    """
    fitting = [
        bucket
        for bucket in buckets
        if bucket.num_seqs >= num_decodes
        and bucket.num_chunk_tokens >= chunk_tokens
        and bucket.num_chunks >= num_chunks
    ]
    if not fitting:
        raise EngineError(
            f"no compiled program holds {num_decodes} decodes and {chunk_tokens} prefill tokens "
            f"in {num_chunks} chunks; the largest is {max(buckets, key=_cost)}"
        )
    return min(fitting, key=_cost)


def round_up_to_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _cost(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.num_seqs + bucket.num_chunk_tokens, bucket.num_chunk_tokens, bucket.num_chunks


def _num_chunks(tokens: int, max_running_requests: int) -> int:
    chunks = max(4, tokens // CHUNK_TOKENS_PER_CHUNK)
    return max(1, min(chunks, max_running_requests, tokens))


def _powers_of_two(low: int, high: int) -> list[int]:
    sizes = []
    while low <= high:
        sizes.append(low)
        low *= 2
    return sizes
