"""The table of compiled program shapes, and which of them a step takes. Knows no JAX."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.step import Bucket

logger = logging.getLogger(__name__)

CHUNK_TOKENS_PER_CHUNK = 16
"""A bucket has a chunk row for each so many chunk tokens, up to `max_running_requests`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How far apart the shapes of a platform lie.

    Attributes:
        min_seqs: Decode rows of the smallest shape.
        seqs_factor: From one number of decode rows to the next.
        few_seqs: Decode rows of the smaller mixed shapes, beside those that carry all; None =
            all mixed shapes carry all.
        min_chunk_tokens: Smaller prefills are padded to this.
        chunk_cost: How much longer a decoding step of a few rows takes with the smallest prefill
            beside it, as a share of the step.
    """

    min_seqs: int
    seqs_factor: int
    few_seqs: int | None
    min_chunk_tokens: int
    chunk_cost: float


HOST_STEPS = Steps(min_seqs=2, seqs_factor=2, few_seqs=8, min_chunk_tokens=32, chunk_cost=2)
"""A row more takes its share of time; but a product of one row is far slower than one of two."""

TPU_STEPS = Steps(min_seqs=8, seqs_factor=8, few_seqs=None, min_chunk_tokens=256, chunk_cost=1 / 3)
"""Reading the weights takes as long as computing 560 rows (v6e): 64 decodes cost what 8 do, and 256
tokens of a prompt a third more. Each program costs 20 to 80 s of compiling and its code's memory.
"""


def steps_of(platform: str) -> Steps:
    """A platform's: "cpu", "gpu" or "tpu"."""
    return TPU_STEPS if platform == "tpu" else HOST_STEPS


def bucket_table(config: EngineConfig, *, context_length: int, platform: str) -> tuple[Bucket, ...]:
    """List every program shape that an engine compiles, cheapest first.

    Decode-only shapes, and mixed ones, which carry all decode rows; where these are many and cost
    time, also a few, so that a prefill with few decodes beside it does not pay for all.

    Args:
        config: Gives `max_running_requests`, the chunk size and the extra paddings.
        context_length: No chunk is longer than this, so no bucket need be, for few slots.
        platform: "cpu", "gpu" or "tpu".
    """
    steps = steps_of(platform)
    max_seqs = round_up_to_power_of_two(max(steps.min_seqs, config.max_running_requests))
    decode_sizes = sorted({max_seqs, *_sizes(steps.min_seqs, max_seqs, steps.seqs_factor)})
    most_tokens = min(config.prefill_chunk_tokens, context_length * config.max_running_requests)
    # A prefill step takes as long as its shape: a prompt of 256 tokens in one of 512 waits double.
    token_sizes = {most_tokens, *_sizes(steps.min_chunk_tokens, most_tokens, 2)}
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
        for num_seqs in sorted({min(max_seqs, steps.few_seqs or max_seqs), max_seqs}):
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


def _sizes(low: int, high: int, factor: int) -> list[int]:
    sizes = []
    while low <= high:
        sizes.append(low)
        low *= factor
    return sizes
