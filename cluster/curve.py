"""ZMQ sockets that speak CURVE over TCP: one side binds, the other connects.

Who may connect is who holds a key that was handed out through Ray. Knows no kinds of messages.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from cluster.addresses import bracketed

_Socket = TypeVar("_Socket", bound="zmq.Socket[Any]")


class CurveKeys(NamedTuple):
    """A key pair, each half as Z85 text in bytes."""

    public: bytes
    secret: bytes

    @classmethod
    def generate(cls) -> "CurveKeys":
        return cls(*zmq.curve_keypair())


class CurveServer:
    """A bound ROUTER socket that admits one client key and no other.

    Belongs to the event loop that it is made in.

    Attributes:
        address: Where clients connect to.
        public_key: The server's, by which clients know it.
        client_keys: What a client must hold.
    """

    def __init__(self, bind_host: str) -> None:
        """Bind to a free port of one of this host's own addresses."""
        own_keys, self.client_keys = CurveKeys.generate(), CurveKeys.generate()
        self.public_key = own_keys.public
        # ZMQ asks one authenticator per context, so the context must serve nothing else.
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        only_key = _OnlyKey(self.client_keys.public)
        self._authenticator.configure_curve_callback(credentials_provider=only_key)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = own_keys.public
        self._socket.curve_secretkey = own_keys.secret
        self._socket.router_mandatory = True
        # A client whose connection broke and came back takes over from its dead one.
        self._socket.router_handover = True
        self._socket.linger = 0
        self._socket.ipv6 = ":" in bind_host
        endpoint = f"tcp://{bracketed(bind_host)}"
        self.address = f"{endpoint}:{self._socket.bind_to_random_port(endpoint)}"

    def send(self, identity: bytes, *frames: bytes) -> str | None:
        """Send to the client of that identity at once; returns as `send_at_once`."""
        return send_at_once(self._socket, [identity, *frames])

    async def receive(self) -> list[bytes]:
        """Wait for a message: the client's identity, then its frames."""
        return await self._socket.recv_multipart()

    def receive_at_once(self) -> list[bytes] | None:
        """Return a message that lies there, or None."""
        waiting = self._socket.recv_multipart(zmq.DONTWAIT)
        received = cast("asyncio.Future[list[bytes]]", waiting)
        # Done on return, as in `send_at_once`.
        error = received.exception()
        if isinstance(error, zmq.Again):
            return None
        return received.result()

    def close(self) -> None:
        self._authenticator.stop()
        self._context.destroy(linger=0)


def connect(
    context: "zmq.Context[_Socket]",
    address: str,
    *,
    server_public_key: bytes,
    keys: CurveKeys,
    identity: bytes,
    linger_ms: int = 0,
) -> _Socket:
    """Connect a DEALER socket to a `CurveServer`, and again whenever the connection breaks.

    Args:
        context: That the socket is to belong to.
        address: The server's.
        server_public_key: The server's.
        keys: The client keys that the server admits.
        identity: Under which the server sends to this socket, not empty; no other may have it.
        linger_ms: How long what was sent is kept for a server that does not take it at the end.
    """
    connection = context.socket(zmq.DEALER)
    connection.curve_serverkey = server_public_key
    connection.curve_publickey = keys.public
    connection.curve_secretkey = keys.secret
    connection.identity = identity
    connection.linger = linger_ms
    connection.ipv6 = "[" in address
    connection.connect(address)
    return connection


def send_at_once(connection: zmq.asyncio.Socket, frames: Sequence[bytes]) -> str | None:
    """Queue a message without waiting.

    Returns:
        Why it could not be queued, as what follows the other side's name; None if it was.
    """
    sent = cast("asyncio.Future[None]", connection.send_multipart(frames, zmq.DONTWAIT))
    # Done on return: a send that may not wait has succeeded or failed by then.
    error = sent.exception()
    if error is None:
        return None
    if isinstance(error, zmq.Again):
        return "it does not read what is sent to it"
    return f"its connection is gone ({error})"


class _OnlyKey:
    """Lets in whoever holds the secret key that belongs to one public key."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        del domain
        return key == self._public_key
