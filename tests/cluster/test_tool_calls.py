"""Tools and thoughts over HTTP: what the model is told, and what clients make of its answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_templates import TOOLS_AND_THOUGHTS
from fake_engine import FakeEngine, make_service

from cluster.openai.effort import LOW_EFFORT_TOKENS, thinking_budget
from cluster.openai.schema import ChatCompletionRequest
from cluster.router import create_app
from engine.grammar import Grammar
from engine.text.tokenizer import Tokenizer, load_tokenizer

MODEL = "Tiny/Tiny-Chat"
CHAT = "/v1/chat/completions"
QUESTION: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALLS = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city":  "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Or\\u00e9"}}\n</tool_call>'
)


@pytest.fixture
def service_fields() -> dict[str, Any]:
    return {"chat_template_text": TOOLS_AND_THOUGHTS}


@pytest.fixture
def tokenizer(engine: FakeEngine, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tmp_path)


def prompt_of(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    prompt = engine.requests[-1].choices[0].prompt_token_ids
    return b"".join(map(tokenizer.token_bytes, prompt)).decode()


async def assemble(stream: Any) -> dict[str, Any]:
    """Put a streamed message together, as clients do."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    async for chunk in stream:
        [choice] = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        message["reasoning"] = message.get("reasoning", "") + (
            getattr(delta, "reasoning_content", None) or ""
        )
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index == len(message["tool_calls"])
                message["tool_calls"].append(
                    {
                        "id": call.id,
                        "type": call.type,
                        "function": {"name": call.function.name, "arguments": ""},
                    }
                )
            function = message["tool_calls"][call.index]["function"]
            function["arguments"] += call.function.arguments or ""
        message["finish_reason"] = choice.finish_reason
    return message


async def test_a_call_comes_whole_and_streamed_and_the_model_was_told_of_its_tools(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: CALLS
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER]}
    whole = (await sdk.chat.completions.create(**fields)).choices[0]
    assert json.dumps(WEATHER) in prompt_of(engine, tokenizer)
    assert engine.requests[0].grammar is None
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", "I look.")
    arguments = [call.function.arguments for call in whole.message.tool_calls or []]
    assert arguments == ['{"city":  "Paris"}', '{"city": "Or\\u00e9"}']

    streamed = await assemble(await sdk.chat.completions.create(**fields, stream=True))
    assert (streamed["finish_reason"], streamed["content"]) == ("tool_calls", "I look.")
    assert [call["function"]["arguments"] for call in streamed["tool_calls"]] == arguments
    ids = [call["id"] for call in streamed["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") for call_id in ids)


async def test_what_a_client_assembles_renders_to_the_tokens_that_were_generated(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: CALLS
    fields: Any = {"model": MODEL, "tools": [WEATHER]}
    stream = await sdk.chat.completions.create(**fields, messages=QUESTION, stream=True)
    message = await assemble(stream)
    first = engine.requests[0].choices[0].prompt_token_ids
    generated = [*tokenizer.encode(CALLS), tokenizer.special_tokens["<|im_end|>"]]

    del message["finish_reason"], message["reasoning"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}
        for call in message["tool_calls"]
    ]
    engine.answer = lambda _: "It rains."
    history: list[Any] = [*QUESTION, message, *results]
    answer = await sdk.chat.completions.create(**fields, messages=history)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        "It rains.",
        "stop",
    )
    second = engine.requests[1].choices[0].prompt_token_ids
    assert list(second[: len(first) + len(generated)]) == [*first, *generated]
    assert "<tool_response>\nRain.\n</tool_response>" in prompt_of(engine, tokenizer)


async def test_a_call_that_must_come_is_in_the_grammar(
    sdk: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER]}
    sources = []
    choice: Any
    asked = [("required", True), ("required", False), (named, True), (named, False)]
    for choice, parallel in asked:
        await sdk.chat.completions.create(
            **fields, tool_choice=choice, parallel_tool_calls=parallel
        )
        grammar = engine.requests[-1].grammar
        assert grammar is not None
        sources.append(grammar.source)
    # There is one function, which by name is called once.
    assert sources[0] != sources[1] == sources[2] == sources[3]
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    await sdk.chat.completions.create(model=MODEL, messages=QUESTION, tools=[strict])  # type: ignore[arg-type]
    assert engine.requests[-1].grammar is not None
    await sdk.chat.completions.create(**fields, tool_choice="none")
    assert engine.requests[-1].grammar is None


async def test_of_all_tools_that_are_told_some_may_be_allowed(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    clock: Any = {"type": "function", "function": {"name": "get_time"}}
    fields: Any = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER, clock]}

    async def grammar_for(tool_choice: Any, tools: Any = fields["tools"]) -> Grammar | None:
        await sdk.chat.completions.create(**{**fields, "tools": tools}, tool_choice=tool_choice)
        return engine.requests[-1].grammar

    def allowed(mode: str, *names: str) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    one = await grammar_for(allowed("required", "get_weather"))
    assert '"get_time"' in prompt_of(engine, tokenizer)
    assert one is not None
    assert one == await grammar_for("required", tools=[WEATHER])
    both = await grammar_for(allowed("required", "get_weather", "get_time"))
    assert both == await grammar_for("required")
    # No call has to come, but one of another tool must not.
    narrowed = await grammar_for(allowed("auto", "get_weather"))
    assert narrowed is not None
    assert "get_time" not in narrowed.source
    assert await grammar_for(allowed("auto", "get_time", "get_weather")) is None


