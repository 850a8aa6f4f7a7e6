"""The wire between engines and routers: tokens up, aborts down, a beat both ways.

A router binds one socket; each call that it makes to an engine carries an invitation to it. The
engine's leader connects once per router and sends one message per step, with the new tokens of all
that router's requests in it. Knows token ids, and neither text nor plans.

    leader → router:  [TOKENS, ChoiceTokens...] or [BEAT]
    router → leader:  [ABORT, AbortChoice]      or [BEAT]
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

import msgspec
import zmq.asyncio

from cluster.curve import CurveKeys, CurveServer, connect, send_at_once
from cluster.lived_time import LivedTime
from cluster.watched_tasks import WatchedTasks
from engine.errors import EngineDiedError
from engine.request import FinishReason, RequestTiming, TokenLogprobs

logger = logging.getLogger(__name__)

BEAT_PERIOD_S = 0.5
# uvloop accepts one new connection in each of its turns, and a turn must not be as long as a step's
# tokens take: with 1,000 streams it took in 66 connections a second. Turns that are too short let
# in more than there is time for, at the streams' expense.
CHOICES_PER_TURN = 32
MAX_CHOICES_TAKEN_IN = 1024
"""That many choices' tokens are taken in, some 3 ms, before streams have their turn."""
# A message takes as many: the socket's event, the end of the wait for it, whoever waited.
_QUIET_TURNS = 4
_TOKENS, _BEAT, _ABORT = b"tokens", b"beat", b"abort"


class RouterInvitation(msgspec.Struct, frozen=True, array_like=True):
    """What a leader needs to send tokens to a router; secret, so handed out through Ray."""

    address: str
    router_public_key: bytes
    leader_public_key: bytes
    leader_secret_key: bytes


class CallError(msgspec.Struct, frozen=True, array_like=True):
    """Why an engine did not do what was asked; `kind` is a class name of engine.errors."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None


class GenerateEnd(msgspec.Struct, frozen=True, array_like=True):
    """What a call returns when its request has ended.

    Attributes:
        num_tokens: Tokens sent, by index of the choice.
        was_computed: The hosts were at work on it when they died: it may be what killed them.
    """

    num_tokens: dict[int, int] = {}
    error: CallError | None = None
    was_computed: bool = False


class ChoiceTokens(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one choice.

    Attributes:
        epoch: Of the hosts that computed it.
        timing: With the attempt's first token and with the choice's last.
        embedding: The prompt's, as in `RequestOutput`.
    """

    request_id: str
    attempt: int
    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    epoch: int = 0
    timing: RequestTiming | None = None
    embedding: bytes = b""


class AbortChoice(msgspec.Struct, frozen=True, array_like=True):
    """End one choice; its tokens are no longer wanted."""

    request_id: str
    attempt: int
    choice: int


_tokens_decoder = msgspec.msgpack.Decoder(list[ChoiceTokens])
_abort_decoder = msgspec.msgpack.Decoder(AbortChoice)


