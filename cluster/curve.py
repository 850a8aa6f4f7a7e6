"""CURVE for ZMQ sockets: who may connect is who holds a key that was handed out through Ray."""

from typing import NamedTuple

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator


class CurveKeys(NamedTuple):
    """A key pair, each half as Z85 text in bytes."""

    public: bytes
    secret: bytes

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())


def admit_only(context: zmq.asyncio.Context, client_public_key: bytes) -> AsyncioAuthenticator:
    """Let the context's server sockets accept one client key and no other.

    ZMQ asks one authenticator per context, so the context must serve nothing else. The caller
    stops the authenticator.
    """
    authenticator = AsyncioAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(credentials_provider=_OnlyKey(client_public_key))
    return authenticator


class _OnlyKey:
    """Lets in whoever holds the secret key that belongs to one public key."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        return key == self._public_key
