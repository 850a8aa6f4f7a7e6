"""Conversations against an HTTP server, and the figures that are made of them."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import numpy as np
from openai_server import OpenAIServer
from tiny_tokenizer import write_tiny_tokenizer

from benchmarks.bench_routing import Policy, figures_of, table
from benchmarks.routing.conversations import Conversation, TraceOptions, hit_rate, hold, make_trace
from benchmarks.routing.plot import draw
from benchmarks.routing.power_of_two import PowerOfTwoChoices
from benchmarks.serving.client import RequestOptions, ServingClient
from benchmarks.serving.prompts import PromptMaker
from cluster.engine_choice import Route
from engine.text.tokenizer import load_tokenizer

OPTIONS = TraceOptions(
    num_conversations=3,
    num_turns=2,
    system_len=8,
    user_len=4,
    output_len=2,
    think_s=0.0,
    seed=3,
)


def trace_in(directory: Any) -> list[Conversation]:
    write_tiny_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    rng = np.random.default_rng(OPTIONS.seed)
    return make_trace(OPTIONS, PromptMaker(rng, tokenizer=tokenizer, vocab_size=0, wants_text=True))


async def test_each_message_comes_with_all_that_was_said_before_it(tmp_path):
    trace = trace_in(tmp_path)
    policy = Policy("ours", "ours", "x-session-id")
    async with OpenAIServer() as server, aiohttp.ClientSession() as session:
        options = RequestOptions(model="tiny", is_chat=True, keeps_text=True)
        client = ServingClient(session, f"http://127.0.0.1:{server.port}", options)
        for header in (policy.session_header, None):
            policy.rounds.append(
                await hold(trace, client.send, output_len=2, session_header=header)
            )
    assert len({conversation.system for conversation in trace}) == 1
    for conversation in trace:
        bodies = [
            exchange.body["messages"]
            for exchange in server.exchanges
            if exchange.headers.get("x-session-id") == conversation.name
        ]
        texts = [text for _, text in conversation.turns]
        assert [[message["content"] for message in body] for body in bodies] == [
            [conversation.system, texts[0]],
            [conversation.system, texts[0], " word word", texts[1]],
        ]
        roles = [message["role"] for message in bodies[1]]
        assert roles == ["system", "user", "assistant", "user"]
    assert sum("x-session-id" in exchange.headers for exchange in server.exchanges) == 6

    # The server counts messages as prompt tokens, and says that one of them was cached.
    turns = policy.rounds[0]
    assert hit_rate([turn for turn in turns if turn.number == 0]) == 1 / 2
    assert hit_rate(turns) == 6 / (3 * 2 + 3 * 4)
    figures = figures_of(policy)
    assert (figures["requests"], figures["failed"], figures["prompt_tokens"]) == (12, 0, 36)
    assert "| ours | 12 | 0 | 33.3% | 33%, 33% |" in table([figures])
    draw({policy.name: turns}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_default_draws_two_engines_for_a_request_and_asks_each_how_it_is_by_name():
    random.seed(1)
    replicas = [
        cast(Any, SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))) for name in "abc"
    ]

    def choose(method: str) -> list[list[str]]:
        request = SimpleNamespace(
            metadata=SimpleNamespace(call_method=method), kwargs={"route": Route(("c",))}
        )
        # It uses nothing of itself, and Serve alone can make one.
        router = object.__new__(PowerOfTwoChoices)
        ranks = asyncio.run(router.choose_replicas(replicas, cast(Any, request)))
        return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]

    drawn = [choose("generate") for _ in range(50)]
    assert all(len(rank) == len(set(rank)) == 2 for [rank] in drawn)
    assert {name for [rank] in drawn for name in rank} == set("abc")
    assert choose("describe")[0] == ["c"]