class TokenStream:
    """The router's end of one call: the choices' tokens in order, each index once.

    What comes while nobody waits is handed out together, so a slow client costs fewer events.

    Args:
        num_tokens: Tokens that earlier attempts received, per choice.
        now_s: When it begins, by the receiver's clock.

    Attributes:
        num_tokens: Tokens received so far, per choice.
        heard_s: When the engine was heard last, by the receiver's clock.
        leader: Id of the engine that took the call, once it has said so.
    """

    def __init__(self, num_tokens: Sequence[int], now_s: float = 0.0) -> None:
        self.num_tokens = list(num_tokens)
        self._num_before = tuple(num_tokens)
        self.heard_s = now_s
        self.leader: bytes | None = None
        self._received: list[ChoiceTokens] = []
        self._has_gap = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, tokens: ChoiceTokens) -> bool:
        """Take in tokens; what was received before is dropped.

        Returns:
            Whether there is something for who waits, whom `wake` tells.
        """
        known = self.num_tokens[tokens.choice] - tokens.first_index
        if known < 0:
            self._has_gap = True
            return True
        if known > 0:
            tokens = msgspec.structs.replace(
                tokens,
                first_index=tokens.first_index + known,
                token_ids=tokens.token_ids[known:],
                logprobs=tokens.logprobs[known:],
            )
        if not tokens.token_ids and tokens.finish_reason is None:
            return False  # Only says that the engine took the call.
        self.num_tokens[tokens.choice] += len(tokens.token_ids)
        self._received.append(tokens)
        return True

    def lacks(self, num_sent: Mapping[int, int]) -> bool:
        """Whether some of so many tokens, by choice, that were sent here have not come yet."""
        return any(
            self.num_tokens[choice] - self._num_before[choice] < count
            for choice, count in num_sent.items()
        )

    def take(self) -> list[ChoiceTokens]:
        """Hand out what has come, each choice's tokens joined; empty if nothing has.

        Raises:
            EngineDiedError: Tokens on their way were lost when a connection broke.
        """
        if self._has_gap:
            raise EngineDiedError("Tokens of the engine were lost with a connection that broke.")
        received = self._received
        if len(received) > 1:
            by_choice: dict[int, list[ChoiceTokens]] = {}
            for tokens in received:
                by_choice.setdefault(tokens.choice, []).append(tokens)
            received = [_join(parts) for parts in by_choice.values()]
        self._received = []
        return received

    async def wait(self) -> None:
        """Wait until tokens have come or `wake` is called; only one task may."""
        if not self._received and not self._has_gap:
            # One bare future: a task and a timeout for each token would cost more than the token.
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def wake(self) -> None:
        """End the wait under way, so that the task that waits looks around."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _join(parts: Sequence[ChoiceTokens]) -> ChoiceTokens:
    """Make one of what several steps gave a choice."""
    if len(parts) == 1:
        return parts[0]
    return msgspec.structs.replace(
        parts[-1],
        first_index=parts[0].first_index,
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
        prompt_logprobs=parts[0].prompt_logprobs,
        timing=parts[-1].timing or parts[0].timing,
        embedding=parts[0].embedding,
    )


class TokenReceiver:
    """A router's socket: hands the tokens that arrive to the streams that wait for them.

    Belongs to the event loop that it is opened in.

    Attributes:
        clock: By which silence is measured.
    """

    def __init__(self, bind_host: str) -> None:
        """Bind to a free port of one of this host's own addresses."""
        self.clock = LivedTime()
        self._streams: dict[tuple[str, int], TokenStream] = {}
        # Streams that have something for those who wait, the longest first.
        self._ready: dict[TokenStream, None] = {}
        self._num_handed_out = 0
        self._server = CurveServer(bind_host)
        self.invitation = RouterInvitation(
            self._server.address, self._server.public_key, *self._server.client_keys
        )
        self._tasks = WatchedTasks()
        self._tasks.start("measure the time", self.clock.tick())
        self._tasks.start("receive tokens", self._receive())
        self._tasks.start("beat to the engines", self._beat())

    def check(self) -> None:
        """Return if tokens are being received.

        Raises:
            EngineError: They are not, and never will be again.
        """
        self._tasks.check()

    def open_stream(self, request_id: str, attempt: int, num_tokens: Sequence[int]) -> TokenStream:
        """Expect tokens of a call that is about to be made; of those before it, so many came."""
        stream = TokenStream(num_tokens, self.clock())
        self._streams[request_id, attempt] = stream
        return stream

    def close_stream(self, request_id: str, attempt: int) -> None:
        """Drop what still arrives for a call."""
        self._streams.pop((request_id, attempt), None)

    def wake_silent_streams(self, silence_s: float) -> None:
        """Wake whoever waits for an engine that was not heard for so long."""
        now_s = self.clock()
        for stream in self._streams.values():
            if now_s - stream.heard_s > silence_s:
                stream.wake()

    def wake_streams(self, request_id: str) -> None:
        """Wake whoever waits for a request's tokens."""
        for (name, _), stream in self._streams.items():
            if name == request_id:
                stream.wake()

    def abort_choice(self, request_id: str, attempt: int, choice: int) -> None:
        """Tell the engine that a choice is no longer wanted; never blocks."""
        stream = self._streams.get((request_id, attempt))
        if stream is not None and stream.leader is not None:
            payload = msgspec.msgpack.encode(AbortChoice(request_id, attempt, choice))
            self._server.send(stream.leader, _ABORT, payload)

    async def catch_up(self) -> None:
        """Hand out what has arrived and was not read, because the loop had other things to do."""
        num_quiet_turns = 0
        while num_quiet_turns < _QUIET_TURNS:
            num_handed_out = self._num_handed_out
            await asyncio.sleep(0)
            is_quiet = self._num_handed_out == num_handed_out
            num_quiet_turns = num_quiet_turns + 1 if is_quiet else 0

    async def close(self) -> None:
        await self._tasks.close()
        self._server.close()

    async def _receive(self) -> None:
        while True:
            self._take_in(await self._server.receive())
            # Some of the streams send on what they have, others come in; then what has come
            # meanwhile is taken in, before the next ones have their turn. So where more comes than
            # there is time for, each stream's turn brings more tokens at once, and costs no more.
            while self._ready:
                self._wake_next()
                await asyncio.sleep(0)
                self._take_in_what_lies_there()

    def _take_in(self, message: Sequence[bytes]) -> int:
        """Give a message's tokens to their streams; returns how many choices' they were."""
        leader, kind, *payload = message
        now_s = self.clock()
        if kind == _BEAT:
            for stream in self._streams.values():
                if stream.leader == leader:
                    stream.heard_s = now_s
            return 0
        batch = _tokens_decoder.decode(payload[0])
        for tokens in batch:
            stream = self._streams.get((tokens.request_id, tokens.attempt))
            if stream is not None:
                stream.leader = leader
                stream.heard_s = now_s
                if stream.put(tokens):
                    self._ready[stream] = None
        self._num_handed_out += len(batch)
        return len(batch)

    def _take_in_what_lies_there(self) -> None:
        num_choices = 0
        while num_choices < MAX_CHOICES_TAKEN_IN:
            message = self._server.receive_at_once()
            if message is None:
                return
            num_choices += self._take_in(message) or 1

    def _wake_next(self) -> None:
        for stream in list(islice(self._ready, CHOICES_PER_TURN)):
            del self._ready[stream]
            stream.wake()
            self._num_handed_out += 1

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_PERIOD_S)
            for leader in {stream.leader for stream in self._streams.values()}:
                if leader is not None:
                    self._server.send(leader, _BEAT)


