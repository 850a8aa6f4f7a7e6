"""Conversations of several turns: their texts and pauses out of one seed, and how they are held."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.serving.prompts import PromptMaker
from benchmarks.serving.results import BenchRequest, RequestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What the conversations are like; lengths in tokens."""

    num_conversations: int
    num_turns: int
    system_len: int
    user_len: int
    output_len: int
    think_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one user does.

    Attributes:
        system: The system prompt, the same in all conversations.
        turns: Before each message the seconds that its user takes for it, and the message.
    """

    name: str
    system: str
    turns: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of one message, the first of a conversation being number 0."""

    number: int
    result: RequestResult


def hit_rate(turns: Sequence[Turn]) -> float:
    """Share of all prompt tokens that were found cached."""
    num_tokens = sum(turn.result.prompt_len for turn in turns)
    return sum(turn.result.num_cached_tokens for turn in turns) / max(1, num_tokens)


def make_trace(options: TraceOptions, prompts: PromptMaker) -> list[Conversation]:
    """Make the conversations; pauses are drawn from an exponential distribution."""
    rng = np.random.default_rng(options.seed)
    system = str(prompts.make(options.system_len))
    trace = []
    for number in range(options.num_conversations):
        pauses_s = rng.exponential(options.think_s, size=options.num_turns)
        # Users do not all come at once.
        pauses_s[0] = rng.uniform(0, options.think_s * options.num_turns / 2)
        texts = [str(prompts.make(options.user_len)) for _ in pauses_s]
        turns = tuple(zip(pauses_s.tolist(), texts, strict=True))
        trace.append(Conversation(f"conversation-{number}", system, turns))
    return trace


async def hold(
    trace: Sequence[Conversation],
    send: Callable[[BenchRequest], Awaitable[RequestResult]],
    *,
    output_len: int,
    session_header: str | None,
) -> list[Turn]:
    """Hold all conversations at once; each message comes a pause after the answer before it.

    Args:
        send: Must keep texts, and must not raise for a request that fails.
        output_len: Most tokens of an answer.
        session_header: Header that names the conversation; None: no request says to which it
            belongs.
    """
    turns: list[Turn] = []

    async def converse(conversation: Conversation) -> None:
        messages = [{"role": "system", "content": conversation.system}]
        headers = {session_header: conversation.name} if session_header else {}
        for number, (pause_s, text) in enumerate(conversation.turns):
            await asyncio.sleep(pause_s)
            request = BenchRequest(
                prompt=text,
                prompt_len=None,
                output_len=output_len,
                history=tuple(messages),
                headers=headers,
            )
            result = await send(request)
            turns.append(Turn(number, result))
            messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": result.text},
            ]

    async with asyncio.TaskGroup() as tasks:
        for conversation in trace:
            tasks.create_task(converse(conversation))
    return turns
