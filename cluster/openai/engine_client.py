"""What the HTTP world asks of an engine and gets back, in token ids.

The routes code against `EngineClient`; the one over Ray Serve and a test's fake both implement it.
Knows neither Ray nor text nor HTTP.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from cluster.response_shelf import KeptResponse
from engine.grammar import Grammar
from engine.request import FinishReason, RequestTiming, SamplingParams, TokenLogprobs
from engine.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRequest:
    """One sequence to generate.

    Attributes:
        prompt_token_ids: Not empty, and shorter than the context.
        sampling: Its `max_tokens` is set; its `seed` is None if the client gave none.
        sample_index: Which of the n choices of its own prompt: part of the random key, beside the
            seed, so that equal prompts with equal seeds give equal choices.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    sample_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request.

    Attributes:
        tenant: Its API key's hash: what tenants have cached is no other's. Empty without keys.
        session: Requests of one session go to the same engine where that is possible.
    """

    tenant: bytes = b""
    session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """All sequences of one client request: every prompt's n choices.

    Attributes:
        request_id: Unique among all routers, as the client sees it (chatcmpl-…).
        choices: In OpenAI's order of `index`; the position here is what `generate` yields.
        cache_salt: Prompts share cached pages only under an equal salt.
        session: Requests of one session go to the same engine where that is possible.
        tenant: Who alone may have the rest of it.
        origin: What a router needs to answer the client anew; means nothing to engines.
        weights: Whose token ids these are: `EngineConfig.weights_name`. Empty goes with any.
        grammar: What each choice must be; None = anything.
    """

    request_id: str
    choices: tuple[ChoiceRequest, ...]
    cache_salt: bytes = b""
    session: str | None = None
    tenant: bytes = b""
    origin: bytes = b""
    weights: str = ""
    grammar: Grammar | None = None


class PastChoice(msgspec.Struct, array_like=True):
    """What has come of a choice; fields are those of `TokenDelta`, all its deltas joined."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


class StreamRecord(msgspec.Struct, frozen=True, array_like=True):
    """All that is needed to go on with a request: by another engine, or for another router.

    Attributes:
        request: Each choice's seed is set.
        attempt: Number of the latest call to an engine.
        past: One per choice.
    """

    request: GenerateRequest
    attempt: int
    past: list[PastChoice]


class EngineVisit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How a choice fares with the engine that generates it: one visit is one attempt.

    Attributes:
        attempt: 0, or how often the request has left an engine that died.
        timing: As far as the visit has come.
    """

    engine_id: str
    epoch: int
    attempt: int
    num_cached_tokens: int
    timing: RequestTiming


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """New tokens of one choice: those of one step, or of several if the router lags.

    Attributes:
        token_ids: An end token that stopped the choice is among them, as the last one.
        logprobs: One per token, or empty if not asked for.
        finish_reason: Set on the choice's last delta, which may have no tokens.
        stop_token_id: The end token that stopped it, if one did.
        num_cached_tokens: Prompt tokens that the prefix cache held; the same in each delta.
        prompt_logprobs: With the first token: one per prompt token but the first, if asked for.
        visit: With an attempt's first token and with the choice's last, unless its end was cut.
        embedding: The prompt's, with the first token: float32, little-endian; empty if not asked
            for.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    visit: EngineVisit | None = None
    embedding: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One host of an engine, as `/health/ready` shows it.

    Attributes:
        rank: 0 to nnodes - 1.
        state: A phase of its start (`StartProgress`), ready, or silent: it has not answered lately.
        note: What a person wants to know beside it ("weights 3.1 of 15.2 GB", a host, an error).
        seconds_since_answer: Age of its last sign of life, or None if it never gave one.
    """

    rank: int
    state: str
    note: str = ""
    seconds_since_answer: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the routes must know of the engine.

    Attributes:
        is_ready: Every rank of some engine answered lately and can take requests.
        engine_id: Whose answer this is; empty for what is known of several.
        epoch: How often its hosts were started.
        status: One line for people: what is being waited for, or why it cannot serve.
        page_size: Tokens in a KV page; 0 until an engine was ready once.
        context_length: Longest prompt plus output; 0 until an engine was ready once.
        vocab_size: Token ids are below it; 0 until an engine was ready once.
        eos_token_ids: The model's own end tokens.
        generation_defaults: Names of `SamplingParams` to values of generation_config.json, used
            where the client gives nothing.
        fingerprint: Reported as `system_fingerprint`.
        ranks: Of all engines, one after the other.
        stats: The engine's counters, as of its last answer.
    """

    is_ready: bool
    engine_id: str = ""
    epoch: int = 0
    status: str = ""
    page_size: int = 0
    context_length: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, float | int] = field(default_factory=dict)
    fingerprint: str = ""
    ranks: tuple[RankStatus, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)