class TokenSender:
    """A leader's connection to one router. Belongs to one event loop.

    Args:
        invitation: The router's.
        on_abort: Called for each choice that the router no longer wants.
        engine_id: Tells this leader from others, also after its connection broke.
        clock: By which silence is measured.

    Attributes:
        heard_s: When the router was heard last, or was first expected to be, by that clock.
    """

    def __init__(
        self,
        invitation: RouterInvitation,
        on_abort: Callable[[AbortChoice], None],
        *,
        engine_id: str,
        clock: Callable[[], float],
    ) -> None:
        """Connect."""
        self._clock = clock
        self.heard_s = clock()
        self._on_abort = on_abort
        self._context = zmq.asyncio.Context()
        self._socket = connect(
            self._context,
            invitation.address,
            server_public_key=invitation.router_public_key,
            keys=CurveKeys(invitation.leader_public_key, invitation.leader_secret_key),
            identity=engine_id.encode(),
            linger_ms=1000,
        )
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._beat())]

    def send(self, tokens: Sequence[ChoiceTokens]) -> bool:
        """Send one step's tokens; False if the router does not drain its connection."""
        return self._send(_TOKENS, msgspec.msgpack.encode(tokens))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._context.destroy(linger=0)

    def _send(self, *frames: bytes) -> bool:
        return send_at_once(self._socket, frames) is None

    async def _receive(self) -> None:
        while True:
            kind, *payload = await self._socket.recv_multipart()
            self.heard_s = self._clock()
            if kind == _ABORT:
                self._on_abort(_abort_decoder.decode(payload[0]))

    async def _beat(self) -> None:
        while True:
            self._send(_BEAT)
            await asyncio.sleep(BEAT_PERIOD_S)
