"""langchain-openai: messages, streams, structured output by each method, tools, and an agent."""

import sys
from typing import Any, Literal

from checks import Checks, Server
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

check = Checks()
QUESTION = "How is the weather in Paris today?"
# The demo model would call the same tool over and over.
ONE_CALL = {"parallel_tool_calls": False}


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    celsius: int = Field(ge=-20, le=40)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Ask for the weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


def connect(server: Server, **fields: Any) -> ChatOpenAI:
    fields = {"temperature": 0, "max_tokens": 100, "max_retries": 0, "timeout": 120} | fields
    return ChatOpenAI(model=server.model, base_url=server.url, api_key="EMPTY", **fields)


@check
def a_conversation_is_answered(server: Server) -> None:
    messages = [
        SystemMessage("You are brief."),
        HumanMessage("Hello."),
        AIMessage("Hello!"),
        HumanMessage([{"type": "text", "text": QUESTION}]),
    ]
    answer = connect(server, max_tokens=16).invoke(messages)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 16
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


@check
def a_stream_is_the_whole_answer(server: Server) -> None:
    model = connect(server, max_tokens=24, stream_usage=True)
    chunks = list(model.stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert len(chunks) > 2
    whole = model.invoke(QUESTION)
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


@check
def a_batch_is_answered(server: Server) -> None:
    answers = connect(server, max_tokens=8).batch([QUESTION, "Who are you?"])
    assert all(answer.content for answer in answers)


@check
def structured_output_by_json_schema(server: Server) -> str:
    for strict in (None, True):
        model = connect(server).with_structured_output(Weather, method="json_schema", strict=strict)
        assert isinstance(model.invoke(QUESTION), Weather)
    return repr(model.invoke(QUESTION))


@check
def structured_output_by_function_calling(server: Server) -> str:
    model = connect(server).with_structured_output(Weather, method="function_calling")
    answer = model.invoke(QUESTION)
    assert isinstance(answer, Weather)
    return repr(answer)


@check
def structured_output_by_json_mode(server: Server) -> str:
    """Any JSON object will do for the server, so what is parsed is the raw answer."""
    model = connect(server).with_structured_output(method="json_mode")
    answer = model.invoke('Repeat this JSON: {"city": "Paris", "celsius": 21}')
    assert isinstance(answer, dict)
    return repr(answer)


@check
def structured_output_is_streamed(server: Server) -> None:
    model = connect(server).with_structured_output(Weather.model_json_schema() | {"title": "W"})
    parts = list(model.stream(QUESTION))
    assert Weather.model_validate(parts[-1])


@check
def tools_are_called_and_their_results_read(server: Server) -> str:
    model = connect(server)
    for choice in ("any", "required", "get_weather"):
        answer = model.bind_tools(
            [get_weather], tool_choice=choice, parallel_tool_calls=False
        ).invoke(QUESTION)
        (call,) = answer.tool_calls
        assert call["name"] == "get_weather"
        assert call["args"]["city"] in ("Paris", "Rome")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    final = model.bind_tools([get_weather], tool_choice="none").invoke(
        [HumanMessage(QUESTION), answer, result]
    )
    assert final.content
    return repr(call["args"])


@check
def streamed_calls_add_up(server: Server) -> None:
    model = connect(server).bind_tools(
        [get_weather], tool_choice="any", strict=True, parallel_tool_calls=False
    )
    chunks = list(model.stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    (call,) = total.tool_calls
    assert call["id"]
    assert call["args"]["city"] in ("Paris", "Rome")


@wrap_model_call
def call_once(request: Any, handler: Any) -> Any:
    """The demo model would hardly call a tool of its own accord."""
    has_result = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if has_result else "any"))


@check
def an_agent_calls_a_tool_and_answers(server: Server) -> str:
    model = connect(server, model_kwargs=ONE_CALL)
    agent = create_agent(model, tools=[get_weather], middleware=[call_once])
    messages = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"]
    assert [type(message).__name__ for message in messages] == [
        "HumanMessage",
        "AIMessage",
        "ToolMessage",
        "AIMessage",
    ]
    assert "21 degrees" in messages[2].content
    return messages[3].content


@check
def an_agent_answers_in_a_form(server: Server) -> None:
    for strategy, fields in ((ProviderStrategy(Weather), {}), (ToolStrategy(Weather), ONE_CALL)):
        model = connect(server, model_kwargs=fields)
        agent = create_agent(model, tools=[], response_format=strategy)
        state = agent.invoke({"messages": [HumanMessage(QUESTION)]})
        assert isinstance(state["structured_response"], Weather)


if __name__ == "__main__":
    sys.exit(check.main())
