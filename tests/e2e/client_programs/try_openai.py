"""The openai package's own helpers: parse, stream, tools of pydantic models, errors."""

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from checks import Checks, Server
from pydantic import BaseModel, Field

check = Checks()
QUESTION: Any = [{"role": "user", "content": "How is the weather in Paris today?"}]
# What the demo model answers with a few tokens, so that nothing has to cut it.
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    celsius: int = Field(ge=-20, le=40)
    is_sunny: bool


class GetWeather(BaseModel):
    """Ask for the weather."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=7)


TOOL = openai.pydantic_function_tool(GetWeather)


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0, timeout=120)


@check
def models_are_listed(server: Server) -> None:
    assert server.model in [model.id for model in connect(server).models.list()]
    assert connect(server).models.retrieve(server.model).id == server.model


@check
def a_chat_is_answered_with_usage(server: Server) -> None:
    answer = connect(server).chat.completions.create(
        model=server.model, messages=QUESTION, max_tokens=16, temperature=0, user="me"
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check
def a_stream_is_the_whole_answer(server: Server) -> None:
    fields: Any = {"model": server.model, "temperature": 0, "messages": FRANCE}
    client = connect(server)
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage.completion_tokens == whole.usage.completion_tokens


@check
def an_answer_is_parsed(server: Server) -> str:
    answer = connect(server).chat.completions.parse(
        model=server.model, messages=QUESTION, response_format=Weather, max_tokens=100
    )
    message = answer.choices[0].message
    assert isinstance(message.parsed, Weather)
    return message.content or ""


@check
def a_streamed_answer_is_parsed(server: Server) -> str:
    with connect(server).chat.completions.stream(
        model=server.model, messages=QUESTION, response_format=Weather, max_tokens=100
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "content.done" in kinds
    assert isinstance(message.parsed, Weather)
    return message.content or ""


@check
def a_required_tool_is_called_and_its_result_read(server: Server) -> str:
    client = connect(server)
    answer = client.chat.completions.parse(
        model=server.model,
        messages=QUESTION,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": '{"celsius": 21}'}
    after: Any = [*QUESTION, choice.message, result]
    final = client.chat.completions.create(
        model=server.model, messages=after, tools=[TOOL], tool_choice="none", max_tokens=32
    )
    assert final.choices[0].message.content
    assert not final.choices[0].message.tool_calls
    return calls[0].function.arguments


@check
def a_streamed_call_of_a_named_tool_is_whole(server: Server) -> str:
    with connect(server).chat.completions.stream(
        model=server.model,
        messages=QUESTION,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "GetWeather"}},
        max_tokens=100,
    ) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.id
    assert call.function.name == "GetWeather"
    assert isinstance(done[0].parsed_arguments, GetWeather)
    assert json.loads(call.function.arguments) == json.loads(done[0].arguments)
    return call.function.arguments


@check
def choices_and_log_probabilities_come_as_asked(server: Server) -> None:
    answer = connect(server).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        n=2,
        logprobs=True,
        top_logprobs=3,
        max_tokens=5,
        seed=1,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert len(tokens) == 5
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content


@check
def a_completion_echoes_its_prompt_with_log_probabilities(server: Server) -> None:
    answer = connect(server).completions.create(
        model=server.model, prompt="The sky is", echo=True, logprobs=2, max_tokens=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The sky is")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None


@check
def many_answers_at_once(server: Server) -> None:
    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="EMPTY") as client:
            ask = client.chat.completions.create
            fields: Any = {"model": server.model, "messages": QUESTION, "max_tokens": 8}
            return await asyncio.gather(*(ask(**fields, temperature=0) for _ in range(8)))

    answers = asyncio.run(ask_all())
    assert len({answer.id for answer in answers}) == 8


@check
def faults_are_the_package_s_own_errors(server: Server) -> None:
    client = connect(server)
    for fields, kind, param, code in (
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"temprature": 1}, openai.BadRequestError, "temprature", "unknown_parameter"),
        ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
    ):
        asked = {"model": server.model, "messages": QUESTION, "max_tokens": 1} | fields
        refusal = None
        try:
            client.post("/chat/completions", body=asked, cast_to=object)
        except kind as error:
            refusal = error.param, error.code
        assert refusal == (param, code)


if __name__ == "__main__":
    sys.exit(check.main())
