"""A gang with a real (tiny) model: two hosts give the tokens of one, before and after a death."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.host_group import HostGroup
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineDiedError
from engine.request import Request, RequestOutput, SamplingParams
from engine.step import StartProgress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen2"
GOLDEN = json.loads((MODEL / "golden.json").read_text())
PROMPTS = [GOLDEN["ids"], GOLDEN["ids"][:7]]
NUM_TOKENS = len(GOLDEN["greedy"])


def config(num_hosts: int) -> EngineConfig:
    return EngineConfig(
        model_path=str(MODEL),
        device="cpu",
        dtype="float32",
        nnodes=num_hosts,
        tp_size=num_hosts,
        page_size=4,
        context_length=64,
        max_running_requests=2,
        chunked_prefill_size=16,
        max_total_tokens=1024,
    )


@contextlib.asynccontextmanager
async def started(group: HostGroup, config: EngineConfig) -> AsyncIterator["Client"]:
    progress: list[StartProgress] = []
    limits = await group.start(progress.append)
    assert {report.phase for report in progress} >= {"placement", "rendezvous", "compile"}
    client = Client()
    core = EngineCore(config, limits, group, client.take)
    client.core = core
    run = asyncio.create_task(core.run())
    client.run = run
    try:
        yield client
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


class Client:
    """Greedy requests to a core, and what came of them."""

    core: EngineCore
    run: "asyncio.Task[None]"

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.has_first_token = asyncio.Event()

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id].extend(output.token_ids)
            self.has_first_token.set()

    def add(self, prompts: list[list[int]], *, num_tokens: int = NUM_TOKENS) -> None:
        for index, prompt in enumerate(prompts):
            self.tokens[str(index)] = []
            sampling = SamplingParams(
                temperature=0, max_tokens=num_tokens, seed=index, ignore_eos=True
            )
            self.core.add(
                Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
            )

    async def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        self.add(prompts)
        await asyncio.wait_for(self.core.wait_until_idle(), 120)
        return list(self.tokens.values())


async def test_two_hosts_give_the_tokens_of_one_and_come_back_after_a_death() -> None:
    one, two = config(1), config(2)
    group = HostGroup(one)
    try:
        async with started(group, one) as client:
            expected = await client.generate(PROMPTS)
    finally:
        await group.stop()
    assert expected[0] == GOLDEN["greedy"]

    group = HostGroup(two)
    try:
        async with started(group, two) as client:
            assert await client.generate(PROMPTS) == expected
            client.has_first_token.clear()
            client.add(PROMPTS)
            await asyncio.wait_for(client.has_first_token.wait(), 120)
            killed_s = time.monotonic()
            os.kill(group.hosts[1].facts.pid, signal.SIGKILL)
            with pytest.raises(EngineDiedError, match="died: rank 1"):
                await asyncio.wait_for(client.run, 10)
            assert time.monotonic() - killed_s < 5
        async with started(group, two) as client:
            assert await client.generate(PROMPTS) == expected
    finally:
        await group.stop()
