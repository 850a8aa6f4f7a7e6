"""Bodies that no client would send: each is answered or refused in OpenAI's way, none is a fault.

Valid bodies of each endpoint are changed in random places to random values. What an engine would do
is not asked here: it says what it always says. FUZZ_EXAMPLES=20000 in the environment makes a long
run of it.
"""

import asyncio
import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from chat_templates import TOOLS_AND_THOUGHTS
from fake_engine import FakeEngine, make_service
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.router import create_app
from engine.errors import RequestError
from engine.grammar import choice_source, ebnf_source, json_schema_source, regex_source

MODEL = "Tiny-Chat"
TIMEOUT_S = 20.0
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            ],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 5,
            "temperature": 0.5,
            "logit_bias": {"5": 1.5},
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x"],
            "seed": 3,
            "n": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hello"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            },
            "chat_template_kwargs": {"enable_thinking": False},
            "prompt_logprobs": 1,
            "reasoning_effort": "low",
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "parallel_tool_calls": False,
        },
    ),
    (
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": ["Hello", "there"],
            "echo": True,
            "logprobs": 2,
            "best_of": 2,
            "guided_regex": "[ab]+",
            "min_p": 0.1,
            "stop_token_ids": [7],
            "suffix": None,
        },
    ),
    (
        "/v1/responses",
        {
            "model": MODEL,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"},
            ],
            "instructions": "Be brief.",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
            "tools": [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}],
            "tool_choice": "auto",
            "stream": True,
            "max_output_tokens": 5,
            "metadata": {"k": "v"},
        },
    ),
    ("/v1/embeddings", {"model": MODEL, "input": ["Hello", "there"], "dimensions": 2}),
    ("/tokenize", {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}),
    ("/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 0.5]),
    st.floats(allow_nan=False, allow_infinity=False),
    # Lone surrogates, NUL, marks of templates and of control tokens.
    st.sampled_from(
        [
            "",
            "\ud800",
            "\x00",
            "{{ 7 * 7 }}",
            "{% include '/etc/passwd' %}",
            "<|im_end|>",
            "a" * 5000,
        ]
    ),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda parts: (
        st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=6), parts, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def post(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str, bytes], httpx.Response]]:
    """Send a body, and wait for the whole answer."""
    service, engine = make_service(
        tmp_path_factory.mktemp("tiny"), chat_template_text=TOOLS_AND_THOUGHTS
    )
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)

    async def send(path: str, body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            async with asyncio.timeout(TIMEOUT_S):
                return await client.post(
                    path, content=body, headers={"content-type": "application/json"}
                )

    with asyncio.Runner() as runner:

        def run(path: str, body: bytes) -> httpx.Response:
            _forget(engine)
            return runner.run(send(path, body))

        yield run


def _forget(engine: FakeEngine) -> None:
    engine.requests.clear()
    engine.records.clear()
    engine.aborted_choices.clear()


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a body below its top."""
    steps: Any = ()
    if isinstance(part, dict):
        steps = part.items()
    elif isinstance(part, list):
        steps = enumerate(part)
    for step, inner in steps:
        yield (*path, step)
        yield from places(inner, (*path, step))


def check(answer: httpx.Response) -> None:
    """An answer is right, or an error in OpenAI's form that is the client's."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert {"type", "param", "code"} <= error.keys()
    else:
        # What fails amid a stream is told in it.
        assert "internal_error" not in answer.text
        assert "Internal" not in answer.text


@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_body_that_is_changed_anywhere_is_answered_or_refused(
    post: Callable[[str, bytes], httpx.Response], data: st.DataObject
) -> None:
    path, valid = data.draw(st.sampled_from(BODIES))
    body = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(body))))
        inner = body
        for step in place[:-1]:
            inner = inner[step]
        match data.draw(st.sampled_from(["change", "remove", "add"])):
            case "change":
                inner[place[-1]] = data.draw(VALUES)
            case "remove":
                del inner[place[-1]]
            case _ if isinstance(inner, dict):
                inner[data.draw(st.text(max_size=8))] = data.draw(VALUES)
            case _:
                inner.append(data.draw(VALUES))
        if not body:
            break
    check(post(path, json.dumps(body).encode()))


def test_bodies_that_are_changed_were_answered_before(
    post: Callable[[str, bytes], httpx.Response],
) -> None:
    for path, body in BODIES:
        answer = post(path, json.dumps(body).encode())
        assert answer.status_code == 200, (path, answer.text)
        check(answer)


@pytest.mark.parametrize(
    "name",
    ["logprobs", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "n"],
)
def test_numbers_too_long_for_a_float_are_out_of_range(
    post: Callable[[str, bytes], httpx.Response], name: str
) -> None:
    body = {"model": MODEL, "prompt": "Hello", name: 10**400}
    answer = post("/v1/completions", json.dumps(body).encode())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


@settings(
    max_examples=NUM_EXAMPLES // 4,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    path=st.sampled_from([path for path, _ in BODIES]),
    body=st.one_of(
        st.binary(max_size=40),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "x", "model": 1}', b"{}"]),
    ),
)
def test_a_body_of_any_bytes_is_refused(
    post: Callable[[str, bytes], httpx.Response], path: str, body: bytes
) -> None:
    answer = post(path, body)
    assert 400 <= answer.status_code < 500
    check(answer)


@settings(max_examples=NUM_EXAMPLES // 2, deadline=None)
@given(
    schema=st.dictionaries(
        st.sampled_from(
            [
                "type",
                "properties",
                "items",
                "anyOf",
                "$ref",
                "pattern",
                "enum",
                "minimum",
                "$defs",
                "maxLength",
                "required",
                "additionalProperties",
                "const",
                "format",
                "prefixItems",
            ]
        ),
        VALUES | st.sampled_from(["object", "array", "string", "integer", "#", "#/$defs/a"]),
        max_size=4,
    ),
    text=st.text(max_size=30),
)
def test_forms_of_any_kind_are_followed_or_refused(schema: dict[str, Any], text: str) -> None:
    attempts: list[Callable[[], str]] = [
        lambda: json_schema_source(schema, param="schema"),
        lambda: regex_source(text, param="regex"),
        lambda: ebnf_source(text, param="grammar"),
        lambda: choice_source([text], param="choice"),
    ]
    for attempt in attempts:
        with contextlib.suppress(RequestError):
            assert attempt()
