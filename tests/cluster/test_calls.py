"""A leader's calls, when the router that waits for their tokens falls silent."""

import asyncio

import pytest

from cluster.calls import CallTable
from cluster.journal import GenerateCall
from cluster.openai.engine_client import ChoiceRequest, GenerateRequest, PastChoice, StreamRecord
from cluster.token_socket import TokenReceiver
from engine.errors import EngineDiedError
from engine.request import SamplingParams

TIMEOUT_S = 60


async def test_calls_of_a_router_that_falls_silent_fail() -> None:
    receiver = TokenReceiver("127.0.0.1")
    calls = CallTable(engine_id="e", on_abort=lambda request_id: None, silence_timeout_s=0.5)
    watching = asyncio.create_task(calls.watch_routers())
    choice = ChoiceRequest(prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1, seed=0))
    record = StreamRecord(GenerateRequest(request_id="r", choices=(choice,)), 0, [PastChoice()])
    call = calls.open(GenerateCall(record, receiver.invitation))
    await receiver.close()
    with pytest.raises(EngineDiedError, match="The router was silent for"):
        await asyncio.wait_for(call.ended, TIMEOUT_S)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert watching.cancelled()
    calls.disconnect()
