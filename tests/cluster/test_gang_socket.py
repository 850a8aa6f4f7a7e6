"""Who may speak on a gang's wire, and what arrives."""

import asyncio
import dataclasses

import pytest

from cluster.curve import CurveKeys
from cluster.gang_socket import HostMessage, HostSocket, LeaderSocket, MessageKind

TIMEOUT_S = 60


async def test_plans_go_to_every_host_and_reports_come_back() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=3, num_hosts=2)
    hosts = [HostSocket(leader.invitation, rank) for rank in range(2)]
    try:
        hellos = {await asyncio.wait_for(leader.receive(), TIMEOUT_S) for _ in hosts}
        assert hellos == {HostMessage(rank, MessageKind.HELLO, b"") for rank in range(2)}
        leader.broadcast(MessageKind.PLAN, b"do")
        for host in hosts:
            assert await asyncio.to_thread(host.receive, 5) == (MessageKind.PLAN, b"do")
        hosts[1].send(MessageKind.RESULT, b"done")
        message = await asyncio.wait_for(leader.receive(), TIMEOUT_S)
        assert message == HostMessage(1, MessageKind.RESULT, b"done")
    finally:
        for host in hosts:
            host.close()
        leader.close()


async def test_host_with_another_epochs_keys_is_refused_and_the_right_one_heard() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=1, num_hosts=1)
    stale = dataclasses.replace(leader.invitation, host_keys=CurveKeys.generate())
    stranger, host = HostSocket(stale, 0), HostSocket(leader.invitation, 0)
    try:
        stranger.send(MessageKind.RESULT, b"forged")
        host.send(MessageKind.RESULT, b"genuine")
        heard = [await asyncio.wait_for(leader.receive(), TIMEOUT_S) for _ in range(2)]
        assert {message.payload for message in heard} == {b"", b"genuine"}
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(leader.receive(), 0.3)
    finally:
        stranger.close()
        host.close()
        leader.close()


async def test_messages_of_another_epoch_are_dropped() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=2, num_hosts=2)
    late = HostSocket(dataclasses.replace(leader.invitation, epoch=1), 1)
    host = HostSocket(leader.invitation, 0)
    try:
        late.send(MessageKind.RESULT, b"late")
        host.send(MessageKind.RESULT, b"in time")
        heard = [(await asyncio.wait_for(leader.receive(), TIMEOUT_S)).payload for _ in range(2)]
        assert sorted(heard) == [b"", b"in time"]
    finally:
        late.close()
        host.close()
        leader.close()


async def test_hosts_that_cannot_be_sent_to_are_named_and_the_others_get_it() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=1, num_hosts=3)
    host = HostSocket(leader.invitation, 1)
    try:
        hello = await asyncio.wait_for(leader.receive(), TIMEOUT_S)
        assert hello.kind is MessageKind.HELLO
        lost = leader.broadcast(MessageKind.PLAN, b"do")
        assert lost.keys() == {0, 2}
        assert "connection is gone" in lost[0]
        assert await asyncio.to_thread(host.receive, TIMEOUT_S) == (MessageKind.PLAN, b"do")
    finally:
        host.close()
        leader.close()


async def test_host_that_does_not_read_is_told_from_one_that_is_gone() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=1, num_hosts=2)
    host = HostSocket(leader.invitation, 0)
    try:
        assert (await asyncio.wait_for(leader.receive(), TIMEOUT_S)).kind is MessageKind.HELLO
        lost: dict[int, str] = {}
        # More than the buffers of both ends and of the connection between them hold.
        for _ in range(100_000):
            lost = leader.broadcast(MessageKind.PLAN, bytes(16_384))
            if 0 in lost:
                break
        assert lost[0] == "it does not read what is sent to it"
        assert "connection is gone" in lost[1]
    finally:
        host.close()
        leader.close()


async def test_reports_after_close_are_dropped() -> None:
    leader = LeaderSocket("127.0.0.1", epoch=1, num_hosts=1)
    host = HostSocket(leader.invitation, 0)
    host.close()
    host.send(MessageKind.BEAT)
    leader.close()
