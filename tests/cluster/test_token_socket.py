"""Tokens from a leader to a router over real sockets on loopback."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq

from cluster.curve import CurveKeys
from cluster.lived_time import TICK_S, LivedTime
from cluster.token_socket import (
    CHOICES_PER_TURN,
    AbortChoice,
    ChoiceTokens,
    TokenReceiver,
    TokenSender,
    TokenStream,
)
from engine.errors import EngineDiedError
from engine.request import TokenLogprobs

TIMEOUT_S = 60


@pytest.fixture
async def receiver() -> AsyncIterator[TokenReceiver]:
    receiver = TokenReceiver("127.0.0.1")
    yield receiver
    await receiver.close()


class Leader:
    """A sender and the aborts that it was told of."""

    def __init__(self, receiver: TokenReceiver, **changes: bytes | str) -> None:
        self.aborts: asyncio.Queue[AbortChoice] = asyncio.Queue()
        invitation = msgspec.structs.replace(receiver.invitation, **changes)
        self.sender = TokenSender(
            invitation, self.aborts.put_nowait, engine_id=uuid.uuid4().hex, clock=time.monotonic
        )

    def __enter__(self) -> "Leader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sender.close()


class Wire:
    """A TCP connection's way through this test, which can break it."""

    def __init__(self) -> None:
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def between(self, address: str) -> AsyncIterator[str]:
        """An address that leads to `address`."""
        port = int(address.rpartition(":")[2])

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            self._writers += [writer, there_writer]
            self._tasks += [
                asyncio.create_task(_forward(reader, there_writer)),
                asyncio.create_task(_forward(there_reader, writer)),
            ]

        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        try:
            yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        """Break what is connected at present."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def tokens(choice: int, first: int, *ids: int, attempt: int = 0, end: bool = False) -> ChoiceTokens:
    return ChoiceTokens("r", attempt, choice, first, ids, "length" if end else None)


async def receive(stream: TokenStream) -> ChoiceTokens:
    """The next tokens of a stream that waits for them; those of several steps come joined."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (received := stream.take()):
            await stream.wait()
    (item,) = received
    return item


async def test_one_message_carries_the_tokens_of_many_requests(receiver: TokenReceiver):
    streams = {name: receiver.open_stream(name, 0, [0]) for name in "abc"}
    with Leader(receiver) as leader:
        sent = [ChoiceTokens(name, 0, 0, 0, (index, 7)) for index, name in enumerate("abc")]
        assert leader.sender.send(sent)
        for expected, stream in zip(sent, streams.values(), strict=True):
            assert await receive(stream) == expected


async def test_log_probabilities_arrive_as_they_were_sent(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 0, [0])
    logprobs = TokenLogprobs(logprob=-0.5, rank=1, top_token_ids=(3, 1), top_logprobs=(-0.5, -2.25))
    sent = ChoiceTokens("r", 0, 0, 0, (3,), "stop", 3, 16, (logprobs,))
    with Leader(receiver) as leader:
        leader.sender.send([sent])
        assert await receive(stream) == sent


def test_indices_that_were_received_before_are_dropped():
    stream = TokenStream([0])
    stream.put(tokens(0, 0, 5, 6))
    assert [item.token_ids for item in stream.take()] == [(5, 6)]
    stream.put(tokens(0, 0, 5))
    stream.put(tokens(0, 1, 6, 7, end=True))
    (item,) = stream.take()
    assert (item.first_index, item.token_ids, item.finish_reason) == (2, (7,), "length")
    assert stream.num_tokens == [3]


async def test_a_stream_that_lacks_tokens_fails_and_never_skips_them():
    stream = TokenStream([0])
    stream.put(tokens(0, 0, 5))
    assert [item.token_ids for item in stream.take()] == [(5,)]
    waiting = asyncio.create_task(stream.wait())
    await asyncio.sleep(0)
    assert stream.put(tokens(0, 2, 7, end=True))
    stream.wake()
    await asyncio.wait_for(waiting, TIMEOUT_S)
    with pytest.raises(EngineDiedError, match="lost with a connection"):
        stream.take()


def test_log_probabilities_of_tokens_that_were_received_before_are_dropped_with_them():
    stream = TokenStream([0])
    first, second, third = (
        TokenLogprobs(logprob=-float(n), rank=1, top_token_ids=(), top_logprobs=())
        for n in range(3)
    )
    stream.put(msgspec.structs.replace(tokens(0, 0, 5, 6), logprobs=(first, second)))
    stream.put(msgspec.structs.replace(tokens(0, 1, 6, 7), logprobs=(second, third)))
    (item,) = stream.take()
    assert (item.token_ids, item.logprobs) == ((5, 6, 7), (first, second, third))


