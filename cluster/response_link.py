"""A router's way to the responses that engines' leaders keep for all routers.

Each is kept by two of them where there are two, and asked for of all: whichever router is asked
finds it, and one leader's end loses none.
"""

import asyncio
import hashlib
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle

from cluster.engine_call import answer_within
from cluster.engine_choice import Route
from cluster.response_shelf import (
    FindCall,
    ForgetCall,
    KeptResponse,
    RenewCall,
    ShelfCall,
    ShelfReply,
    StoreCall,
)
from engine.errors import EngineNotReadyError

SHELF_TIMEOUT_S = 5.0
NUM_COPIES = 2


class ResponseLink:
    """A `ResponseStore` at the engines behind a Serve handle. Belongs to one event loop.

    Args:
        engine: Handle of the `Engine` deployment.
        list_engines: Ids of the engines that are known to this router.
        list_running: Those that Serve would call, which are asked, or None if that is not known.
        may_store: Whether engines keep any.
    """

    def __init__(
        self,
        engine: DeploymentHandle,
        *,
        list_engines: Callable[[], Collection[str]],
        list_running: Callable[[], Collection[str] | None],
        may_store: bool,
    ) -> None:
        self._engine: Any = engine
        self._list_engines = list_engines
        self._list_running = list_running
        self._may_store = may_store

    async def store(
        self, response_id: str, tenant: bytes, content: bytes, *, is_ended: bool
    ) -> bool:
        if not self._may_store:
            return False

        keepers = self._keepers(response_id)
        replies = await self._ask(keepers, StoreCall(response_id, tenant, content, is_ended))
        return any(reply.is_done for reply in replies)

    async def renew(self, response_id: str, tenant: bytes) -> bool:
        # An engine that is no keeper any more may have an older word, which is to grow old.
        keepers = self._keepers(response_id)
        replies = await self._ask(keepers, RenewCall(response_id, tenant))
        num_renewed = sum(reply.is_done for reply in replies)
        return 0 < num_renewed == len(keepers)

    async def find(self, response_id: str, tenant: bytes) -> KeptResponse | None:
        asked = self._running()
        replies = await self._ask(asked, FindCall(response_id, tenant))
        found = [reply.found for reply in replies if reply.found is not None]
        if found:
            # Leaders come and go, so one may have what it was given long ago.
            return max(found, key=lambda kept: (kept.is_ended, -kept.age_s))
        self._check_all(asked, replies)
        return None

    async def forget(self, response_id: str, tenant: bytes) -> bool:
        asked = self._running()
        replies = await self._ask(asked, ForgetCall(response_id, tenant))
        self._check_all(asked, replies)
        return any(reply.is_done for reply in replies)

    def _keepers(self, response_id: str) -> list[str]:
        def rank(engine_id: str) -> bytes:
            return hashlib.sha256(f"{response_id}/{engine_id}".encode()).digest()

        return sorted(self._running(), key=rank)[:NUM_COPIES]

    def _running(self) -> list[str]:
        running = self._list_running()
        return sorted(self._list_engines() if running is None else running)

    async def _ask(self, engine_ids: Collection[str], call: ShelfCall) -> list[ShelfReply]:
        """What these engines reply; those that do not answer are left out."""
        payload = msgspec.msgpack.encode(call)

        async def ask(engine_id: str) -> list[ShelfReply]:
            response = self._engine.shelve.remote(payload, route=Route((engine_id,)))
            answer = await answer_within(SHELF_TIMEOUT_S, response)
            return [] if answer is None else [msgspec.msgpack.decode(answer, type=ShelfReply)]

        replies = await asyncio.gather(*map(ask, engine_ids))
        return [reply for some in replies for reply in some]

    def _check_all(self, asked: Collection[str], replies: Collection[ShelfReply]) -> None:
        """Raise EngineNotReadyError if one that was asked has not answered."""
        silent = set(asked) - {reply.engine_id for reply in replies}
        if silent:
            raise EngineNotReadyError(
                f"{len(silent)} of {len(asked)} engines, which may keep the response, did not "
                "answer. Try again."
            )
