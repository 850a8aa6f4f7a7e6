"""What clients may say of an answer's form, and what the engine is told of it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import TOOLS_AND_THOUGHTS
from fake_engine import FakeEngine, make_service

from cluster.router import create_app
from engine.grammar import (
    Grammar,
    GrammarCompiler,
    choice_source,
    ebnf_source,
    json_schema_source,
    regex_source,
)
from engine.text.tokenizer import load_tokenizer

MODEL = "Tiny/Tiny-Chat"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
ANY_OBJECT = {"type": "object"}
NO_BLANKS = "[ ]?"


SPELLINGS: list[tuple[dict[str, Any], str]] = [
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA},
            }
        },
        json_schema_source(SCHEMA, param=""),
    ),
    ({"guided_json": SCHEMA}, json_schema_source(SCHEMA, param="")),
    ({"guided_json": json.dumps(SCHEMA)}, json_schema_source(SCHEMA, param="")),
    ({"structured_outputs": {"json": SCHEMA}}, json_schema_source(SCHEMA, param="")),
    ({"json_schema": json.dumps(SCHEMA)}, json_schema_source(SCHEMA, param="")),
    ({"response_format": {"type": "json_object"}}, json_schema_source(ANY_OBJECT, param="")),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        json_schema_source(ANY_OBJECT, param=""),
    ),
    ({"structured_outputs": {"json_object": True}}, json_schema_source(ANY_OBJECT, param="")),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": NO_BLANKS}},
        json_schema_source(SCHEMA, param="", whitespace_pattern=NO_BLANKS),
    ),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": NO_BLANKS},
        json_schema_source(SCHEMA, param="", whitespace_pattern=NO_BLANKS),
    ),
    ({"guided_regex": "[ab]+"}, regex_source("[ab]+", param="")),
    ({"structured_outputs": {"regex": "[ab]+"}}, regex_source("[ab]+", param="")),
    ({"regex": "[ab]+"}, regex_source("[ab]+", param="")),
    ({"guided_choice": ["yes", "no"]}, choice_source(["yes", "no"], param="")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, choice_source(["yes", "no"], param="")),
    ({"guided_grammar": 'root ::= "a"'}, ebnf_source('root ::= "a"', param="")),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, ebnf_source('start: "a"', param="")),
    ({"ebnf": 'root ::= "a"'}, ebnf_source('root ::= "a"', param="")),
]


@pytest.mark.parametrize(
    ("fields", "source"), SPELLINGS, ids=[str(fields)[:50] for fields, _ in SPELLINGS]
)
async def test_the_engine_is_told_whichever_way_a_client_says_it(
    fields: dict[str, Any], source: str, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    chat = await client.post(CHAT, json={"model": MODEL, "messages": HELLO, **fields})
    completion = await client.post(COMPLETIONS, json={"model": MODEL, "prompt": "Hi", **fields})
    assert (chat.status_code, completion.status_code) == (200, 200), chat.text + completion.text
    assert [request.grammar for request in engine.requests] == [Grammar(source)] * 2


async def test_a_request_that_asks_for_nothing_has_no_grammar(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    fields = {"response_format": {"type": "text"}, "guided_json": None, "structured_outputs": {}}
    response = await client.post(CHAT, json={"model": MODEL, "messages": HELLO, **fields})
    assert response.status_code == 200
    assert engine.requests[0].grammar is None


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "give"),
    ({"response_format": "json"}, "response_format", ""),
    ({"guided_json": '{"type": '}, "guided_json", "not JSON"),
    ({"guided_json": 3}, "guided_json", ""),
    ({"guided_json": {"type": "objekt"}}, "guided_json", "objekt"),
    ({"guided_json": {"not": {}}}, "guided_json", "not"),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": ["x"] * 1025}, "guided_choice", "at most 1024"),
    ({"guided_choice": [""]}, "guided_choice[0]", "at least 1"),
    ({"guided_grammar": "start: a"}, "guided_grammar", "unknown name"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "Unrecognized"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "2 ways"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "does not go with"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "does not go with"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "at most 262144"),
]


@pytest.mark.parametrize(
    ("fields", "param", "message"), FAULTS, ids=[str(fields)[:50] for fields, *_ in FAULTS]
)
async def test_what_cannot_be_followed_is_refused_before_the_engine_hears_of_it(
    fields: dict[str, Any],
    param: str,
    message: str,
    client: httpx.AsyncClient,
    engine: FakeEngine,
) -> None:
    response = await client.post(CHAT, json={"model": MODEL, "messages": HELLO, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert str(error["param"]).startswith(param)
    assert message in error["message"]
    assert len(error["message"]) < 800
    assert engine.requests == []


TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[1]"),
    ({"guided_json": SCHEMA}, '{"city": "Paris", "degrees": 3}', '{"city": "Paris"}'),
    ({"guided_regex": "[ab]+"}, "abba", "abc"),
    ({"guided_choice": ["yes", "no"]}, "yes", "perhaps"),
    ({"guided_grammar": 'root ::= "a" more\nmore ::= "b"+'}, "abb", "a"),
    ({"guided_grammar": 'start: "a" call\ncall: "b"'}, "ab", "a"),
]


@pytest.mark.parametrize(("form", "fits", "does_not"), FORMS, ids=[str(row[0]) for row in FORMS])
async def test_an_answer_that_may_call_tools_is_of_the_form_or_consists_of_calls(
    form: dict[str, Any], fits: str, does_not: str, tmp_path: Path
) -> None:
    service, engine = make_service(tmp_path, chat_template_text=TOOLS_AND_THOUGHTS)
    tokenizer = load_tokenizer(tmp_path)
    [end_token_id] = engine.info.eos_token_ids
    compiler = GrammarCompiler(tokenizer, end_token_ids=[end_token_id])
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    choices: list[tuple[dict[str, Any], set[str]]] = [
        ({"tools": [TOOL]}, {fits, CALL, f"{CALL}\n{CALL}"}),
        ({"tools": [strict]}, {fits, CALL, f"{CALL}\n{CALL}"}),
        ({"tools": [strict], "parallel_tool_calls": False}, {fits, CALL}),
        ({"tools": [TOOL], "tool_choice": "required"}, {CALL, f"{CALL}\n{CALL}"}),
        ({"tools": [TOOL], "tool_choice": "none"}, {fits}),
    ]
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        for fields, allowed in choices:
            body = {"model": MODEL, "messages": HELLO, **form, **fields}
            (await client.post(CHAT, json=body)).raise_for_status()
            grammar = engine.requests[-1].grammar
            assert grammar is not None
            tried = {fits, does_not, CALL, f"{CALL}\n{CALL}", f"{fits}\n{CALL}", "Hi."}
            got = {
                text
                for text in tried
                if follows(compiler, grammar, [*tokenizer.encode(text), end_token_id])
            }
            assert got == allowed, fields


def follows(compiler: GrammarCompiler, grammar: Grammar, token_ids: list[int]) -> bool:
    """Whether a grammar lets an answer through, token by token."""
    constraint = compiler.constraint(grammar)
    for token_id in token_ids:
        words = constraint.allowed_tokens()
        assert words is not None
        # Ids behind the last word are not allowed.
        word = words[token_id // 32] if token_id // 32 < len(words) else 0
        if constraint.error or not word >> (token_id % 32) & 1:
            return False
        constraint.accept(token_id)
    return True


async def test_a_tool_whose_schema_cannot_be_followed_takes_any_arguments_beside_a_form(
    tmp_path: Path,
) -> None:
    service, engine = make_service(tmp_path, chat_template_text=TOOLS_AND_THOUGHTS)
    parameters = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    function = {"name": "look", "parameters": parameters}
    body: dict[str, Any] = {"model": MODEL, "messages": HELLO, "guided_choice": ["yes"]}
    tokenizer = load_tokenizer(tmp_path)
    [end_token_id] = engine.info.eos_token_ids
    compiler = GrammarCompiler(tokenizer, end_token_ids=[end_token_id])
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        tools = [{"type": "function", "function": function}]
        (await client.post(CHAT, json={**body, "tools": tools})).raise_for_status()
        grammar = engine.requests[0].grammar
        assert grammar is not None
        for text in (CALL.replace("{}", '{"tags": [1, 1]}'), "yes"):
            assert follows(compiler, grammar, [*tokenizer.encode(text), end_token_id])
        tools = [{"type": "function", "function": {**function, "strict": True}}]
        response = await client.post(CHAT, json={**body, "tools": tools})
        assert response.status_code == 400
        assert "uniqueItems" in response.json()["error"]["message"]


async def test_what_cannot_be_told_from_a_call_is_refused_beside_tools(tmp_path: Path) -> None:
    # ChatML's tokens and no template: ReAct.
    service, engine = make_service(tmp_path, chat_template_text=None)
    transport = httpx.ASGITransport(create_app(service))
    body = {"model": MODEL, "messages": HELLO, "tools": [TOOL], "guided_regex": "a+"}
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post(CHAT, json=body)
        assert response.json()["error"]["param"] == "tools"
        assert engine.requests == []


async def test_an_answer_that_its_grammar_stopped_ends_in_an_error_that_says_so(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.has_failing_grammar = True
    body = {"model": MODEL, "messages": HELLO, "guided_regex": "a"}
    response = await client.post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_failed"
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as stream:
        events = [line async for line in stream.aiter_lines() if line.startswith("data: ")]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "grammar_failed"