async def test_tools_that_may_not_be_called_are_not_told(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: "<tool_call>\nis a mark"
    answer = await sdk.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice="none",
    )
    assert "get_weather" not in prompt_of(engine, tokenizer)
    assert answer.choices[0].message.content == "<tool_call>\nis a mark"
    assert "tool_calls" not in answer.choices[0].message.model_fields_set


async def test_thoughts_are_told_from_the_answer(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: "<think>\nParis is wet.\n</think>\n\nIt rains."
    fields: dict[str, Any] = {"model": MODEL, "messages": QUESTION}
    whole = (await sdk.chat.completions.create(**fields)).choices[0]
    assert whole.message.content == "It rains."
    assert whole.message.model_extra == {
        "reasoning_content": "Paris is wet.",
        "reasoning": "Paris is wet.",
    }
    streamed = await assemble(await sdk.chat.completions.create(**fields, stream=True))
    assert (streamed["content"], streamed["reasoning"]) == ("It rains.", "Paris is wet.")

    # Who does not want any has them not, and a text that looks like some stays what it is.
    fields["extra_body"] = {"enable_thinking": False}
    plain = (await sdk.chat.completions.create(**fields)).choices[0]
    assert prompt_of(engine, tokenizer).endswith("<think>\n\n</think>\n\n")
    assert plain.message.content == "<think>\nParis is wet.\n</think>\n\nIt rains."


@pytest.mark.parametrize(
    ("template", "effort", "end"),
    [
        (TOOLS_AND_THOUGHTS, "none", "<think>\n\n</think>\n\n"),
        (TOOLS_AND_THOUGHTS, "minimal", "<think>\n\n</think>\n\n"),
        (TOOLS_AND_THOUGHTS, "medium", "assistant\n"),
        (TOOLS_AND_THOUGHTS, "xhigh", "assistant\n"),
        ("{{ messages[0].content }} assistant\n", "none", "assistant"),
        (None, "none", "assistant\n"),
        ("{{ messages[0].content }} ({{ reasoning_effort }})", "high", " (high)"),
        ("{{ messages[0].content }}<think>", "high", "<think>"),
        ("{{ messages[0].content }}<think>", "none", "always thinks"),
        ("{{ messages[0].content }}", "high", "does not think"),
        (None, "low", "does not think"),
    ],
    ids=range(11),
)
async def test_how_much_is_thought_goes_by_what_the_template_knows(
    template: str | None, effort: str, end: str, tmp_path: Path
) -> None:
    service, engine = make_service(tmp_path, chat_template_text=template)
    transport = httpx.ASGITransport(create_app(service))
    body = {"model": MODEL, "messages": QUESTION, "reasoning_effort": effort}
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post(CHAT, json=body)
    if response.status_code == 200:
        assert prompt_of(engine, load_tokenizer(tmp_path)).endswith(end)
    else:
        assert response.json()["error"]["param"] == "reasoning_effort"
        assert end in response.json()["error"]["message"]


async def test_little_effort_bounds_thoughts_unless_the_client_sets_a_bound() -> None:
    def budget(source: str = "{% if enable_thinking %}", **fields: Any) -> int | None:
        body = ChatCompletionRequest.model_validate(
            {"model": MODEL, "messages": QUESTION, **fields}
        )
        return thinking_budget(body, source)

    assert budget(reasoning_effort="low") == LOW_EFFORT_TOKENS
    assert budget(reasoning_effort="low", thinking_budget=7) == 7
    assert budget(reasoning_effort="high") is None
    assert budget("{{ reasoning_effort }}", reasoning_effort="low") is None


async def test_log_probabilities_come_beside_calls(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: CALLS
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [WEATHER],
        "logprobs": True,
    }
    whole = (await sdk.chat.completions.create(**fields)).choices[0]
    assert whole.logprobs is not None
    assert "".join(token.token for token in whole.logprobs.content or []) == CALLS
    spelled = ""
    async for chunk in await sdk.chat.completions.create(**fields, stream=True):
        logprobs = chunk.choices[0].logprobs
        tokens = logprobs.content if logprobs is not None else None
        spelled += "".join(token.token for token in tokens or [])
    assert spelled == CALLS


async def test_qwen1_is_told_of_tools_and_their_results_in_the_turns_of_a_chat(
    tmp_path: Path,
) -> None:
    # ChatML's tokens and no template make ChatML, as Qwen1's checkpoints do.
    service, engine = make_service(tmp_path, chat_template_text=None)
    engine.info = replace(engine.info, context_length=4096)
    tokenizer = load_tokenizer(tmp_path)
    engine.answer = lambda _: (
        'Thought: I look.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation: '
        "made up"
    )
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        body: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER]}
        [choice] = (await client.post(CHAT, json=body)).raise_for_status().json()["choices"]
        prompt = prompt_of(engine, tokenizer)
        assert json.dumps(WEATHER["function"]["parameters"]) in prompt
        assert prompt.endswith(
            "Question: How is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Thought: I look.\n"
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}

        engine.answer = lambda _: " I now know the final answer.\nFinal Answer: It rains."
        result = {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}
        body["messages"] = [*QUESTION, choice["message"], result]
        [choice] = (await client.post(CHAT, json=body)).raise_for_status().json()["choices"]
        assert prompt_of(engine, tokenizer).endswith(
            "<|im_start|>assistant\nThought: I look.\nAction: get_weather\n"
            'Action Input: {"city": "Paris"}\nObservation: Rain.\nThought:'
        )
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"].endswith("It rains.")
