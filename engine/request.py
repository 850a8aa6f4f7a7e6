"""What a caller asks of the engine, in token ids: the request and its sampling parameters.

Knows no text (stop strings live above) and no arrays. The scheduler owns a request's state.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import numpy as np

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKENS = 16
_LONG_NUMBER = 10**30

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen; names and meaning as in OpenAI's API, extras as in vLLM's.

    Raises:
        RequestError: On construction, for a value out of range, naming the field.

    Attributes:
        temperature: 0 picks the likeliest token; 1 samples from the model's distribution.
        top_p: Smallest set of likeliest tokens whose probabilities sum to at least this.
        top_k: That many likeliest tokens; 0 means all.
        min_p: Tokens at least this likely, relative to the likeliest one.
        logit_bias: Token id to a number from -100 to 100 added to its logit.
        seed: The same seed gives the same tokens; None lets the engine choose one.
        max_tokens: Most tokens to generate; None fills the context.
        min_tokens: No end token before that many.
        stop_token_ids: End tokens of this request, beside the model's own.
        ignore_eos: Go on past the model's own end tokens.
        logprobs: None for none, else how many alternatives to report beside the chosen token.
        prompt_logprobs: The same for the tokens of the prompt, all but its first.
        embedding: Report the prompt's: the model's last hidden state of its last token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 2)
        _within("top_p", self.top_p, 0, 1, low_open=True)
        _within("min_p", self.min_p, 0, 1)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("repetition_penalty", self.repetition_penalty, 0, 10, low_open=True)
        _within("top_k", self.top_k, -1, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}.",
                    param="min_tokens",
                )
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _within("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS} may be.",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _within("logit_bias", bias, -100, 100)
            _within("logit_bias", token_id, 0, 2**31 - 1)
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most "
                f"{MAX_STOP_TOKENS} may be given.",
                param="stop_token_ids",
            )

    @property
    def has_penalties(self) -> bool:
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # What is no number is not above anything, and a whole number may be too long for a float.
    is_above = value > low if low_open else value >= low
    if not is_above or not value <= high:
        is_long = isinstance(value, int) and abs(value) >= _LONG_NUMBER
        shown = "a very long number" if is_long else value
        bound = f"above {low}" if low_open else f"at least {low}"
        raise RequestError(f"{name} is {shown}; it must be {bound} and at most {high}.", param=name)


class TokenConstraint(Protocol):
    """Which tokens may follow, as a grammar has it; one per request, moved on by its tokens."""

    @property
    def error(self) -> str | None:
        """Why no token may come next at all, or None; the request ends then."""
        ...

    def allowed_tokens(self) -> np.ndarray | None:
        """The tokens that may come next: uint32 words, bit i of word w for id 32 * w + i.

        At least one is allowed unless there is an `error`. Ids behind the last word are not. None
        allows all.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take in the token that came; it was allowed."""
        ...

    def forced_tokens(self) -> Sequence[int]:
        """The tokens that come next whatever is sampled, each then the only one allowed."""
        ...


class RequestState(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence to generate. Made by the caller; after `EngineCore.add` the scheduler owns it.

    Attributes:
        request_id: Unique within the engine; choices of one call differ in it.
        prompt_token_ids: Not empty.
        sampling: Its `seed` is not None.
        choice_index: Which of a call's n choices: part of the random key.
        eos_token_ids: The model's own end tokens.
        rope_alpha: Factor on the rope base, fixed from the original prompt's length.
        cache_salt: Prompts share cached pages only under an equal salt.
        num_prompt_output_tokens: How many of `prompt_token_ids`, counted from their end, were
            generated by an earlier attempt: they count as output for penalties, random keys,
            min_tokens and max_tokens.
        constraint: Says before each token which may come; None = any.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    choice_index: int = 0
    eos_token_ids: tuple[int, ...] = ()
    rope_alpha: float = 1.0
    cache_salt: bytes = b""
    num_prompt_output_tokens: int = 0
    constraint: TokenConstraint | None = None

    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_published_pages: int = 0
    """How many of `pages`, from the first on, others may find."""
    page_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full pages of known tokens, as far as they were asked for: they never
    change, whatever becomes of the pages."""
    output_token_ids: list[int] = field(default_factory=list)
    num_reported_tokens: int = 0
    """Of `output_token_ids`, those that its owner has been told."""
    prompt_logprobs: "list[TokenLogprobs]" = field(default_factory=list)
    """Of the prompt's second token and those that follow, as far as they are known."""
    num_computed_tokens: int = 0
    """KV written, or planned to be by a step that is already under way."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache held at first admission."""
    num_inflight_tokens: int = 0
    """Tokens sampled by planned steps whose results are not in `output_token_ids` yet."""
    num_inflight_steps: int = 0
    num_preemptions: int = 0
    queued_s: float = 0.0
    """When it was added, by the monotonic clock."""
    admitted_s: float = 0.0
    """When it first got a slot, by the monotonic clock."""
    first_token_s: float = 0.0
    """When its first token of this attempt was read, by the monotonic clock; 0 before."""
    last_token_s: float = 0.0
    """When its latest token was read."""
    is_decoding: bool = False
    """Its next input is the token that its slot sampled last, on the device."""
    max_len: int = 0
    """Prompt and output together never exceed this; set at admission to the queue."""

    @property
    def num_tokens(self) -> int:
        """Prompt and known output tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether they are asked for, and not known yet."""
        if self.sampling.prompt_logprobs is None or self.num_prompt_output_tokens:
            return False
        return len(self.prompt_logprobs) < len(self.prompt_token_ids) - 1

    @property
    def wants_embedding(self) -> bool:
        """Whether the prompt's embedding is asked for, and not known yet."""
        return self.sampling.embedding and not self.output_token_ids

    def token_ids_from(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start to stop - 1 of prompt and output together."""
        prompt_len = len(self.prompt_token_ids)
        if stop <= prompt_len:
            return self.prompt_token_ids[start:stop]
        head = self.prompt_token_ids[start:] if start < prompt_len else []
        return head + self.output_token_ids[max(0, start - prompt_len) : stop - prompt_len]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution.

    Attributes:
        logprob: Of the chosen token.
        rank: Its: 1 for the likeliest.
        top_token_ids: The likeliest tokens, likeliest first, as many as were asked for.
        top_logprobs: Theirs.
    """

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Where a request's time in its engine went, as far as it has come.

    Attributes:
        queue_s: From its arrival to its slot.
        prefill_s: From the slot to the first token.
        decode_s: From the first token to the latest.
        num_preemptions: How often its pages were taken from it.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    num_preemptions: int


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step gave one request.

    Attributes:
        first_index: Index among the request's output tokens of `token_ids[0]`.
        token_ids: New tokens; an end token that stopped the request is among them.
        logprobs: One per token, or empty if not asked for.
        stop_token_id: The end token that stopped it, if one did.
        prompt_logprobs: With the first token: one per prompt token but the first, if asked for.
        timing: With the first token that the engine generates of a request, and with the last.
        embedding: float32, little-endian, with the first token if asked for.
    """

    request_id: str
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    timing: RequestTiming | None = None
    embedding: bytes = b""
