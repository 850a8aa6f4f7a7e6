"""functions and function_call, OpenAI's older way to call tools, with OpenAI's own client."""

from pathlib import Path
from typing import Any

import openai
import pytest
from chat_templates import TOOLS_AND_THOUGHTS
from fake_engine import FakeEngine
from test_tool_calls import CALLS, QUESTION, WEATHER, prompt_of

from engine.text.tokenizer import Tokenizer, load_tokenizer

MODEL = "Tiny/Tiny-Chat"
FUNCTION: dict[str, Any] = WEATHER["function"]
CLOCK: dict[str, Any] = {"name": "get_time", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def service_fields() -> dict[str, Any]:
    return {"chat_template_text": TOOLS_AND_THOUGHTS}


@pytest.fixture
def tokenizer(engine: FakeEngine, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tmp_path)


async def test_a_call_comes_in_the_old_way_whole_and_streamed(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: CALLS
    fields: Any = {"model": MODEL, "messages": QUESTION, "functions": [FUNCTION]}
    whole = (await sdk.chat.completions.create(**fields)).choices[0]
    old_prompt = prompt_of(engine, tokenizer)
    assert engine.requests[0].grammar is None
    assert (whole.finish_reason, whole.message.content) == ("function_call", "I look.")
    assert whole.message.tool_calls is None
    call = whole.message.function_call
    assert call is not None
    # A message has one call: the second has no place in it.
    assert (call.name, call.arguments) == ("get_weather", '{"city":  "Paris"}')

    name, arguments, reasons = "", "", []
    async for chunk in await sdk.chat.completions.create(**fields, stream=True):
        [choice] = chunk.choices
        assert choice.delta.tool_calls is None
        if choice.delta.function_call is not None:
            name += choice.delta.function_call.name or ""
            arguments += choice.delta.function_call.arguments or ""
        reasons.append(choice.finish_reason)
    assert (name, arguments, reasons[-1]) == (call.name, call.arguments, "function_call")

    # The model is told the same either way.
    await sdk.chat.completions.create(model=MODEL, messages=QUESTION, tools=[WEATHER])  # type: ignore[list-item]
    assert prompt_of(engine, tokenizer) == old_prompt


async def test_a_conversation_in_the_old_way_is_told_as_one_in_the_new(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    called = {"name": "get_weather", "arguments": '{"city":  "Paris"}'}
    old: Any = [
        *QUESTION,
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "get_weather", "content": "Rain."},
    ]
    new: Any = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "Rain."},
    ]
    engine.answer = lambda _: "It rains."
    tools: Any = [WEATHER]
    functions: Any = [FUNCTION]
    answer = await sdk.chat.completions.create(model=MODEL, messages=old, functions=functions)
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].message.function_call is None
    assert "function_call" not in answer.choices[0].message.model_fields_set
    old_prompt = prompt_of(engine, tokenizer)
    await sdk.chat.completions.create(model=MODEL, messages=new, tools=tools)
    assert prompt_of(engine, tokenizer) == old_prompt
    assert '"arguments": {"city":  "Paris"}' in old_prompt
    assert "<tool_response>\nRain.\n</tool_response>" in old_prompt


async def test_a_function_by_name_is_the_one_that_is_called(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: CALLS
    fields: Any = {"model": MODEL, "messages": QUESTION, "functions": [FUNCTION, CLOCK]}
    await sdk.chat.completions.create(**fields, function_call={"name": "get_weather"})
    by_old_name = engine.requests[-1].grammar
    tools: Any = [WEATHER, {"type": "function", "function": CLOCK}]
    await sdk.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
    )
    assert by_old_name is not None
    assert engine.requests[-1].grammar == by_old_name
    assert '"get_time"' in prompt_of(engine, tokenizer)

    answer = await sdk.chat.completions.create(**fields, function_call="none")
    assert engine.requests[-1].grammar is None
    assert "get_weather" not in prompt_of(engine, tokenizer)
    assert answer.choices[0].message.function_call is None
