"""The Responses API as OpenAI's client sees it: answers, events, calls, thoughts, conversations."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine, make_service
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from tiny_tokenizer import GENERATION_PROMPT

from cluster.openai.event_id import parse_event_id
from cluster.openai.generation import ShownToken
from cluster.openai.response_output import TextTokens
from cluster.openai.responses import ResponseCall
from cluster.openai.responses_schema import ResponseRequest
from cluster.service import OpenAIService
from engine.errors import EngineDiedError
from engine.grammar import Grammar, json_schema_source
from engine.request import TokenLogprobs
from engine.text.tokenizer import Tokenizer, load_tokenizer

MODEL = "Tiny/Tiny-Chat"
RESPONSES = "/v1/responses"
# A model that knows tools and thoughts, and writes thoughts of the past.
TEMPLATE = (
    """\
{%- for tool in tools or [] %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""
    + GENERATION_PROMPT
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": None,
}
THOUGHTS = "Paris: is it wet?"
SAID = "I look."
ARGUMENTS = ('{"city":  "Paris"}', '{"city": "Or\\u00e9"}')
ANSWER = f"<think>\n{THOUGHTS}\n</think>\n\n{SAID}" + "".join(
    f'\n<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'
    for arguments in ARGUMENTS
)
TIMEOUT_S = 20
LOGPROBS = TokenLogprobs(logprob=-0.5, rank=1, top_token_ids=(), top_logprobs=())
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def service_and_engine(tmp_path: Path) -> tuple[OpenAIService, FakeEngine]:
    return make_service(tmp_path, chat_template_text=TEMPLATE)


@pytest.fixture
def tokenizer(service_and_engine: tuple[OpenAIService, FakeEngine], tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tmp_path)


