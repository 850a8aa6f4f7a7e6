"""Endpoints that generate nothing: tokens, versions, the configuration."""

import hashlib
import json
import tomllib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine, make_service

from cluster.openai.http import MAX_BODY_BYTES
from cluster.router import create_app
from cluster.server_info import project_version
from cluster.service import OpenAIService
from engine.text.tokenizer import load_tokenizer

MODEL = "Tiny/Tiny-Chat"
HELLO = [{"role": "user", "content": "Hello 日本"}]


@pytest.fixture
def service_and_engine(tmp_path: Path) -> tuple[OpenAIService, FakeEngine]:
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"alpha").hexdigest() + " concurrency=1")
    return make_service(
        tmp_path,
        api_key_file=str(keys),
        compiled_programs="s3://user:hush@bucket/programs",
        max_running_requests=7,
    )


async def test_tokenizing_counts_as_a_request_of_its_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"alpha").hexdigest() + " requests-per-minute=1")
    service, _ = make_service(tmp_path, api_key_file=str(keys))
    transport = httpx.ASGITransport(create_app(service))
    headers = {"Authorization": "Bearer alpha"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://router", headers=headers
    ) as client:
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            response = await client.post(path, json=body)
            assert response.status_code == 429
            assert "requests-per-minute" in response.text


@pytest.fixture
async def client(
    service_and_engine: tuple[OpenAIService, FakeEngine],
) -> AsyncGenerator[httpx.AsyncClient, None]:
    transport = httpx.ASGITransport(create_app(service_and_engine[0]))
    headers = {"Authorization": "Bearer alpha"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://router", headers=headers
    ) as client:
        yield client


async def test_tokens_of_a_prompt_and_their_text_again(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tmp_path)
    prompt = "Hello 日本<|im_end|>"
    answer = (await client.post("/tokenize", json={"model": MODEL, "prompt": prompt})).json()
    assert answer == {
        "count": len(tokenizer.encode(prompt)),
        "max_model_len": CONTEXT_LENGTH,
        "tokens": tokenizer.encode(prompt),
        "token_strs": None,
    }
    body = {"prompt": "Hello", "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert "".join(answer["token_strs"]) == "Hello"
    assert len(answer["token_strs"]) == answer["count"]

    tokens = tokenizer.encode(prompt)
    body = {"model": MODEL, "tokens": tokens}
    assert (await client.post("/detokenize", json=body)).json() == {"prompt": prompt}
    # Half a character is one that is none.
    half = tokenizer.encode("é")[:1]
    assert (await client.post("/detokenize", json={"tokens": half})).json() == {
        "prompt": "\N{REPLACEMENT CHARACTER}"
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"add_generation_prompt": False}, {"enable_thinking": False}],
)
async def test_tokens_of_a_chat_are_those_that_the_engine_is_asked_with(
    fields: dict[str, Any], client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"model": MODEL, "messages": HELLO, **fields}
    answer = (await client.post("/tokenize", json=body)).json()
    await client.post("/v1/chat/completions", json=body)
    assert tuple(answer["tokens"]) == engine.requests[0].choices[0].prompt_token_ids


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
    ("/tokenize", {"prompt": 3}, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
    ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"prompt": "x", "colour": "red"}, "colour"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
    ("/detokenize", {"tokens": [1], "model": "other"}, "model"),
]


@pytest.mark.parametrize(("path", "body", "param"), FAULTS, ids=[str(each) for each in FAULTS])
async def test_a_fault_is_named(
    path: str, body: dict[str, Any], param: str, client: httpx.AsyncClient
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
    response = await client.post(path, content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413


async def test_the_version_is_the_projects(client: httpx.AsyncClient) -> None:
    source = Path(__file__).parents[2] / "pyproject.toml"
    version = tomllib.loads(source.read_text())["project"]["version"]
    assert (await client.get("/version")).json() == {"version": version}
    assert (await client.get("/openapi.json")).json()["info"]["version"] == project_version()


async def test_the_configuration_is_shown_without_secrets(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    response = await client.get("/get_server_info")
    told = response.json()
    assert told["max_running_requests"] == 7
    assert told["model_path"] == MODEL
    assert told["version"] == project_version()
    assert told["compiled_programs"] == "s3://bucket/programs"
    [engine] = told["engines"]
    assert (engine["context_length"], engine["is_ready"]) == (CONTEXT_LENGTH, True)
    secrets = ["hush", "alpha", hashlib.sha256(b"alpha").hexdigest(), str(tmp_path / "keys")]
    assert not [secret for secret in secrets if secret in response.text]
    assert "api_key_file" not in told


async def test_all_of_them_need_a_key(client: httpx.AsyncClient) -> None:
    del client.headers["Authorization"]
    for method, path in (
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/version"),
        ("GET", "/get_server_info"),
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_x"),
        ("DELETE", "/v1/responses/resp_x"),
        ("POST", "/v1/responses/resp_x/cancel"),
        ("GET", "/v1/responses/resp_x/input_items"),
    ):
        response = await client.request(method, path, content=json.dumps({"prompt": "x"}))
        assert response.status_code == 401, path


async def test_the_openapi_page_has_them(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    paths = description["paths"]
    for path, kind in (
        ("/tokenize", "TokenizeRequest"),
        ("/detokenize", "DetokenizeRequest"),
        ("/v1/responses", "ResponseRequest"),
    ):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{kind}"}
        assert kind in description["components"]["schemas"]
    assert set(paths["/v1/responses/{response_id}"]) == {"get", "delete"}
    assert "/v1/responses/{response_id}/input_items" in paths
    properties = description["components"]["schemas"]["ResponseRequest"]["properties"]
    assert {"input", "previous_response_id", "tools", "text"} <= set(properties)
    references = {
        word.removeprefix("#/components/schemas/")
        for word in json.dumps(description).replace('"', " ").split()
        if word.startswith("#/components/schemas/")
    }
    assert references <= set(description["components"]["schemas"])
