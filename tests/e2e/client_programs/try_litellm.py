"""LiteLLM as a client of an OpenAI-compatible server and of one that it takes for vLLM."""

import asyncio
import json
import sys
from typing import Any, Literal

import litellm
from checks import Checks, Server
from pydantic import BaseModel, Field

check = Checks()
QUESTION = [{"role": "user", "content": "How is the weather in Paris today?"}]
PROVIDERS = ("openai", "hosted_vllm")
# The demo model would call the same tool over and over.
ONE_CALL = {"parallel_tool_calls": False}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    celsius: int = Field(ge=-20, le=40)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Ask for the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def ask(server: Server, provider: str, **fields: Any) -> Any:
    asked = {"messages": QUESTION, "max_tokens": 100, "temperature": 0, "timeout": 120} | fields
    model = f"{provider}/{server.model}"
    return litellm.completion(model=model, api_base=server.url, api_key="EMPTY", **asked)


@check
def answers_and_streams_are_the_same(server: Server) -> None:
    for provider in PROVIDERS:
        whole = ask(server, provider, max_tokens=24)
        stream = ask(
            server, provider, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
        assert built.choices[0].message.content == whole.choices[0].message.content
        assert built.choices[0].finish_reason == whole.choices[0].finish_reason
        assert built.usage.completion_tokens == whole.usage.completion_tokens


@check
def structured_output(server: Server) -> str:
    schema = {"name": "weather", "schema": Weather.model_json_schema(), "strict": True}
    for provider in PROVIDERS:
        for form in (Weather, {"type": "json_schema", "json_schema": schema}):
            answer = ask(server, provider, response_format=form)
            Weather.model_validate_json(answer.choices[0].message.content)
    return answer.choices[0].message.content


@check
def tools_are_called_and_their_results_read(server: Server) -> str:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for provider in PROVIDERS:
        for choice in ("required", named):
            answer = ask(server, provider, tools=[TOOL], tool_choice=choice, **ONE_CALL)
            message = answer.choices[0].message
            (call,) = message.tool_calls
            assert answer.choices[0].finish_reason == "tool_calls"
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
        # As objects, and as the dictionaries that LiteLLM makes of them, nulls and all.
        for past in (message, message.model_dump()):
            final = ask(server, provider, messages=[*QUESTION, past, result], tools=[TOOL])
            assert final.choices[0].message.role == "assistant"
    return call.function.arguments


@check
def streamed_calls_add_up(server: Server) -> None:
    for provider in PROVIDERS:
        chunks = list(
            ask(server, provider, tools=[TOOL], tool_choice="required", stream=True, **ONE_CALL)
        )
        built = litellm.stream_chunk_builder(chunks, messages=QUESTION)
        (call,) = built.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@check
def many_at_once(server: Server) -> None:
    async def ask_all() -> list[Any]:
        model = f"hosted_vllm/{server.model}"
        where: Any = {"api_base": server.url, "api_key": "EMPTY", "max_tokens": 8}
        return await asyncio.gather(
            *(litellm.acompletion(model=model, messages=QUESTION, **where) for _ in range(8))
        )

    assert len({answer.id for answer in asyncio.run(ask_all())}) == 8


@check
def text_is_completed(server: Server) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{server.model}",
        prompt="The sky is",
        max_tokens=4,
        api_base=server.url,
        api_key="EMPTY",
    )
    assert answer.choices[0].text


@check
def faults_are_its_own_errors(server: Server) -> None:
    refusal = None
    try:
        ask(server, "openai", temperature=99)
    except litellm.BadRequestError as error:
        refusal = str(error)
    assert refusal is not None
    assert "temperature" in refusal


if __name__ == "__main__":
    sys.exit(check.main())
