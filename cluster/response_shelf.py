"""Where an engine's leader keeps responses that clients may ask for again: a bounded memory.

Responses are bytes here; who may have them is all that is known. Nothing is written to a disk.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

KEEP_S = 24 * 3600.0
"""How long a response outlives its last use."""

MAX_SHELF_BYTES = 256 * 1024 * 1024
"""All responses that one leader keeps, and a tenth of it for a single one."""


class StoreCall(msgspec.Struct, frozen=True, tag=True):
    """Keep a response."""

    response_id: str
    tenant: bytes
    content: bytes
    is_ended: bool


class RenewCall(msgspec.Struct, frozen=True, tag=True):
    """A response is still under way."""

    response_id: str
    tenant: bytes


class FindCall(msgspec.Struct, frozen=True, tag=True):
    """Give a response."""

    response_id: str
    tenant: bytes


class ForgetCall(msgspec.Struct, frozen=True, tag=True):
    """Keep a response no longer."""

    response_id: str
    tenant: bytes


ShelfCall = StoreCall | RenewCall | FindCall | ForgetCall


class KeptResponse(msgspec.Struct, frozen=True):
    """A response as it was last stored.

    Attributes:
        is_ended: Or it was under way then.
        age_s: Seconds since then, or since it was last said to be under way.
    """

    content: bytes
    is_ended: bool
    age_s: float


class ShelfReply(msgspec.Struct, frozen=True):
    """What has become of a call.

    Attributes:
        engine_id: Whose shelf it is: Serve may have called another engine than was meant.
        is_done: It was stored, renewed, found or forgotten.
        found: What was found.
    """

    engine_id: str
    is_done: bool
    found: KeptResponse | None = None


@dataclass(slots=True)
class _Entry:
    content: bytes
    is_ended: bool
    stored_s: float
    used_s: float


@dataclass(slots=True)
class _Tenant:
    """The responses of one tenant, those used last at the end."""

    num_bytes: int = 0
    entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)


class ResponseShelf:
    """Responses by tenant and id. Belongs to one event loop.

    Where it is full, the tenant that has most of it loses what it used longest ago: nobody can
    drive out the responses of those who keep few.

    Invariant: `num_responses` and `num_bytes` are the sums over all tenants.

    Args:
        max_responses: 0 keeps none.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        max_responses: int,
        *,
        max_bytes: int = MAX_SHELF_BYTES,
        keep_s: float = KEEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._tenants: dict[bytes, _Tenant] = {}
        self.num_responses = 0
        self.num_bytes = 0

    def answer(self, payload: bytes, engine_id: str) -> bytes:
        """Do what an encoded `ShelfCall` says; gives an encoded `ShelfReply`."""
        call = msgspec.msgpack.decode(payload, type=ShelfCall)
        if isinstance(call, StoreCall):
            is_stored = self.store(
                call.response_id, call.tenant, call.content, is_ended=call.is_ended
            )
            reply = ShelfReply(engine_id, is_stored)
        elif isinstance(call, RenewCall):
            reply = ShelfReply(engine_id, self.renew(call.response_id, call.tenant))
        elif isinstance(call, FindCall):
            found = self.find(call.response_id, call.tenant)
            reply = ShelfReply(engine_id, found is not None, found)
        else:
            reply = ShelfReply(engine_id, self.forget(call.response_id, call.tenant))
        return msgspec.msgpack.encode(reply)

    def store(self, response_id: str, tenant: bytes, content: bytes, *, is_ended: bool) -> bool:
        """Keep a response in the place of what was kept of it before; False if it is too large.

        One that has ended stays in the place of one that is under way.
        """
        self._forget_old()
        before = self._tenants[tenant].entries.get(response_id) if tenant in self._tenants else None
        if before is not None and before.is_ended and not is_ended:
            return True
        self.forget(response_id, tenant)
        if self._max_responses == 0 or len(content) > self._max_bytes // 10:
            return False
        owner = self._tenants.setdefault(tenant, _Tenant())
        now_s = self._clock()
        owner.entries[response_id] = _Entry(content, is_ended, stored_s=now_s, used_s=now_s)
        self._count(owner, 1, len(content))
        while self.num_responses > self._max_responses or self.num_bytes > self._max_bytes:
            most = max(self._tenants, key=lambda name: self._share(self._tenants[name]))
            self.forget(next(iter(self._tenants[most].entries)), most)
        return response_id in owner.entries

    def renew(self, response_id: str, tenant: bytes) -> bool:
        """Remember when a tenant's response was under way; False if it is not here."""
        entry = self._use(response_id, tenant)
        if entry is None:
            return False
        entry.stored_s = entry.used_s
        return True

    def find(self, response_id: str, tenant: bytes) -> KeptResponse | None:
        """A tenant's response, which is used by it; None if it is not here."""
        entry = self._use(response_id, tenant)
        if entry is None:
            return None
        return KeptResponse(entry.content, entry.is_ended, entry.used_s - entry.stored_s)

    def forget(self, response_id: str, tenant: bytes) -> bool:
        """Keep a tenant's response no longer; False if it was not here."""
        owner = self._tenants.get(tenant)
        if owner is None or response_id not in owner.entries:
            return False
        entry = owner.entries.pop(response_id)
        self._count(owner, -1, -len(entry.content))
        if not owner.entries:
            del self._tenants[tenant]
        return True

    def _use(self, response_id: str, tenant: bytes) -> _Entry | None:
        self._forget_old()
        owner = self._tenants.get(tenant)
        if owner is None or response_id not in owner.entries:
            return None
        owner.entries.move_to_end(response_id)
        entry = owner.entries[response_id]
        entry.used_s = self._clock()
        return entry

    def _share(self, owner: _Tenant) -> float:
        return max(
            owner.num_bytes / self._max_bytes, len(owner.entries) / max(1, self._max_responses)
        )

    def _count(self, owner: _Tenant, num_responses: int, num_bytes: int) -> None:
        owner.num_bytes += num_bytes
        self.num_responses += num_responses
        self.num_bytes += num_bytes

    def _forget_old(self) -> None:
        oldest_s = self._clock() - self._keep_s
        for tenant, owner in list(self._tenants.items()):
            while owner.entries:
                response_id, entry = next(iter(owner.entries.items()))
                if entry.used_s >= oldest_s:
                    break
                self.forget(response_id, tenant)
