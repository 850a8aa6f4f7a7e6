"""The calls that an engine's leader has under way, and the routers that wait for their tokens.

Knows which request of the engine belongs to which choice of which call; neither what is computed
for it nor how hosts live and die.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection

from cluster.journal import GenerateCall, Journal, Journals
from cluster.lived_time import LivedTime
from cluster.openai.engine_client import StreamRecord
from cluster.token_socket import AbortChoice, ChoiceTokens, RouterInvitation, TokenSender
from engine.errors import EngineDiedError, QwenOnRayError, StreamResumedError
from engine.request import RequestOutput

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 1.0


class Call:
    """A router's call: which requests it is, and how many tokens of each were sent.

    Attributes:
        journal: What the router had, and all that was sent.
        request_ids: The engine's, by the choice's index.
        num_tokens: Sent so far, by the choice's index.
        ended: Done when every choice has ended; fails with what ended the call early.
        unfinished: Indices of the choices that have not ended.
        was_computed: The hosts were at work on it when they died.
    """

    def __init__(self, call: GenerateCall, sender: TokenSender) -> None:
        self.journal = Journal(call.record)
        self.request_id = call.record.request.request_id
        self.attempt = call.record.attempt
        self.sender = sender
        self.request_ids = {
            index: _request_id(self.request_id, self.attempt, index)
            for index in sorted(self.journal.unfinished)
        }
        self.num_tokens = dict.fromkeys(self.request_ids, 0)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.was_computed = False
        self.unfinished = set(self.request_ids)

    def finish(self, choice: int) -> None:
        self.unfinished.discard(choice)
        if not self.unfinished and not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: QwenOnRayError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class CallTable:
    """All calls under way. Belongs to one event loop.

    Invariant: a request id is in `_choices` from `open` to `close` of its call.

    Attributes:
        epoch: Of the hosts that compute for them, as the owner has set it.
    """

    def __init__(
        self, *, engine_id: str, on_abort: Callable[[str], None], silence_timeout_s: float
    ) -> None:
        """Make an empty table.

        Args:
            engine_id: Of this engine, for the routers.
            on_abort: Called with the id of a request that its router no longer wants.
            silence_timeout_s: After so long without a sign of life, a router's calls fail.
        """
        self.epoch = 0
        self._clock = LivedTime()
        self._engine_id = engine_id
        self._on_abort = on_abort
        self._silence_timeout_s = silence_timeout_s
        self._choices: dict[str, tuple[Call, int]] = {}
        self._journals = Journals()
        self._senders: dict[bytes, TokenSender] = {}

    @property
    def num_calls(self) -> int:
        return len({id(call) for call, _ in self._choices.values()})

    def open(self, call: GenerateCall) -> Call:
        """Enter a call, and tell its router that it has arrived here."""
        opened = Call(call, self._sender(call.reply_to))
        for choice, request_id in opened.request_ids.items():
            self._choices[request_id] = (opened, choice)
        self._journals.open(opened.journal)
        # Empty: it says from where tokens will come.
        opened.sender.send([ChoiceTokens(opened.request_id, opened.attempt, 0, 0, ())])
        return opened

    def close(self, call: Call) -> None:
        """Forget a call; what the engine still computes for it is dropped."""
        for request_id in call.request_ids.values():
            self._choices.pop(request_id, None)
        self._journals.end(call.journal)

    def recall(self, request_id: str, tenant: bytes) -> StreamRecord | None:
        """What has come of a tenant's request; for another router, so its call here ends."""
        journal = self._journals.find(request_id, tenant)
        if journal is None:
            return None
        for call, _ in list(self._choices.values()):
            if call.journal is journal:
                call.fail(StreamResumedError("The client goes on with this request elsewhere."))
        return journal.record()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Send one step's tokens: one message to each router, with all its requests in it."""
        batches: dict[TokenSender, list[ChoiceTokens]] = defaultdict(list)
        ended: list[tuple[Call, int]] = []
        for output in outputs:
            entry = self._choices.get(output.request_id)
            if entry is None:
                continue
            call, choice = entry
            call.num_tokens[choice] += len(output.token_ids)
            tokens = _tokens(call, choice, output, self.epoch)
            call.journal.take(tokens)
            batches[call.sender].append(tokens)
            if output.finish_reason is not None:
                ended.append(entry)
        for sender, tokens in batches.items():
            if not sender.send(tokens):
                self._fail_router(sender, "does not drain its connection")
        for call, choice in ended:
            call.finish(choice)

    def fail_all(self, error: QwenOnRayError, computed: Collection[str]) -> None:
        """Fail every call that was under way with the same error.

        Args:
            error: What the routers are told.
            computed: Ids of the requests that the hosts were at work on.
        """
        for request_id, (call, _) in list(self._choices.items()):
            call.was_computed |= request_id in computed
            call.fail(error)

    async def watch_routers(self) -> None:
        """Fail the calls of routers that fall silent, and forget idle routers; runs for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._clock.tick())
            while True:
                await asyncio.sleep(_WATCH_PERIOD_S)
                self._end_silent()

    def disconnect(self) -> None:
        """Close the connections to all routers."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def _end_silent(self) -> None:
        now_s = self._clock()
        busy = {call.sender for call, _ in self._choices.values()}
        for key, sender in list(self._senders.items()):
            silence_s = now_s - sender.heard_s
            if silence_s <= self._silence_timeout_s:
                continue
            if sender in busy:
                self._fail_router(sender, f"was silent for {silence_s:.1f} s")
            else:
                sender.close()
                del self._senders[key]

    def _abort_choice(self, abort: AbortChoice) -> None:
        request_id = _request_id(abort.request_id, abort.attempt, abort.choice)
        entry = self._choices.get(request_id)
        if entry is not None:
            call, choice = entry
            call.journal.close(choice)
            self._on_abort(request_id)
            call.finish(choice)

    def _sender(self, invitation: RouterInvitation) -> TokenSender:
        sender = self._senders.get(invitation.router_public_key)
        if sender is None:
            sender = TokenSender(
                invitation, self._abort_choice, engine_id=self._engine_id, clock=self._clock
            )
            self._senders[invitation.router_public_key] = sender
        if not any(call.sender is sender for call, _ in self._choices.values()):
            # A router beats only while it waits for tokens: silence counts from here on.
            sender.heard_s = self._clock()
        return sender

    def _fail_router(self, sender: TokenSender, reason: str) -> None:
        logger.warning("A router %s: its calls fail.", reason)
        for call, _ in list(self._choices.values()):
            if call.sender is sender:
                call.fail(EngineDiedError(f"The router {reason}."))


def _request_id(request_id: str, attempt: int, choice: int) -> str:
    return f"{request_id}/{attempt}/{choice}"


def _tokens(call: Call, choice: int, output: RequestOutput, epoch: int) -> ChoiceTokens:
    return ChoiceTokens(
        call.request_id,
        call.attempt,
        choice,
        output.first_index,
        output.token_ids,
        output.finish_reason,
        output.stop_token_id,
        output.num_cached_tokens,
        output.logprobs,
        output.prompt_logprobs,
        epoch,
        output.timing,
        output.embedding,
    )
