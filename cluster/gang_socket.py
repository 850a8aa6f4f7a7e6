"""The wire between a gang's leader and its hosts: plans down; beats, progress and results up.

Knows frames, keys and epochs, and not what a plan means. Every message is a list of byte strings

    leader → host:  [epoch, kind, payload]      host → leader:  [rank, epoch, kind, payload]

over sockets encrypted and authenticated by CURVE. The leader makes fresh keys for each epoch and
hands them out through Ray, so a host of an epoch that is over is refused at the handshake.
"""

import contextlib
import enum
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from cluster.curve import CurveKeys, CurveServer, connect


class MessageKind(enum.Enum):
    """What a message carries; the value is its bytes on the wire."""

    BEAT = b"beat"
    HELLO = b"hello"
    """A host's plan socket is connected."""
    PROGRESS = b"progress"
    READY = b"ready"
    PLAN = b"plan"
    MASKS = b"masks"
    """Of the plan before it."""
    RESULT = b"result"
    PROFILE = b"profile"
    """Trace so many of the next steps, as msgpack; 0 ends a trace early."""


class HostMessage(NamedTuple):
    rank: int
    kind: MessageKind
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GangInvitation:
    """What a host needs to talk to its leader in one epoch; secret, so handed out through Ray."""

    address: str
    epoch: int
    leader_public_key: bytes
    host_keys: CurveKeys = field(repr=False)


class LeaderSocket:
    """The leader's end: bound to one address of its own, for one epoch and its hosts.

    Belongs to the event loop that it is made in.
    """

    def __init__(self, bind_host: str, epoch: int, num_hosts: int) -> None:
        self._epoch = _epoch_bytes(epoch)
        self._num_hosts = num_hosts
        self._server = CurveServer(bind_host)
        self.invitation = GangInvitation(
            address=self._server.address,
            epoch=epoch,
            leader_public_key=self._server.public_key,
            host_keys=self._server.client_keys,
        )

    def broadcast(self, kind: MessageKind, payload: bytes = b"") -> dict[int, str]:
        """Send to every host that said hello; returns at once.

        Returns:
            The ranks that could not be sent to, each with the reason; none if all is well.
        """
        lost = {}
        for rank in range(self._num_hosts):
            identity = _identity("plan", rank)
            reason = self._server.send(identity, self._epoch, kind.value, payload)
            if reason is not None:
                lost[rank] = reason
        return lost

    async def receive(self) -> HostMessage:
        """Wait for a message of this epoch; others are dropped."""
        while True:
            frames = await self._server.receive()
            if len(frames) != 4 or frames[1] != self._epoch:
                continue
            with contextlib.suppress(ValueError):
                rank = int(frames[0].rpartition(b"-")[2])
                if rank < self._num_hosts:
                    return HostMessage(rank, MessageKind(frames[2]), frames[3])

    def close(self) -> None:
        self._server.close()


class HostSocket:
    """A host's end. `receive` belongs to one thread; `send` may be called from any.

    Two connections, because a ZMQ socket must not be read and written by two threads at once.
    """

    def __init__(self, invitation: GangInvitation, rank: int) -> None:
        self._epoch = _epoch_bytes(invitation.epoch)
        self._context = zmq.Context()
        self._plans = self._connect(invitation, _identity("plan", rank))
        self._reports = self._connect(invitation, _identity("report", rank))
        self._send_lock = threading.Lock()
        self._is_closed = False
        self._plans.send_multipart([self._epoch, MessageKind.HELLO.value, b""])

    def _connect(self, invitation: GangInvitation, identity: bytes) -> "zmq.Socket[bytes]":
        return connect(
            self._context,
            invitation.address,
            server_public_key=invitation.leader_public_key,
            keys=invitation.host_keys,
            identity=identity,
        )

    def receive(self, timeout_s: float) -> tuple[MessageKind, bytes] | None:
        """Wait for a message from the leader; None if there is none in time."""
        if not self._plans.poll(int(timeout_s * 1000)):
            return None
        frames = self._plans.recv_multipart()
        if len(frames) != 3 or frames[0] != self._epoch:
            return None
        return MessageKind(frames[1]), frames[2]

    def send(self, kind: MessageKind, payload: bytes = b"") -> None:
        """Queue a message; returns at once. Beats into a full queue are dropped."""
        with self._send_lock, contextlib.suppress(zmq.Again):
            if self._is_closed:
                return
            self._reports.send_multipart([self._epoch, kind.value, payload], zmq.DONTWAIT)

    def close(self) -> None:
        """Drop both connections; call it in the thread that receives. Later sends do nothing."""
        with self._send_lock:
            self._is_closed = True
            self._context.destroy(linger=0)


def _epoch_bytes(epoch: int) -> bytes:
    return epoch.to_bytes(8, "big")


def _identity(connection: str, rank: int) -> bytes:
    return f"{connection}-{rank}".encode()