@pytest.fixture
async def client(url: str) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def prompt_of(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    prompt = engine.requests[-1].choices[0].prompt_token_ids
    return b"".join(map(tokenizer.token_bytes, prompt)).decode()


async def events_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's events, each of which the client's own types allow, in the order they promise."""
    async with httpx.AsyncClient(base_url=url) as client:
        response = await client.post(RESPONSES, json={"model": MODEL, "stream": True, **body})
    assert response.status_code == 200, response.text
    return read_events(response.text)


def read_events(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        event = json.loads(fields["data"])
        assert fields["event"] == event["type"]
        _EVENTS.validate_python(event)
        events.append(event)
    return events


def check_order(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together, and hold each of its events to those before it.

    Returns:
        The response at its end.
    """
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    first, second, *middle, last = events
    assert (first["type"], second["type"]) == ("response.created", "response.in_progress")
    assert first["response"] == second["response"]
    assert first["response"]["status"] == "in_progress"
    items: list[dict[str, Any]] = []
    open_item: dict[str, Any] | None = None
    text = ""
    for event in middle:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_item is None
            open_item, text = event["item"], ""
            assert event["output_index"] == len(items)
            continue
        assert open_item is not None
        if kind == "response.output_item.done":
            assert event["item"]["id"] == open_item["id"]
            assert event["output_index"] == len(items)
            items.append(event["item"])
            open_item = None
            continue
        assert (event["item_id"], event["output_index"]) == (open_item["id"], len(items))
        if kind.endswith(".delta"):
            text += event["delta"]
        elif kind == "response.content_part.done":
            assert event["part"]["text"] == text
        elif kind.endswith(".done"):
            assert event.get("text", event.get("arguments")) == text
    assert open_item is None
    assert last["response"]["output"] == items
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["id"] == first["response"]["id"]
    return last["response"]


def without_identity(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to one request have in common."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    mine = ("id", "created_at", "completed_at", "output")
    return {**{k: v for k, v in response.items() if k not in mine}, "output": output}


async def test_a_text_comes_whole_and_says_what_it_was_made_with(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    answer = await client.responses.create(
        model=MODEL,
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=20,
        temperature=0.5,
        metadata={"team": "red"},
        user="me",
    )
    assert (answer.output_text, answer.status, answer.error) == (
        "Once upon a time",
        "completed",
        None,
    )
    assert prompt_of(engine, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    sampling = engine.requests[0].choices[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 20)
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 1.0, 20)
    assert (answer.instructions, answer.metadata, answer.user) == (
        "Be brief.",
        {"team": "red"},
        "me",
    )
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(engine.requests[0].choices[0].prompt_token_ids)
    # The end token is among them.
    assert usage.output_tokens == len(tokenizer.encode("Once upon a time")) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.output_tokens_details.reasoning_tokens == 0
    Response.model_validate(answer.model_dump())
    assert (answer.output[0].id or "").startswith("msg_")
    assert answer.id == engine.requests[0].request_id
    assert answer.id.startswith("resp_")


async def test_a_stream_has_the_items_of_the_whole_object_in_order(
    url: str, client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.answer = lambda _: ANSWER
    body: dict[str, Any] = {"input": "How is the weather in Paris?", "tools": [WEATHER]}
    whole = json.loads((await client.responses.with_raw_response.create(model=MODEL, **body)).text)
    events = await events_of(url, body)
    streamed = check_order(events)
    assert without_identity(streamed) == without_identity(whole)
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    thoughts, message, *calls = whole["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": THOUGHTS}]
    assert [part["text"] for part in message["content"]] == [SAID]
    assert [call["arguments"] for call in calls] == list(ARGUMENTS)
    assert len({call["call_id"] for call in calls}) == 2
    assert {item["status"] for item in whole["output"]} == {"completed"}
    reasoning_tokens = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert 0 < reasoning_tokens < whole["usage"]["output_tokens"]
    # More than one piece each: a stream that sends all at its end is none.
    for kind in ("reasoning_text", "output_text", "function_call_arguments"):
        deltas = [each for each in events if each["type"] == f"response.{kind}.delta"]
        assert len(deltas) > 2, kind


async def test_an_answer_without_text_is_an_empty_message(url: str, engine: FakeEngine) -> None:
    engine.answer = lambda _: ""
    [message] = check_order(await events_of(url, {"input": "Hello"}))["output"]
    assert [part["text"] for part in message["content"]] == [""]


async def test_a_client_takes_a_call_and_gives_its_output(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: ANSWER
    conversation: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    first = await client.responses.create(
        model=MODEL,
        input=conversation,
        tools=[WEATHER],  # type: ignore[list-item]
    )
    conversation += first.output
    conversation += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "Rain."}
        for item in first.output
        if item.type == "function_call"
    ]
    generated = prompt_of(engine, tokenizer) + ANSWER
    engine.answer = lambda _: "It rains."
    second = await client.responses.create(
        model=MODEL,
        input=conversation,
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.output_text == "It rains."
    # The very text that was generated, so the prefix cache knows it.
    assert prompt_of(engine, tokenizer) == (
        generated
        + "<|im_end|>\n"
        + 2 * "<|im_start|>tool\nRain.<|im_end|>\n"
        + "<|im_start|>assistant\n"
    )


async def test_a_response_goes_on_with_the_one_before(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.answer = lambda _: ANSWER
    first = await client.responses.create(
        model=MODEL,
        input="How is it in Paris?",
        instructions="Be brief.",
        tools=[WEATHER],  # type: ignore[list-item]
    )
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "Rain."}
        for item in first.output
        if item.type == "function_call"
    ]
    engine.answer = lambda _: "It rains."
    second = await client.responses.create(
        model=MODEL, previous_response_id=first.id, input=outputs
    )
    third = await client.responses.create(
        model=MODEL, previous_response_id=second.id, input="Sure?", instructions="Be long."
    )
    assert third.previous_response_id == second.id
    # The instructions are each request's own.
    assert prompt_of(engine, tokenizer) == (
        "<|im_start|>system\nBe long.<|im_end|>\n"
        "<|im_start|>user\nHow is it in Paris?<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
        + 2 * "<|im_start|>tool\nRain.<|im_end|>\n"
        + "<|im_start|>assistant\nIt rains.<|im_end|>\n"
        + "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    # What a response was gone on from may be deleted: each has its whole conversation.
    await client.responses.delete(first.id)
    await client.responses.create(model=MODEL, previous_response_id=second.id, input="Sure?")


async def test_a_conversation_that_is_too_long_loses_its_first_turns(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    turns = [f"<{number}> {'word ' * 20}" for number in range(12)]
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
    items: list[Any] = [{"role": "developer", "content": "Be kind."}]
    for turn in turns:
        output = {"type": "function_call_output", "call_id": "c", "output": turn}
        items += [{"role": "user", "content": turn}, call, output]
    asked: dict[str, Any] = {"model": MODEL, "input": items, "instructions": "Be brief."}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**asked)
    assert refused.value.code == "context_length_exceeded"

    async def kept(max_output_tokens: int) -> int:
        response = await client.responses.create(
            **asked, truncation="auto", max_output_tokens=max_output_tokens
        )
        assert response.truncation == "auto"
        prompt = prompt_of(engine, tokenizer)
        num_tokens = len(engine.requests[-1].choices[0].prompt_token_ids)
        head = "<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n<|im_start|>user\n"
        assert prompt.startswith(head)
        left = [turn for turn in turns if turn in prompt]
        assert left == turns[-len(left) :]
        assert prompt.removeprefix(head).startswith(left[0])
        room = CONTEXT_LENGTH - max_output_tokens
        # One more would not have fitted.
        assert num_tokens <= room < num_tokens + num_tokens // len(left)
        return len(left)

    assert await kept(1) > await kept(200) > 0
    # The whole of it is kept all the same.
    response = await client.responses.create(**asked, truncation="auto")
    pages = client.responses.input_items.list(response.id, limit=100)
    assert len([item async for item in pages]) == len(items)
    # A single turn that is too long stays so.
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=MODEL, input="word " * 2000, truncation="auto")
    assert refused.value.code == "context_length_exceeded"


class Weather(BaseModel):
    city: str
    degrees: int


async def test_an_answer_is_parsed_as_the_client_s_own_type(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.answer = lambda _: '{"city": "Paris", "degrees": 7}'
    answer = await client.responses.parse(model=MODEL, input="Paris?", text_format=Weather)
    assert answer.output_parsed == Weather(city="Paris", degrees=7)
    grammar = engine.requests[0].grammar
    schema = json.loads(answer.text.model_dump_json(by_alias=True))["format"]["schema"]  # type: ignore[union-attr]
    assert schema["required"] == ["city", "degrees"]
    assert grammar == Grammar(json_schema_source(schema, param=""))

    await client.responses.create(
        model=MODEL, input="Paris?", text={"format": {"type": "json_object"}}
    )
    assert engine.requests[1].grammar == Grammar(json_schema_source({"type": "object"}, param=""))
    await client.responses.create(model=MODEL, input="Paris?", text={"format": {"type": "text"}})
    assert engine.requests[2].grammar is None


async def test_a_stream_is_read_by_the_client_s_helper(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.answer = lambda _: ANSWER
    async with client.responses.stream(
        model=MODEL,
        input="Hello",
        tools=[WEATHER],  # type: ignore[list-item]
    ) as stream:
        arguments = {}
        async for event in stream:
            if event.type == "response.function_call_arguments.delta":
                arguments[event.output_index] = event.snapshot
        final = await stream.get_final_response()
    assert final.output_text == SAID
    assert list(arguments.values()) == list(ARGUMENTS)


@pytest.mark.parametrize(
    ("effort", "end", "budget"),
    [
        ("none", "</think>\n\n", None),
        ("minimal", "</think>\n\n", None),
        ("low", "assistant\n", 1024),
        ("medium", "assistant\n", None),
        ("high", "assistant\n", None),
        (None, "assistant\n", None),
    ],
)
async def test_effort_says_whether_and_how_much_is_thought(
    effort: Any,
    end: str,
    budget: int | None,
    client: openai.AsyncOpenAI,
    engine: FakeEngine,
    tokenizer: Tokenizer,
) -> None:
    body: dict[str, Any] = {"model": MODEL, "input": "Hello"}
    body["reasoning"] = {"effort": effort, "summary": "auto"}
    answer = await client.responses.create(**body)
    assert prompt_of(engine, tokenizer).endswith(end)
    assert answer.reasoning is not None
    assert answer.reasoning.effort == effort
    assert ResponseCall(body=ResponseRequest(**body)).chat.thinking_budget == budget
    # What is said outright goes before it.
    body |= {"enable_thinking": True, "thinking_budget": 7}
    chat = ResponseCall(body=ResponseRequest(**body)).chat
    assert (chat.enable_thinking, chat.thinking_budget) == (True, 7)


async def test_what_tools_may_be_called_reaches_the_engine(
    client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    other = {**WEATHER, "name": "get_time"}
    tools: Any = [WEATHER, other]
    grammars = []
    choices: list[Any] = [
        "none",
        "auto",
        "required",
        {"type": "function", "name": "get_time"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_time"}],
        },
    ]
    for choice in choices:
        answer = await client.responses.create(
            model=MODEL, input="Hello", tools=tools, tool_choice=choice
        )
        echoed = json.loads(answer.model_dump_json())["tool_choice"]
        assert echoed == choice
        grammar = engine.requests[-1].grammar
        grammars.append(grammar.source if grammar is not None else None)
        assert ("get_weather" in prompt_of(engine, tokenizer)) == (choice in choices[1:4])
    assert grammars[:2] == [None, None]
    assert "get_weather" in (grammars[2] or "")
    by_name, among_allowed = grammars[3:]
    assert "get_weather" not in (by_name or "get_weather")
    assert "get_weather" not in (among_allowed or "get_weather")
    # A function by name is called once.
    assert by_name != among_allowed


@pytest.mark.parametrize(
    ("answer", "num_left_out", "num_items"),
    [("Once upon a time", 2, 1), (ANSWER, 20, 4), (f"<think>\n{THOUGHTS}", 4, 1)],
)
async def test_an_answer_that_is_cut_says_so(
    answer: str,
    num_left_out: int,
    num_items: int,
    url: str,
    engine: FakeEngine,
    tokenizer: Tokenizer,
) -> None:
    engine.answer = lambda _: answer
    length = len(tokenizer.encode(answer)) - num_left_out
    body = {"input": "Hello", "tools": [WEATHER], "max_output_tokens": length}
    response = check_order(await events_of(url, body))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    statuses = [item["status"] for item in response["output"]]
    assert statuses == ["completed"] * (num_items - 1) + ["incomplete"]
    assert response["usage"]["output_tokens"] == length


async def test_the_texts_own_tokens_have_log_probabilities(
    url: str, client: openai.AsyncOpenAI, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    # The thoughts say the same as the text, and a mark begins that is none.
    engine.answer = lambda _: f"<think>\n{SAID}\n</think>\n\n{SAID} 日本 <tool> é"
    body: dict[str, Any] = {
        "input": "Hello",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "tools": [WEATHER],
    }
    answer = await client.responses.create(model=MODEL, **body)
    message = answer.output[1]
    assert message.type == "message"
    [part] = message.content
    assert part.type == "output_text"
    spelled = b"".join(bytes(token.bytes) for token in part.logprobs or [])
    assert spelled.decode() == part.text == f"{SAID} 日本 <tool> é"
    assert {len(token.top_logprobs) for token in part.logprobs or []} == {2}

    response = check_order(events := await events_of(url, body))
    streamed = [
        token
        for event in events
        if event["type"] == "response.output_text.delta"
        for token in event["logprobs"]
    ]
    assert streamed == response["output"][1]["content"][0]["logprobs"]
    assert b"".join(bytes(token["bytes"]) for token in streamed) == spelled


def test_bytes_that_are_no_text_keep_their_tokens(tokenizer: Tokenizer) -> None:
    first_half = next(i for i in range(300) if tokenizer.token_bytes(i) == b"\xc3")
    tokens = TextTokens(tokenizer)
    tokens.push([ShownToken(token_id=first_half, logprobs=LOGPROBS)])
    assert tokens.take("\N{REPLACEMENT CHARACTER}") is None
    assert [token.bytes for token in tokens.take_all()] == [[0xC3]]
    assert tokens.take_all() == []


async def test_a_failure_amid_a_stream_is_its_last_event(
    url: str, client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.failure = (3, EngineDiedError("A host died."))
    response = check_order(events := await events_of(url, {"input": "Hello"}))
    assert response["error"] == {"code": "server_error", "message": "A host died."}
    assert [item["status"] for item in response["output"]] == ["incomplete"]
    assert events[-1]["type"] == "response.failed"
    # Who asks again sees what became of it.
    assert (await client.responses.retrieve(response["id"])).status == "failed"

    engine.failure = (3, ZeroDivisionError("inside"))
    response = check_order(await events_of(url, {"input": "Hello"}))
    assert "inside" not in json.dumps(response)

    # Before the first event, and for a whole answer, it is the status.
    for deltas, stream in ((0, True), (3, False)):
        engine.failure = (deltas, EngineDiedError("A host died."))
        with pytest.raises(openai.InternalServerError) as raised:
            await client.responses.create(model=MODEL, input="Hello", stream=stream)
        assert raised.value.status_code == 503


async def test_a_grammar_that_leads_no_further_fails_the_response(
    url: str, engine: FakeEngine
) -> None:
    engine.has_failing_grammar = True
    response = check_order(await events_of(url, {"input": "Hello"}))
    assert response["error"]["code"] == "invalid_prompt"


async def test_a_stream_that_is_closed_early_ends_the_engines_request(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    # The engine goes no further than it is let.
    engine.steps = asyncio.Semaphore(2)
    stream = await client.responses.create(model=MODEL, input="Hello", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    async with asyncio.timeout(TIMEOUT_S):
        await engine.has_closed.wait()
    assert engine.closed_early == [engine.requests[0].request_id]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(engine.requests[0].request_id)


async def test_a_stream_goes_on_after_any_of_its_events(url: str, engine: FakeEngine) -> None:
    engine.answer = lambda _: ANSWER
    async with httpx.AsyncClient(base_url=url) as client:
        body = {"model": MODEL, "input": "Hello", "stream": True, "tools": [WEATHER]}
        whole = (await client.post(RESPONSES, json=body)).text
        events = read_events(whole)
        response = check_order(events)
        kept = whole.split("\n\n")[: len(events)]
        ids = [
            (number, block.splitlines()[0].removeprefix("id: "))
            for number, block in enumerate(kept)
            if block.startswith("id: ")
        ]
        assert len(ids) > 20
        for number, last_id in [(-1, None), *ids[:3], *ids[20:22], *ids[-3:-1]]:
            # The engine had come two tokens further when the connection broke.
            sent = parse_event_id(last_id).sent[0] if last_id is not None else None
            [past] = engine.records[response["id"]].past
            del past.token_ids[(sent.num_tokens if sent is not None else 0) + 2 :]
            past.finish_reason = past.stop_token_id = None
            headers = {} if last_id is None else {"Last-Event-ID": last_id}
            rest = await client.get(f"/v1/streams/{response['id']}", headers=headers)
            assert rest.status_code == 200, rest.text
            both = [*events[: number + 1], *read_events(rest.text)]
            ended = check_order(both)
            assert ended["output"] == response["output"]
            assert ended["usage"] == response["usage"]
        # Who has the last event has all.
        headers = {"Last-Event-ID": ids[-1][1]}
        rest = await client.get(f"/v1/streams/{response['id']}", headers=headers)
        assert (rest.status_code, rest.text) == (200, "")