FleetEventKind = Literal["came", "ready", "lost", "rebuilt", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvent:
    """Something that happened to an engine.

    Attributes:
        time_s: Seconds since 1970, by the clock of the router that noticed.
        engine_id: Whom it happened to.
        kind: It came to start; is ready; lost a host, or its readiness; was rebuilt, so is ready
            again with other processes; is gone for good.
        what: The same for people, with what is known of it.
    """

    time_s: float
    engine_id: str
    kind: FleetEventKind
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The engines one by one, for people.

    Attributes:
        engines: Those that start as well, of which no more than status and ranks is known.
        events: The latest last.
    """

    engines: tuple[EngineInfo, ...]
    events: tuple[FleetEvent, ...]


class ResponseStore(Protocol):
    """Where responses are kept for all routers, as bytes. Used from one event loop."""

    async def store(
        self, response_id: str, tenant: bytes, content: bytes, *, is_ended: bool
    ) -> bool:
        """Keep a tenant's response; False if nobody does.

        One that is under way never takes the place of one that has ended.
        """
        ...

    async def renew(self, response_id: str, tenant: bytes) -> bool:
        """Say that a tenant's response is still under way.

        Returns:
            Whether all have it that would keep it now; else it should be stored again.
        """
        ...

    async def find(self, response_id: str, tenant: bytes) -> KeptResponse | None:
        """A tenant's response; None if nobody keeps it.

        Raises:
            EngineNotReadyError: Who may keep it could not be asked.
        """
        ...

    async def forget(self, response_id: str, tenant: bytes) -> bool:
        """Have a tenant's response kept no longer; False if nobody did.

        Raises:
            EngineNotReadyError: As `find`.
        """
        ...


class EngineClient(Protocol):
    """A way to an engine. Used from one event loop."""

    @property
    def responses(self) -> ResponseStore:
        """The responses that engines keep."""
        ...

    async def engine_info(self) -> EngineInfo:
        """Say at once how the engine is; never raises for an engine that is not ready."""
        ...

    async def engines(self) -> Sequence[EngineInfo]:
        """Say at once how each engine is that can be asked."""
        ...

    async def fleet(self) -> Fleet:
        """Say at once how each engine is, and what happened to them lately."""
        ...

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        """Hold the caller until an engine can take requests (at once, if one can already).

        Raises:
            EngineNotReadyError: After `timeout_s`, saying what was waited for.
        """
        ...

    async def profile(self, num_steps: int) -> None:
        """Have one engine's hosts trace their next steps; 0 ends a trace early.

        Raises:
            EngineNotReadyError: No engine is there.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """Generate all choices; yields (index in `request.choices`, delta) as tokens come.

        Ends after every choice that was not aborted had its `finish_reason`. Closing the iterator
        early (`aclose`, or cancelling the task that waits on it) aborts what still runs and frees
        its pages.

        Raises:
            RequestError: The engine can never serve this request.
            EngineNotReadyError: No engine took it.
            EngineDiedError: The engine died meanwhile.
        """
        ...

    async def recall(
        self, request_id: str, *, engine_id: str | None, tenant: bytes
    ) -> StreamRecord:
        """Find what has come of a request that this router or another one has sent.

        If it is still under way somewhere, it ends there in a `StreamResumedError`.

        Args:
            engine_id: Which engine is likely to know, if that is known.
            tenant: Who asks.

        Raises:
            StreamGoneError: Nobody who could be asked knows it, or it is another tenant's.
        """
        ...

    def resume(self, record: StreamRecord) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """Generate what follows on a record's past, as `generate` does."""
        ...

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice early (a stop string was found); the others go on. Never blocks.

        Deltas of that choice that are still under way are dropped by the caller.
        """
        ...
