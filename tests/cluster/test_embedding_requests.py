"""/v1/embeddings through OpenAI's own client, over an engine that says what it is told to."""

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine

from cluster.openai.engine_client import ChoiceRequest, TokenDelta

MODEL = "Tiny-Chat"


@pytest.fixture
def vectors(engine: FakeEngine) -> None:
    """Each prompt's embedding begins with its number of tokens, which are followed by 3 and 0."""

    def deltas(choice: ChoiceRequest) -> list[TokenDelta]:
        assert choice.sampling.embedding
        assert choice.sampling.max_tokens == 1
        vector = np.array([len(choice.prompt_token_ids), 3, 0], "<f4")
        return [TokenDelta(token_ids=(5,), finish_reason="length", embedding=vector.tobytes())]

    engine.deltas = deltas


def unit(*numbers: float) -> list[float]:
    return (np.array(numbers) / np.linalg.norm(numbers)).tolist()


@pytest.mark.usefixtures("vectors")
async def test_each_input_gets_its_embedding_of_length_one(sdk: openai.AsyncOpenAI) -> None:
    # What the client makes of base64, which it asks for by itself, and of numbers.
    for options in ({}, {"encoding_format": "float"}):
        answer = await sdk.embeddings.create(
            model=MODEL, input=[[7, 8], [9, 9, 9, 9]], extra_body=options
        )
        assert [each.index for each in answer.data] == [0, 1]
        assert answer.data[0].embedding == pytest.approx(unit(2, 3, 0), abs=1e-6)
        assert answer.data[1].embedding == pytest.approx(unit(4, 3, 0), abs=1e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6
        assert answer.model == MODEL


@pytest.mark.usefixtures("vectors")
async def test_texts_are_those_that_the_tokenizer_makes(
    sdk: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    text = await sdk.embeddings.create(model=MODEL, input="Once upon a time")
    (choice,) = engine.requests[0].choices
    ids = await sdk.embeddings.create(model=MODEL, input=list(choice.prompt_token_ids))
    assert len(choice.prompt_token_ids) > 1
    assert text.data[0].embedding == ids.data[0].embedding


@pytest.mark.usefixtures("vectors")
async def test_fewer_dimensions_are_the_first_ones_made_of_length_one_again(
    client: httpx.AsyncClient,
) -> None:
    body = {"model": MODEL, "input": [[1, 1, 1, 1]], "dimensions": 2, "encoding_format": "base64"}
    answer = (await client.post("/v1/embeddings", json=body)).json()
    spelled = base64.b64decode(answer["data"][0]["embedding"])
    assert np.frombuffer(spelled, "<f4").tolist() == pytest.approx([0.8, 0.6], abs=1e-6)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"input": []}, "input", "not empty"),
        ({"input": ""}, "input", "at least one token"),
        ({"input": [[1], [99999]]}, "input", "99999"),
        ({"input": [5] * CONTEXT_LENGTH}, "input", str(CONTEXT_LENGTH)),
        ({"input": [[1]] * 3000}, "input", "3000"),
        ({"dimensions": 4}, "dimensions", "have 3"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "hex"}, "encoding_format", "float"),
        ({"stream": True}, "stream", "Unrecognized"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, message: str
) -> None:
    body = {"model": MODEL, "input": [[1, 2]], **change}
    answer = await client.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert error["param"] == param
    assert message in error["message"]
