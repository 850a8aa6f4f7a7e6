"""Which engine a request goes to: the one that would begin with it soonest.

Decided in the router, by what the engines tell and what the router has sent them; the order travels
with the call as a `Route`. Knows token ids and counts, neither text nor Ray.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec

from cluster.openai.engine_client import EngineInfo

PREFIX_BLOCK = 64
"""Tokens by which prompts are compared."""

SEQUENCE_COST = 128
"""Prompt tokens that delay a request as much as one more sequence in its engine does."""

_MAX_BLOCKS = 200_000
_MAX_SESSIONS = 20_000


class Route(msgspec.Struct, frozen=True):
    """Where a call is to go; travels beside its payload.

    Attributes:
        order: Ids of engines, the best first; if none of them has room, any other will do.
    """

    order: tuple[str, ...] = ()


@dataclass(slots=True)
class _Engine:
    """What a router knows of an engine.

    Attributes:
        own: Sequences that this router has there.
        others: Sequences that other routers had there when it last told.
        waiting_tokens: Prompt tokens of own sequences that have not begun.
        epoch: Of its hosts: what was cached before it is gone.
    """

    epoch: int
    is_ready: bool = True
    own: int = 0
    others: int = 0
    waiting_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """A request as it counts here.

    Attributes:
        prompt_lens: Tokens of its prompts, equal ones counted once.
        block_keys: Per prompt, a key for each full `PREFIX_BLOCK`s that it begins with.
        num_sequences: To be generated.
        session: Requests of one session go to one engine while that is ready.
    """

    prompt_lens: tuple[int, ...]
    block_keys: tuple[tuple[int, ...], ...]
    num_sequences: int
    session: str | None

    @classmethod
    def of(
        cls, prompts: Sequence[tuple[int, ...]], *, salt: bytes = b"", session: str | None = None
    ) -> "Demand":
        """Count a request with these prompts, one per sequence, and this salt of cached pages."""
        distinct = tuple(dict.fromkeys(prompts))
        return cls(
            prompt_lens=tuple(map(len, distinct)),
            block_keys=tuple(_block_keys(prompt, salt) for prompt in distinct),
            num_sequences=len(prompts),
            session=session,
        )


@dataclass(slots=True)
class Visit:
    """A request's part in an engine's load, from its call to its end.

    Attributes:
        engine_id: Where it is; corrected when another engine takes the call.
        waiting_tokens: Prompt tokens, while it has not begun.
    """

    demand: Demand
    engine_id: str
    waiting_tokens: int


class EngineChooser:
    """Puts engines in order for a request. Belongs to one event loop.

    The cost of an engine is counted in tokens to be computed before the request's first one: those
    of its prompts that no earlier prompt there began with, those that wait there, and
    `SEQUENCE_COST` for each sequence that takes part in every step.
    """

    def __init__(self) -> None:
        self._engines: dict[str, _Engine] = {}
        # Key of a prompt's first blocks → engines that have computed them, and in which epoch.
        self._holders: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._sessions: OrderedDict[str, str] = OrderedDict()

    @property
    def ready(self) -> list[str]:
        """Ids of the engines that can take requests."""
        return [name for name, engine in self._engines.items() if engine.is_ready]

    def update(self, engine_id: str, info: EngineInfo) -> None:
        """Take in what an engine tells of itself."""
        engine = self._engines.setdefault(engine_id, _Engine(epoch=info.epoch))
        engine.epoch, engine.is_ready = info.epoch, info.is_ready
        engine.others = max(0, info.stats.num_running + info.stats.num_waiting - engine.own)

    def suspend(self, engine_id: str) -> None:
        """An engine has failed a request: ask no more of it before it tells that it is ready."""
        if engine_id in self._engines:
            self._engines[engine_id].is_ready = False

    def forget(self, engine_id: str) -> None:
        """An engine is gone."""
        self._engines.pop(engine_id, None)

    def order(self, demand: Demand, avoided: Collection[str] = ()) -> list[str]:
        """Engines for a request, the best first; those that are avoided or not ready come last.

        Args:
            demand: The request.
            avoided: Engines that have failed it.
        """
        home = self._sessions.get(demand.session) if demand.session is not None else None

        def rank(engine_id: str) -> tuple[bool, bool, int]:
            is_last_resort = engine_id in avoided or not self._engines[engine_id].is_ready
            return is_last_resort, engine_id != home, self.cost(engine_id, demand)

        return sorted(self._engines, key=rank)

    def cost(self, engine_id: str, demand: Demand) -> int:
        """What stands between a request and its first token at an engine, in tokens."""
        engine = self._engines[engine_id]
        cost = engine.waiting_tokens + SEQUENCE_COST * (engine.own + engine.others)
        for length, keys in zip(demand.prompt_lens, demand.block_keys, strict=True):
            cost += length - self._num_cached(engine_id, engine.epoch, keys)
        return cost

    def enter(self, engine_id: str, demand: Demand) -> Visit:
        """Count a request as its engine's, and remember what it will have cached."""
        visit = Visit(demand, engine_id, sum(demand.prompt_lens))
        self._count(visit, 1)
        self._remember(visit)
        return visit

    def moved(self, visit: Visit, engine_id: str) -> None:
        """Another engine than was thought has taken the request."""
        if engine_id != visit.engine_id:
            self._count(visit, -1)
            for key in chain.from_iterable(visit.demand.block_keys):
                self._holders.get(key, {}).pop(visit.engine_id, None)
            visit.engine_id = engine_id
            self._count(visit, 1)
            self._remember(visit)

    def began(self, visit: Visit) -> None:
        """The request's first token is there."""
        engine = self._engines.get(visit.engine_id)
        if engine is not None:
            engine.waiting_tokens = max(0, engine.waiting_tokens - visit.waiting_tokens)
        visit.waiting_tokens = 0

    def leave(self, visit: Visit) -> None:
        """The request has ended there, in whichever way."""
        self._count(visit, -1)

    def _count(self, visit: Visit, sign: int) -> None:
        engine = self._engines.get(visit.engine_id)
        if engine is not None:
            # An engine that came back under its name has never heard of those that left it.
            engine.own = max(0, engine.own + sign * visit.demand.num_sequences)
            engine.waiting_tokens = max(0, engine.waiting_tokens + sign * visit.waiting_tokens)

    def _remember(self, visit: Visit) -> None:
        engine = self._engines.get(visit.engine_id)
        if engine is None:
            return
        for key in chain.from_iterable(visit.demand.block_keys):
            self._holders.setdefault(key, {})[visit.engine_id] = engine.epoch
            self._holders.move_to_end(key)
        while len(self._holders) > _MAX_BLOCKS:
            self._holders.popitem(last=False)
        if visit.demand.session is not None:
            self._sessions[visit.demand.session] = visit.engine_id
            self._sessions.move_to_end(visit.demand.session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _num_cached(self, engine_id: str, epoch: int, keys: Sequence[int]) -> int:
        """Tokens of a prompt that the engine has probably cached."""
        num_blocks = 0
        for key in keys:
            if self._holders.get(key, {}).get(engine_id) != epoch:
                break
            num_blocks += 1
        return num_blocks * PREFIX_BLOCK


def _block_keys(prompt: Sequence[int], salt: bytes) -> tuple[int, ...]:
    keys: list[int] = []
    key = hash(salt)
    for start in range(0, len(prompt) - PREFIX_BLOCK + 1, PREFIX_BLOCK):
        key = hash((key, tuple(prompt[start : start + PREFIX_BLOCK])))
        keys.append(key)
    return tuple(keys)
