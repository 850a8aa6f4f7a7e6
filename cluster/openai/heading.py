"""What every object of one answer begins with."""

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Identity of one answer.

    Attributes:
        id: As OpenAI writes them (chatcmpl-…, cmpl-…, resp_…), unique among all routers.
        created: Unix time in seconds.
        model: The name that the client used.
        system_fingerprint: Changes when weights, dtype or sharding do.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None


def make_request_id(kind: Literal["chatcmpl-", "cmpl-", "embd-", "resp_"]) -> str:
    """Make an id that no other request of any router has."""
    return f"{kind}{uuid.uuid4().hex}"


def make_heading(request_id: str, model: str, fingerprint: str) -> Heading:
    """Open an answer; `fingerprint` is the engine's, of any length, or empty."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:10]
    return Heading(
        id=request_id,
        created=int(time.time()),
        model=model,
        system_fingerprint=f"fp_{digest}" if fingerprint else None,
    )
