"""What a request for a response may not say, each refused by its own name of it."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine, make_service
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.openai.body import parse_body
from cluster.openai.http import MAX_BODY_BYTES
from cluster.openai.responses import ResponseCall, messages_of
from cluster.openai.responses_schema import (
    NO_EFFECT_ON_RESPONSES,
    UNSUPPORTED_FOR_RESPONSES,
    ResponseRequest,
)
from cluster.router import create_app
from cluster.service import OpenAIService

MODEL = "Tiny/Tiny-Chat"
RESPONSES = "/v1/responses"
TOOL = {"type": "function", "name": "f"}


@pytest.fixture
def service_and_engine(tmp_path: Path) -> tuple[OpenAIService, FakeEngine]:
    return make_service(tmp_path)


@pytest.fixture
async def client(
    service_and_engine: tuple[OpenAIService, FakeEngine],
) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(create_app(service_and_engine[0]))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "You must provide input"),
    ({"input": []}, "input", "at least 1 item"),
    ({"input": 3}, "input", "a string or a list of items"),
    ({"input": [3]}, "input[0]", ""),
    ({"input": [user("x"), {"type": "item_reference", "id": "x"}]}, "input", "item 1 is of type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input", "'web_search_call'"),
    ({"input": [{"content": "x"}]}, "input", "item 0 is of type None"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "'wizard'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "You must provide"),
    ({"input": [user(3)]}, "input[0].content", "a string or a list of content parts"),
    (
        {"input": [user([{"type": "input_image", "image_url": "x"}])]},
        "input[0].content",
        "reads text only",
    ),
    (
        {"input": [user([{"type": "input_text", "text": "x"}, {"type": "input_file"}])]},
        "input[0].content",
        "part 1",
    ),
    ({"input": [user([{"type": "input_audio"}])]}, "input[0].content", "reads text only"),
    ({"input": [user([{"type": "input_text"}])]}, "input[0].content", 'no string "text"'),
    ({"input": [{**user("x"), "colour": "red"}]}, "input[0].colour", "Unrecognized"),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
        "input[0].call_id",
        "no such call",
    ),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "You must provide"),
    ({"model": None}, "model", "You must provide model"),
    ({"model": "other"}, "model", "does not exist"),
    ({"conversation": "conv_1"}, "conversation", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"truncation": "none"}, "truncation", "auto"),
    ({"messages": [user("x")]}, "messages", "Unrecognized"),
    ({"max_tokens": 3}, "max_tokens", "Unrecognized"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "Lower max_output_tokens to"),
    ({"input": "word " * CONTEXT_LENGTH}, "input", "Shorten the prompt"),
    ({"temperature": 3}, "temperature", "at most 2"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "top_logprobs", "needs include"),
    ({"include": ["file_search_call.results"]}, "include[0]", "message.output_text.logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools", "runs no tools of its own"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools", "runs no tools of its own"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "tools", "runs no tools of its own"),
    ({"tools": [{"type": "function", "name": "no blanks"}]}, "tools[0].name", ""),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "provide"),
    ({"tools": [TOOL, TOOL]}, "tools", "two functions of one name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "names g"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "g"}],
            },
        },
        "tool_choice",
        "allows g",
    ),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "json_schema"),
    (
        {"text": {"format": {"type": "json_schema"}}},
        "text.format.schema",
        "give text.format.schema",
    ),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
        "text.format",
        "text.format",
    ),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "low"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "auto"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "at most 16"),
    ({"metadata": {"x": "y" * 513}}, "metadata.x", "at most 512"),
    ({"metadata": {"x": 3}}, "metadata.x", "string"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options", "needs stream"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "Nothing is kept"),
]


@pytest.mark.parametrize(
    ("fields", "param", "message"), FAULTS, ids=[str(fields)[:60] for fields, _, _ in FAULTS]
)
async def test_a_fault_is_named_as_the_client_named_it(
    fields: dict[str, Any],
    param: str,
    message: str,
    client: httpx.AsyncClient,
    service_and_engine: tuple[OpenAIService, FakeEngine],
) -> None:
    for stream in (False, True):
        body = {"model": MODEL, "input": "Hello", "stream": stream, **fields}
        response = await client.post(RESPONSES, json=body)
        if stream and "stream_options" in fields:
            continue
        assert response.status_code in (400, 404), response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        assert message in error["message"]
    assert "stream_options" in fields or not service_and_engine[1].requests


@pytest.mark.parametrize(
    "fields",
    [
        {"truncation": "disabled", "background": False, "service_tier": "auto"},
        {"prompt_cache_key": "x", "safety_identifier": "y", "max_tool_calls": 3},
        {"tools": None, "text": {"verbosity": "medium", "format": None}, "reasoning": None},
        {"include": ["reasoning.encrypted_content"], "store": False, "metadata": None},
        {"input": [{"role": "developer", "content": "Be brief."}, user("Hi")]},
        {"input": [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
                   user("Hi")]},
    ],
)  # fmt: skip
async def test_what_asks_for_nothing_more_is_accepted(
    fields: dict[str, Any], client: httpx.AsyncClient
) -> None:
    body = {"model": MODEL, "input": "Hello", **fields}
    response = await client.post(RESPONSES, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", [b"", b"[]", b'{"input": NaN}', b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(
    content: bytes, client: httpx.AsyncClient
) -> None:
    response = await client.post(RESPONSES, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_that_is_too_large_is_not_read(client: httpx.AsyncClient) -> None:
    response = await client.post(RESPONSES, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413


def test_parts_of_a_turn_become_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thoughts = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}

    def said(text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"role": "assistant", "content": [part]}

    items = [
        {"role": "system", "content": "A."},
        {"role": "developer", "content": "B."},
        user([{"type": "input_text", "text": "One."}, {"type": "input_text", "text": "Two."}]),
        thoughts,
        said("X."),
        call,
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "d", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "2"}],
        },
        said("Y."),
        said("Z."),
        thoughts,
    ]
    body = ResponseRequest.model_validate({"model": MODEL, "input": items})
    function = {"name": "f", "arguments": "{}"}
    assert messages_of("I.", body.input) == [
        {"role": "system", "content": "I.\n\nA.\n\nB."},
        {"role": "user", "content": "One.\nTwo."},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "X.",
            "tool_calls": [
                {"id": "c", "type": "function", "function": function},
                {"id": "d", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "tool_call_id": "d", "content": "1"},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "Y."},
        {"role": "assistant", "content": "Z."},
        {"role": "assistant", "reasoning_content": "Hm.", "content": ""},
    ]
    # What another router reads of a call's origin is the same call.
    call_of = ResponseCall(body=body, past=body.input)
    again = ResponseCall.model_validate_json(
        call_of.model_dump_json(exclude_unset=True, by_alias=True)
    )
    assert again.chat == call_of.chat


def test_fields_that_are_refused_or_dropped_are_none_that_are_taken() -> None:
    named = {*NO_EFFECT_ON_RESPONSES, *UNSUPPORTED_FOR_RESPONSES}
    assert not named & set(ResponseRequest.model_fields)
    body = parse_body(
        ResponseRequest,
        b'{"model": "m", "input": "x", "user": "me", "store": false, "metadata": {"a": "b"}}',
        unsupported=UNSUPPORTED_FOR_RESPONSES,
        no_effect=NO_EFFECT_ON_RESPONSES,
    )
    assert (body.user, body.store, body.metadata) == ("me", False, {"a": "b"})


def many_keys() -> dict[str, Any]:
    return {str(number): "x" for number in range(10_000)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", [0] * 10_000),
        ("input", [{}] * 10_000),
        ("input", [{"role": "user"}] * 5_000),
        ("input", [{"role": "user", "content": "x", **many_keys()}]),
        ("input", [{"role": "user", "content": [0] * 10_000}]),
        ("input", [{"type": "reasoning", "content": [0] * 10_000}]),
        ("tools", [0] * 10_000),
        ("tools", [{"type": "function"}] * 500),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [0] * 10_000}),
        ("include", ["x"] * 10_000),
        ("metadata", many_keys()),
        ("text", many_keys()),
        ("reasoning", many_keys()),
        ("stop", [0] * 10_000),
    ],
)
def test_checking_a_body_ends_at_its_first_fault(field: str, value: Any) -> None:
    # All streams wait while a body is checked: thousands of faults may not be collected.
    with pytest.raises(ValidationError) as refusal:
        ResponseRequest.model_validate({"model": MODEL, "input": "Hello", field: value})
    # A choice among kinds tells one fault for each field of each of them.
    assert 1 <= len(refusal.value.errors()) <= 6


words = st.sampled_from(
    [
        *("message", "function_call", "function_call_output", "reasoning", "user", "assistant"),
        *("input_text", "output_text", "reasoning_text", "function", "c", "{}", "<think>"),
    ]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "call_id", "name", "arguments"])
            | st.sampled_from(["output", "id", "summary", "format", "schema", "effort", "tools"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
items = st.lists(
    st.fixed_dictionaries(
        {"type": words},
        optional=dict.fromkeys(
            ("role", "content", "call_id", "name", "arguments", "output", "id"), words | values
        ),
    ),
    max_size=5,
)


async def test_any_value_of_any_field_is_answered_or_refused(client: httpx.AsyncClient) -> None:
    bodies: list[dict[str, Any]] = []

    @settings(max_examples=120, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        changes=st.dictionaries(
            st.sampled_from(sorted(ResponseRequest.model_fields)), values, max_size=3
        ),
        asked=items | st.just("Hello"),
    )
    def collect(changes: dict[str, Any], asked: Any) -> None:
        bodies.append({"model": MODEL, "input": asked, **changes})

    collect()
    statuses = set()
    for body in bodies:
        response = await client.post(RESPONSES, json=body)
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert {200, 400} <= statuses
