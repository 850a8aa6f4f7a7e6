"""What is wrong with a request comes back in OpenAI's words; nothing a client sends is a 5xx."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine, make_service
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.openai.http import MAX_BODY_BYTES
from cluster.openai.schema import ChatCompletionRequest, CompletionRequest
from cluster.router import create_app
from cluster.service import OpenAIService

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODEL = "Tiny/Tiny-Chat"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def service_fields() -> dict[str, Any]:
    return {"hold_timeout_s": 0.05}


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


async def test_a_client_whose_leaving_serve_would_not_tell_is_refused(
    client: httpx.AsyncClient,
) -> None:
    body = {"model": MODEL, "messages": HELLO}
    name = "x-request-disconnect-disabled"
    response = await client.post(CHAT, json=body, headers={name: "?1"})
    assert response.status_code == 400
    assert error_of(response)["param"] == name


def to_json(body: dict[str, Any]) -> str:
    # Python writes 1e400 as Infinity, which is not JSON.
    return json.dumps(body).replace("Infinity", "1e400")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b"3", "must be a JSON object, not a number"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_body_that_is_no_json_object_is_refused(
    path: str, content: bytes, message: str, client: httpx.AsyncClient
) -> None:
    response = await client.post(path, content=content)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [function(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


TEXT_PART = {"type": "text", "text": "Look:"}

CHAT_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "You must provide messages"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [3]}, "messages[0]", "dict"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "You must provide"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "'wizard'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
    *(
        (
            {"messages": [{"role": "user", "content": [TEXT_PART, {"type": kind, kind: {}}]}]},
            "messages[0].content[1].type",
            f"'{kind}', but this model reads text only",
        )
        for kind in ("image_url", "input_audio", "file", "refusal", "video_url")
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content",
        "no string",
    ),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", "cannot begin"),
    ({"model": None}, "model", "You must provide model"),
    ({"model": 3}, "model", "string"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": "0.5"}, "temperature", "'0.5'"),
    ({"temperature": True}, "temperature", "True"),
    ({"temperature": 2.1}, "temperature", "at most 2"),
    ({"temperature": -0.1}, "temperature", "at least 0"),
    ({"temperature": 1e400}, "temperature", ""),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.01}, "top_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"top_k": 2**40}, "top_k", "at most"),
    ({"min_p": 2}, "min_p", "at most 1"),
    ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"seed": 2**70}, "seed", "at most"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -5}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than max_tokens"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
    ({"cache_salt": 7}, "cache_salt", "7"),
    ({"stop": 3}, "stop", "list"),
    ({"stop": [""]}, "stop[0]", "at least 1 character"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a" * 513]}, "stop[0]", "at most 512"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", "ids run from 0 to"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "ids run from 0 to"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "ids run from 0 to"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "Unrecognized"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "You must provide"),
    ({"tools": [{"type": "browser", "function": {"name": "a"}}]}, "tools[0].type", "'function'"),
    ({"tools": [function("a b")]}, "tools[0].function.name", "pattern"),
    ({"tools": [function("a")]}, "tools", "knows no tools"),
    ({"tools": [function("a")] * 2}, "tools", "of one name"),
    ({"tools": [function("a")] * 513}, "tools", "at most 512"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tool_choice": "always"}, "tool_choice", "required"),
    ({"tool_choice": {"type": "custom"}}, "tool_choice", "allowed_tools"),
    ({"tool_choice": {"type": ["function"]}}, "tool_choice", ""),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "You must provide"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice",
        "not among tools",
    ),
    ({"thinking_budget": -1}, "thinking_budget", "greater than or equal to 0"),
    ({"functions": [{}]}, "functions[0].name", "You must provide"),
    ({"functions": [{"name": "a"}]}, "tools", "knows no tools"),
    ({"functions": [{"name": "a"}], "tools": [function("a")]}, "functions", "do not go with"),
    ({"functions": [{"name": "a"}], "tool_choice": "none"}, "functions", "do not go with"),
    ({"functions": [{"name": "a"}] * 2}, "functions", "of one name"),
    ({"function_call": {"name": "a"}}, "function_call", "not among functions"),
    (
        {"function_call": {"name": "a"}, "tools": [function("a")]},
        "function_call",
        "do not go with",
    ),
    ({"function_call": "required"}, "function_call", "auto"),
    ({"tool_choice": allowed("required", "a")}, "tool_choice", "not among tools"),
    ({"tool_choice": allowed("none", "a")}, "tool_choice.allowed_tools.mode", "auto"),
    ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "at least 1"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "'function'"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"audio": {"voice": "a"}}, "audio", "not supported"),
    ({"moderation": {"model": "m"}}, "moderation", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"verbosity": "low"}, "verbosity", "not supported"),
    ({"reasoning_effort": "much"}, "reasoning_effort", "xhigh"),
    ({"best_of": 2}, "best_of", "Unrecognized"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "does not go with stream"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "cannot both be true",
    ),
    ({"continue_final_message": True}, "continue_final_message", "last one's role is user"),
    ({"topk": 4}, "topk", "Did you mean top_k?"),
    ({"colour": "red"}, "colour", "Unrecognized request argument"),
    (
        {"messages": [{**HELLO[0], "colour": "red"}]},
        "messages[0].colour",
        "supplied: messages[0].colour.",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set"),
]


@pytest.mark.parametrize(
    ("fault", "param", "message"), CHAT_FAULTS, ids=[str(fault[0])[:60] for fault in CHAT_FAULTS]
)
async def test_a_faulty_chat_request_names_the_field_at_fault(
    fault: dict[str, Any],
    param: str,
    message: str,
    client: httpx.AsyncClient,
    engine: FakeEngine,
) -> None:
    body = {"model": MODEL, "messages": HELLO, **fault}
    response = await client.post(CHAT, content=to_json(body))
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fault", "param", "message"),
    [
        ({"prompt": None}, "prompt", "You must provide prompt"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", 3]}, "prompt", "list of strings"),
        ({"prompt": {"a": 1}}, "prompt", "list of strings"),
        ({"prompt": [1, 10**6]}, "prompt", "ids run from 0 to"),
        ({"prompt": [-1]}, "prompt", "ids run from 0 to"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": True}, "best_of", "integer"),
        ({"best_of": 0}, "best_of", "greater than or equal to 1"),
        ({"best_of": 129}, "best_of", "less than or equal to 128"),
        ({"best_of": 2, "n": 3}, "best_of", "less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "does not go with stream"),
        ({"prompt": ["a"] * 600, "best_of": 2}, "prompt", "1200 choices"),
        ({"prompt_logprobs": 2, "stream": True}, "prompt_logprobs", "does not go with stream"),
        ({"messages": HELLO}, "messages", "Unrecognized"),
        ({"prompt": ["a"] * 1025}, "prompt", "1025 choices"),
    ],
)
async def test_a_faulty_completion_request_names_the_field_at_fault(
    fault: dict[str, Any], param: str, message: str, client: httpx.AsyncClient
) -> None:
    response = await client.post(COMPLETIONS, json={"model": MODEL, "prompt": "The", **fault})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param or str(error["param"]).startswith("prompt")
    assert message in error["message"]


def many_keys(prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{number}": "x" for number in range(10_000)}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionRequest, "prompt", [[0.5]] * 10_000),
        (CompletionRequest, "prompt", [[0.5] * 10_000]),
        (CompletionRequest, "prompt", [["a"]] * 100_000),
        (CompletionRequest, "prompt", [True, *[0.5] * 10_000]),
        (CompletionRequest, "stop", [0] * 10_000),
        (CompletionRequest, "stop_token_ids", [""] * 10_000),
        (CompletionRequest, "logit_bias", many_keys()),
        (CompletionRequest, "stream_options", many_keys()),
        (ChatCompletionRequest, "messages", [0] * 10_000),
        (ChatCompletionRequest, "messages", [{}] * 10_000),
        (ChatCompletionRequest, "messages", [{"role": "user", **many_keys()}]),
    ],
)
def test_checking_a_body_ends_at_its_first_fault(
    kind: type[ChatCompletionRequest | CompletionRequest], field: str, value: Any
) -> None:
    # All streams wait while a body is checked: thousands of faults may not be collected.
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate({"model": MODEL, "prompt": "The", "messages": HELLO, field: value})
    faults = [fault for fault in refusal.value.errors() if fault["loc"][0] == field]
    assert 1 <= len(faults) <= 2  # a union tells one fault for each of its kinds


@pytest.mark.parametrize(
    ("fault", "param"),
    [
        ({"x" * 100_000: 1}, "xxx"),
        (many_keys("field"), None),
        ({"logit_bias": {"x" * 100_000: ""}}, "logit_bias.xxx"),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]}, "messages[0]"),
        ({"messages": HELLO * 10_000}, "messages"),
        ({"temperature": [0] * 100_000}, "temperature"),
        ({"temperature": "x" * 100_000}, "temperature"),
    ],
)
async def test_an_answer_to_a_large_faulty_body_is_short(
    fault: dict[str, Any], param: str | None, client: httpx.AsyncClient
) -> None:
    response = await client.post(CHAT, json={"model": MODEL, "messages": HELLO, **fault})
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert str(error_of(response)["param"]).startswith(str(param))


async def test_fields_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient) -> None:
    body = {
        "model": MODEL,
        "messages": [
            *HELLO,
            {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": []},
            *HELLO,
        ],
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "prediction": {"type": "content", "content": "Hi"},
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "explicit"},
        "modalities": ["text"],
        "verbosity": "medium",
        "reasoning_effort": "medium",
        "functions": [],
        "function_call": "auto",
        "temperature": None,
        "stop": None,
        "n": None,
        "logit_bias": {},
    }
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200


async def test_what_clients_note_in_their_messages_is_accepted(client: httpx.AsyncClient) -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}
    call = {"id": "call_1", "type": "function", "function": function}
    body = {
        "model": MODEL,
        "messages": [
            *HELLO,
            {"role": "assistant", "content": None, "parsed": {"a": 1}, "tool_calls": [call]},
            {
                "role": "tool",
                "content": "21 degrees",
                "name": "f",
                "tool_call_id": "call_1",
                "id": "call_1",
                "extra": {"function_id": "call_1"},
            },
        ],
    }
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    for faulty in ([None], [{"function": None}], "call", [{"function": {"parsed_arguments": 1}}]):
        body["messages"][1]["tool_calls"] = faulty
        response = await client.post(CHAT, json=body)
        assert response.status_code == 400
        assert str(error_of(response)["param"]).startswith("messages[1].tool_calls")


async def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(
    client: httpx.AsyncClient,
) -> None:
    for length in (CONTEXT_LENGTH, CONTEXT_LENGTH + 1):
        response = await client.post(COMPLETIONS, json={"model": MODEL, "prompt": [1] * length})
        assert response.status_code == 400
        error = error_of(response)
        assert error["code"] == "context_length_exceeded"
        assert f"{length} tokens" in error["message"]
        assert f"{CONTEXT_LENGTH} tokens" in error["message"]
    response = await client.post(
        COMPLETIONS, json={"model": MODEL, "prompt": [1] * (CONTEXT_LENGTH - 1)}
    )
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 1


async def test_max_tokens_beyond_the_context_is_refused_with_what_would_fit(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(
        COMPLETIONS, json={"model": MODEL, "prompt": [1] * 500, "max_tokens": 13}
    )
    assert response.status_code == 400
    assert "together 513" in error_of(response)["message"]
    assert "to 12" in error_of(response)["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_unknown_model_is_not_found(path: str, client: httpx.AsyncClient) -> None:
    body = (
        {"model": "gpt-4", "messages": HELLO} if path == CHAT else {"model": "gpt-4", "prompt": "a"}
    )
    response = await client.post(path, json=body)
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "model_not_found"
    assert "Tiny-Chat" in error["message"]


async def test_an_unknown_route_and_a_wrong_method_are_told_in_openais_words(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/v1/engines")
    assert response.status_code == 404
    assert "/v1/engines" in error_of(response)["message"]
    response = await client.get(CHAT)
    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"
    assert "POST" in response.headers["allow"]


async def test_a_body_that_is_too_large_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert "bytes" in error_of(response)["message"]


async def test_a_base_model_takes_completions_but_no_chats(tmp_path: Path) -> None:
    service, engine = make_service(tmp_path)
    base = OpenAIService(
        config=service._config, tokenizer=service._text.tokenizer, template=None, engine=engine
    )
    transport = httpx.ASGITransport(create_app(base))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post(CHAT, json={"model": MODEL, "messages": HELLO})
        assert response.status_code == 400
        assert "--chat-template" in error_of(response)["message"]
        response = await client.post(COMPLETIONS, json={"model": MODEL, "prompt": "The"})
        assert response.status_code == 200


async def test_an_engine_that_is_not_ready_gives_503_and_says_why(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.info = replace(engine.info, is_ready=False, status="compile 7 of 12")
    response = await client.post(CHAT, json={"model": MODEL, "messages": HELLO})
    assert response.status_code == 503
    assert "compile 7 of 12" in error_of(response)["message"]
    assert int(response.headers["retry-after"]) > 0
    response = await client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["ranks"][0]["state"] == "ready"
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "starting", "detail": "compile 7 of 12"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", MODEL, "system"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("path", "kind", "valid"),
    [
        (CHAT, ChatCompletionRequest, {"model": MODEL, "messages": HELLO}),
        (COMPLETIONS, CompletionRequest, {"model": MODEL, "prompt": "The"}),
    ],
)
async def test_any_value_of_any_field_is_answered_or_refused(
    path: str,
    kind: type[ChatCompletionRequest | CompletionRequest],
    valid: dict[str, Any],
    client: httpx.AsyncClient,
) -> None:
    bodies: list[dict[str, Any]] = []

    @settings(max_examples=150, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        changes=st.dictionaries(
            st.sampled_from(sorted(kind.model_fields)), json_values, min_size=1, max_size=3
        )
    )
    def collect(changes: dict[str, Any]) -> None:
        bodies.append({**valid, **changes})

    collect()
    for body in bodies:
        response = await client.post(path, content=to_json(body))
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            error_of(response)
