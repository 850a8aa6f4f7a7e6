"""What passes between the leader and its hosts: plans down, results up.

A plan is self-sufficient and holds only what changed: a host applies it to the state that it kept
from the plans before, so that its size does not grow with the context. No JAX here: the leader
makes plans without it. Plans and results travel as msgpack; arrays as little-endian bytes.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from engine.errors import EngineError

MAX_TOP_LOGPROBS = 20
"""Alternatives that a step reports for each row, however many a request wants."""

NO_FLOATS = np.empty(0, np.float32)
NO_INTS = np.empty(0, np.int32)


class Bucket(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Shape of a compiled program.

    A program computes `num_seqs` decode rows of one token each, and `num_chunk_tokens` tokens of
    prefill chunks in at most `num_chunks` chunks; either part may be padding.
    """

    num_seqs: int
    num_chunk_tokens: int = 0
    num_chunks: int = 0


class SlotParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a host must know of a request while it holds a slot; sent once, at admission.

    Attributes:
        slot: 0 to max_running_requests - 1.
        output_start: Position of the first output token (the original prompt's length).
        seed: Any 64-bit integer, as unsigned.
        choice_index: Folded into the random key beside the seed and the position.
        min_tokens: `end_token_ids` cannot be sampled at positions before output_start + this.
        logit_bias_ids, logit_bias: Parallel lists.
        token_ids: With penalties, prompt and known output from position 0, to seed the counts;
            else empty.
        rope_alpha: Factor on the rope base (models without it ignore it).
    """

    slot: int
    output_start: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    choice_index: int
    min_tokens: int
    end_token_ids: np.ndarray
    logit_bias_ids: np.ndarray
    logit_bias: tuple[float, ...]
    token_ids: np.ndarray
    rope_alpha: float = 1.0

    @property
    def has_penalties(self) -> bool:
        return len(self.token_ids) > 0


class PageUpdate(msgspec.Struct, frozen=True, array_like=True):
    """Pages appended to a slot's page table from entry `first` on."""

    slot: int
    first: int
    pages: np.ndarray


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one request's prompt (or of its recomputation).

    `is_last` says that the token after the chunk is to be sampled; `next_token_id` is that token
    where it is known and its log probability is wanted, else -1.
    """

    slot: int
    start: int
    token_ids: np.ndarray
    is_last: bool
    next_token_id: int = -1


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step for every host: the same plan on each gives the same tokens on each.

    Rows are numbered: decodes first, chunks after them.

    Attributes:
        step: Counts up by one from 0 within an epoch.
        bucket: The compiled program to run.
        admissions: Requests that enter a slot with this step, before anything else is applied.
        page_updates: New page-table entries.
        decode_slots: int32, slots that decode; the input is the slot's last sampled token, which
            only the device need know.
        decode_positions: int32, position of that input token.
        chunks: Prefill chunks.
        has_logprobs: Whether log probabilities of this step's tokens are wanted.
        has_prompt_logprobs: Whether those of the chunks' tokens are.
        masked_rows: int32, rows whose tokens are sampled once the step's `StepMasks` has come,
            which follows before the next plan.
        embedded_rows: int32, rows of chunks whose last tokens' hidden states are wanted.
    """

    step: int
    bucket: Bucket
    admissions: tuple[SlotParams, ...] = ()
    page_updates: tuple[PageUpdate, ...] = ()
    decode_slots: np.ndarray
    decode_positions: np.ndarray
    chunks: tuple[Chunk, ...] = ()
    has_logprobs: bool = False
    has_prompt_logprobs: bool = False
    masked_rows: np.ndarray = NO_INTS
    embedded_rows: np.ndarray = NO_INTS

    @property
    def num_rows(self) -> int:
        return len(self.decode_slots) + len(self.chunks)

    def slot_and_end(self, row: int) -> tuple[int, int]:
        """A row's slot, and the position of the token that it samples."""
        num_decodes = len(self.decode_slots)
        if row < num_decodes:
            return int(self.decode_slots[row]), int(self.decode_positions[row]) + 1
        chunk = self.chunks[row - num_decodes]
        return chunk.slot, chunk.start + len(chunk.token_ids)


class StepMasks(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Which tokens a step's masked rows may sample.

    They depend on the tokens of the step before, so that they come after the plan, while the device
    computes all that does not depend on them.

    Attributes:
        step: The plan's.
        words: One for each of `StepPlan.masked_rows`: uint32 as `TokenConstraint.allowed_tokens`
            has them, sent as int32; empty = any token.
    """

    step: int
    words: tuple[np.ndarray, ...]


class StepLogprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Natural-log probabilities of N tokens of a step, of the model's own distribution.

    Attributes:
        logprobs: float32 [N].
        ranks: int32 [N]: 1 for the likeliest.
        top_token_ids: int32 [N * MAX_TOP_LOGPROBS], the likeliest in each token's place, in order.
        top_logprobs: float32 [N * MAX_TOP_LOGPROBS].
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_token_ids: np.ndarray
    top_logprobs: np.ndarray


class StepResult(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What rank 0 read back of a step.

    Attributes:
        step: The plan's.
        token_ids: int32 [num_rows]; rows of chunks that are not last are meaningless.
        logprobs: Of each row's token; None if not wanted.
        prompt_logprobs: Of the token after each of the chunks', as far as it is known to the plan;
            None if not wanted.
        embeddings: float32 [embedded rows * D], the model's last hidden states, normalised by its
            last norm and not otherwise; or empty.
        device_ms: From dispatch to the tokens' arrival on the host.
        num_compiles: Programs that rank 0 compiled since it was ready; anything but 0 is a fault.
    """

    step: int
    token_ids: np.ndarray
    logprobs: StepLogprobs | None = None
    prompt_logprobs: StepLogprobs | None = None
    embeddings: np.ndarray = NO_FLOATS
    device_ms: float = 0.0
    num_compiles: int = 0


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the executor found out while starting; the scheduler lives within it.

    Attributes:
        num_pages: Pages of the KV pool, page 0 excluded from use (padding is written there).
        page_size: Tokens in a page.
        context_length: Longest prompt plus output.
        max_running_requests: Slots.
        buckets: Compiled programs.
        vocab_size: Token ids are below it.
        model_fingerprint: Stands for weights' identity, dtype and tp size in `system_fingerprint`.
        chunk_cost: How much longer a decoding step takes with a small chunk beside it, as a share.
    """

    num_pages: int
    page_size: int
    context_length: int
    max_running_requests: int
    buckets: tuple[Bucket, ...]
    vocab_size: int
    model_fingerprint: str = ""
    chunk_cost: float = 0.0


class StartProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a start has come: `phase` is one of placement, rendezvous, weights, compile, warmup.

    `done` of `total` counts hosts, bytes or programs, by the phase. `rank` is the host's that it
    is about, None for the gang as a whole.
    """

    phase: str
    done: int = 0
    total: int = 0
    note: str = ""
    rank: int | None = None


ProgressCallback = Callable[[StartProgress], None]


class Executor(Protocol):
    """Runs plans on all hosts. The only seam between planning and computing."""

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        """Load, compile and report what was found.

        Raises:
            CheckpointError, CapacityError, ConfigError: Naming what to change.
            EngineError: A host failed; carries that host's own traceback.
        """
        ...

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Start a step; at most two may be under way. Results come in order.

        The future raises EngineError if a host dies; the executor is then of no more use.
        """
        ...

    def mask(self, masks: StepMasks) -> None:
        """Have the step that was started last sample its masked rows; it has some."""
        ...

    async def stop(self) -> None:
        """End all processes and threads; safe to call twice."""
        ...


_DTYPES = {b"i": np.dtype("<i4"), b"f": np.dtype("<f4")}


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.str in ("<i4", "<f4"):
        # The kind stands behind the numbers, so that these stay where msgpack put them.
        return value.tobytes() + value.dtype.kind.encode()
    raise TypeError(f"cannot send {type(value).__name__} {value!r}")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray and isinstance(value, bytes) and value[-1:] in _DTYPES:
        return np.frombuffer(value[:-1], _DTYPES[value[-1:]])
    raise TypeError(f"cannot receive {kind.__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_plan_decoder = msgspec.msgpack.Decoder(StepPlan, dec_hook=_decode_array)
_masks_decoder = msgspec.msgpack.Decoder(StepMasks, dec_hook=_decode_array)
_result_decoder = msgspec.msgpack.Decoder(StepResult, dec_hook=_decode_array)


def encode(message: StepPlan | StepMasks | StepResult) -> bytes:
    """Encode as msgpack."""
    return _encoder.encode(message)


def decode_plan(data: bytes | memoryview) -> StepPlan:
    """Decode a plan. Raises EngineError for bytes that are none."""
    try:
        return _plan_decoder.decode(data)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise EngineError(f"a host received a step plan that it cannot read: {error}") from error


def decode_masks(data: bytes | memoryview) -> StepMasks:
    """Decode a step's masks. Raises EngineError for bytes that are none."""
    try:
        return _masks_decoder.decode(data)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise EngineError(f"a host received masks that it cannot read: {error}") from error


def decode_result(data: bytes | memoryview) -> StepResult:
    """Decode a result. Raises EngineError for bytes that are none."""
    try:
        return _result_decoder.decode(data)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise EngineError(f"the leader received a result that it cannot read: {error}") from error
