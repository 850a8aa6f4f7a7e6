"""Who comes in: whose key it is, how much that may ask for, and whether there is room to wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.admission import Admission, Ticket
from cluster.api_keys import ApiKeys, KeyUse, KeyUses
from cluster.openai.engine_client import Caller
from cluster.openai.sampling import num_samples
from cluster.openai.schema import ChatCompletionRequest, CompletionRequest
from engine.config import EngineConfig
from engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that was let in.

    Attributes:
        arrival_s: By the monotonic clock.
    """

    ticket: Ticket
    key_use: KeyUse
    arrival_s: float


class Entrance:
    """Lets requests in by the limits of a configuration. Belongs to one event loop.

    Raises:
        ConfigError: The file of keys cannot be read.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._keys = ApiKeys.of(config.api_key_file)
        self._key_uses = KeyUses(self._keys)
        self._admission = Admission(config.max_queued_requests, config.max_queued_tokens)

    @property
    def num_waiting(self) -> int:
        """Choices that are in and have no token so far."""
        return self._admission.num_waiting

    def change(self, config: EngineConfig, keys: ApiKeys) -> None:
        """Go by other limits and keys from the next request on; those that run are left alone."""
        self._keys = keys
        self._key_uses.change(keys)
        self._admission.limit(config.max_queued_requests, config.max_queued_tokens)

    def check_key(self, authorization: str | None, *, is_admin_needed: bool) -> bytes:
        """Check a request's Authorization header, and say whose it is; see `ApiKeys.check`."""
        return self._keys.check(authorization, is_admin_needed=is_admin_needed)

    def check_room(self) -> None:
        """Raise EngineBusyError if a request would be refused whatever it asks for."""
        self._admission.check()

    @contextmanager
    def enter(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        num_prompts: int,
        caller: Caller,
        *,
        param: str = "prompt",
    ) -> Iterator[Entry]:
        """Count a request of a key in the waiting room while it is under way.

        Args:
            body: The request.
            num_prompts: Each has as many choices as the request says.
            caller: Who sends it.
            param: Where it has its prompts.

        Raises:
            RequestError, EngineBusyError: It may not, or not yet.
        """
        with (
            self._key_uses.enter(caller.tenant) as key_use,
            self._admit(body, num_prompts, param) as ticket,
        ):
            yield Entry(ticket, key_use, time.monotonic())

    @contextmanager
    def enter_briefly(self, caller: Caller) -> Iterator[None]:
        """Count what asks no engine as one request of a key.

        Raises:
            RequestError, EngineBusyError: As `enter`.
        """
        with self._key_uses.enter(caller.tenant), self._admission.admit(1):
            yield

    def _admit(
        self, body: ChatCompletionRequest | CompletionRequest, num_prompts: int, param: str
    ) -> Ticket:
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        num_choices = num_prompts * num_samples(body)
        if num_choices > self._admission.max_waiting:
            raise RequestError(
                f"The request asks for {num_choices} choices; at most "
                f"{self._admission.max_waiting} may wait here. Send fewer prompts at a time.",
                param="n" if num_prompts == 1 else param,
            )
        return self._admission.admit(num_choices)