async def test_steps_that_came_while_nobody_waited_are_handed_out_as_one():
    stream = TokenStream([0, 0])
    stream.put(tokens(0, 0, 5))
    stream.put(tokens(1, 0, 50))
    stream.put(tokens(0, 1, 6))
    stream.put(tokens(1, 1, 51, 52, end=True))
    await asyncio.wait_for(stream.wait(), TIMEOUT_S)
    assert [
        (item.choice, item.first_index, item.token_ids, item.finish_reason)
        for item in stream.take()
    ] == [
        (0, 0, (5, 6), None),
        (1, 0, (50, 51, 52), "length"),
    ]
    assert stream.take() == []


async def test_a_wait_can_be_ended_without_tokens():
    stream = TokenStream([0])
    waiting = asyncio.create_task(stream.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.wake()
    await asyncio.wait_for(waiting, TIMEOUT_S)
    assert stream.take() == []


async def test_a_wait_that_was_given_up_takes_no_tokens_along():
    stream = TokenStream([0])
    waiting = asyncio.create_task(stream.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    stream.put(tokens(0, 0, 5))
    await asyncio.wait_for(stream.wait(), TIMEOUT_S)
    assert [item.token_ids for item in stream.take()] == [(5,)]


async def test_only_streams_in_silence_are_woken(receiver: TokenReceiver):
    old, fresh = receiver.open_stream("old", 0, [0]), receiver.open_stream("fresh", 0, [0])
    old.heard_s -= 100
    waits = [asyncio.create_task(stream.wait()) for stream in (old, fresh)]
    await asyncio.sleep(0)
    receiver.wake_silent_streams(50)
    await asyncio.wait_for(waits[0], TIMEOUT_S)
    assert not waits[1].done()
    fresh.wake()
    await asyncio.wait_for(waits[1], TIMEOUT_S)


async def test_tokens_of_an_earlier_attempt_are_dropped(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 1, [0])
    with Leader(receiver) as leader:
        leader.sender.send([tokens(0, 0, 1, attempt=0), tokens(0, 0, 2, attempt=1)])
        assert (await receive(stream)).token_ids == (2,)


async def test_an_empty_message_names_the_leader_and_gives_no_tokens(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 0, [0])
    with Leader(receiver) as leader:
        leader.sender.send([tokens(0, 0), tokens(0, 0, 9)])
        assert (await receive(stream)).token_ids == (9,)
        assert stream.leader is not None


async def test_an_abort_reaches_the_leader_that_sends_the_tokens(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 0, [0, 0])
    with Leader(receiver) as other, Leader(receiver) as leader:
        other.sender.send([ChoiceTokens("else", 0, 0, 0, (1,))])
        leader.sender.send([tokens(1, 0, 4)])
        await receive(stream)
        receiver.abort_choice("r", 0, 1)
        assert await asyncio.wait_for(leader.aborts.get(), TIMEOUT_S) == AbortChoice("r", 0, 1)
        assert other.aborts.empty()


async def test_both_sides_hear_each_other_without_tokens(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 0, [0])
    with Leader(receiver) as leader:
        leader.sender.send([tokens(0, 0, 4)])
        await receive(stream)
        router_heard_s, leader_heard_s = stream.heard_s, leader.sender.heard_s
        async with asyncio.timeout(TIMEOUT_S):
            while stream.heard_s == router_heard_s or leader.sender.heard_s == leader_heard_s:
                await asyncio.sleep(0.01)


async def test_a_leader_is_the_same_one_after_its_connection_broke(receiver: TokenReceiver):
    stream = receiver.open_stream("r", 0, [0])
    wire = Wire()
    async with wire.between(receiver.invitation.address) as address:
        with Leader(receiver, address=address) as leader:
            leader.sender.send([tokens(0, 0, 4)])
            await receive(stream)
            wire.cut()
            cut_s, leader_cut_s = receiver.clock(), time.monotonic()
            # No tokens come: beats alone say, both ways, that the other side is there.
            async with asyncio.timeout(TIMEOUT_S):
                while stream.heard_s <= cut_s or leader.sender.heard_s < leader_cut_s:
                    await asyncio.sleep(0.01)
            receiver.abort_choice("r", 0, 0)
            assert await asyncio.wait_for(leader.aborts.get(), TIMEOUT_S) == AbortChoice("r", 0, 0)


async def test_a_leader_without_the_key_is_not_heard(receiver: TokenReceiver):
    stranger = CurveKeys.generate()
    stream = receiver.open_stream("r", 0, [0])
    with (
        Leader(
            receiver, leader_public_key=stranger.public, leader_secret_key=stranger.secret
        ) as intruder,
        Leader(receiver) as leader,
    ):
        intruder.sender.send([tokens(0, 0, 666)])
        # The intruder's handshake began first; a beat of the true leader later it has failed.
        leader.sender.send([tokens(0, 0)])
        leader_heard_s = leader.sender.heard_s
        async with asyncio.timeout(TIMEOUT_S):
            while leader.sender.heard_s == leader_heard_s:
                await asyncio.sleep(0.01)
        leader.sender.send([tokens(0, 0, 1)])
        assert (await receive(stream)).token_ids == (1,)


def arrive(receiver: TokenReceiver) -> None:
    """Hold the event loop up until something lies in the receiver's socket."""
    assert zmq.Socket.shadow(receiver._server._socket).poll(TIMEOUT_S * 1000)


async def test_what_has_arrived_while_the_loop_was_held_up_is_caught_up_with(
    receiver: TokenReceiver,
) -> None:
    stream = receiver.open_stream("r", 0, [0])
    with Leader(receiver) as leader:
        leader.sender.send([ChoiceTokens("r", 0, 0, 0, (1,))])
        async with asyncio.timeout(TIMEOUT_S):
            await stream.wait()
        assert [tokens.token_ids for tokens in stream.take()] == [(1,)]
        for index in range(1, 40):
            leader.sender.send([ChoiceTokens("r", 0, 0, index, (index + 1,))])
        arrive(receiver)
        assert stream.take() == []
        while stream.num_tokens != [40]:
            await receiver.catch_up()


async def test_a_step_of_many_tokens_lets_others_have_a_turn_in_between(
    receiver: TokenReceiver,
) -> None:
    number = 3 * CHOICES_PER_TURN
    streams = [receiver.open_stream(f"r{index}", 0, [0]) for index in range(number)]
    waits = [asyncio.create_task(stream.wait()) for stream in streams]
    with Leader(receiver) as leader:
        leader.sender.send([ChoiceTokens(f"r{index}", 0, 0, 0, (1,)) for index in range(number)])
        async with asyncio.timeout(TIMEOUT_S):
            await waits[0]
            assert sum(wait.done() for wait in waits) <= 2 * CHOICES_PER_TURN
            await asyncio.gather(*waits)
    assert all(len(stream.take()) == 1 for stream in streams)


async def test_streams_that_fall_behind_get_more_tokens_a_turn(receiver: TokenReceiver) -> None:
    number, num_steps = 4 * CHOICES_PER_TURN, 40
    streams = [receiver.open_stream(f"r{index}", 0, [0]) for index in range(number)]
    num_turns = 0

    async def read(stream: TokenStream) -> list[int]:
        nonlocal num_turns
        token_ids: list[int] = []
        while len(token_ids) < num_steps:
            await stream.wait()
            for item in stream.take():
                assert item.first_index == len(token_ids)
                token_ids += item.token_ids
                num_turns += 1
        return token_ids

    with Leader(receiver) as leader:
        for step in range(num_steps):
            leader.sender.send(
                [ChoiceTokens(f"r{index}", 0, 0, step, (step,)) for index in range(number)]
            )
            if step == 0:
                await asyncio.wait_for(streams[0].wait(), TIMEOUT_S)  # There is a connection.
        arrive(receiver)
        async with asyncio.timeout(TIMEOUT_S):
            read_ids = await asyncio.gather(*map(read, streams))
    assert read_ids == [list(range(num_steps))] * number
    # Each token by itself would be 5,120 turns.
    assert num_turns < number * num_steps / 4


async def test_time_stands_while_the_loop_is_held_up() -> None:
    clock = LivedTime()
    ticking = asyncio.create_task(clock.tick())
    await asyncio.sleep(2 * TICK_S)
    began_s, lived_s = time.monotonic(), clock()
    while time.monotonic() - began_s < 10 * TICK_S:
        pass
    await asyncio.sleep(0)
    assert 0 < clock() - lived_s < 5 * TICK_S
    lived_s = clock()
    while clock() - lived_s < 5 * TICK_S:  # It goes on.
        await asyncio.sleep(TICK_S)
    ticking.cancel()
