"""Log probabilities as clients get them, against transformers' (Qwen1's: the original's).

The routes are real, and so is the engine, in this process: tiny checkpoints in float32.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_engine import FakeEngine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.openai.engine_client import ChoiceRequest, TokenDelta
from engine.config import EngineConfig
from engine.llm import LLM

DATA = Path(__file__).parents[1] / "data"
MODEL = "Tiny/Tiny-Chat"
TOLERANCE = 1e-3
NUM_TOP = 5
VOCAB_SIZE = 512
GREEDY = {"model": MODEL, "temperature": 0, "ignore_eos": True}
REFERENCES = json.loads((DATA / "logprobs.json").read_text())


def text_of(token_ids: list[int]) -> str:
    return "".join(f"<{token_id}>" for token_id in token_ids)


def write_readable_tokenizer(directory: Path, *, chat_template: str) -> None:
    """One in which each id of the tiny checkpoints is a text of its own, so that a text is ids."""
    names = {f"<{token_id}>": token_id for token_id in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in names])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def service_fields() -> dict[str, Any]:
    # The message is the prompt.
    template = "{{ messages[0].content }}"
    return {"chat_template_text": template, "write_tokenizer": write_readable_tokenizer}


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], LLM]]:
    """Loads a tiny checkpoint once; one is there at a time."""
    loaded: dict[str, LLM] = {}

    def load(name: str) -> LLM:
        if name not in loaded:
            for llm in loaded.values():
                llm.close()
            loaded.clear()
            # Programs that tests of the engine compile, too.
            fields: dict[str, Any] = {
                "model_path": str(DATA / name),
                "device": "cpu",
                "dtype": "float32",
                "page_size": 16,
                "context_length": 256,
                "max_total_tokens": 14 * 16,
                "max_running_requests": 8,
                "chunked_prefill_size": 32,
                "random_seed": 1,
            }
            loaded[name] = LLM(EngineConfig.model_validate(fields))
        return loaded[name]

    yield load
    for llm in loaded.values():
        llm.close()


def generate_with(llm: LLM, engine: FakeEngine) -> None:
    """Let a model say what the fake engine's choices are."""

    def deltas(choice: ChoiceRequest) -> list[TokenDelta]:
        [completion] = llm.generate([choice.prompt_token_ids], choice.sampling)
        return [
            TokenDelta(
                token_ids=tuple(completion.token_ids),
                logprobs=tuple(completion.logprobs),
                prompt_logprobs=tuple(completion.prompt_logprobs),
                finish_reason=completion.finish_reason,
            )
        ]

    engine.deltas = deltas


def assert_close(got: dict[str, float], expected: list[list[float]]) -> None:
    """The likeliest tokens are those expected, as likely as expected."""
    likeliest = dict(sorted(got.items(), key=lambda pair: -pair[1])[: len(expected)])
    assert likeliest == pytest.approx({f"<{i}>": logprob for i, logprob in expected}, abs=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name == "tiny-qwen2-tied" else [])
        for name in REFERENCES
    ],
)
async def test_log_probabilities_are_those_of_transformers(
    name: str, client: httpx.AsyncClient, engine: FakeEngine, load: Callable[[str], LLM]
) -> None:
    generate_with(load(name), engine)
    golden, reference = json.loads((DATA / name / "golden.json").read_text()), REFERENCES[name]
    prompt, greedy = golden["ids"], golden["greedy"]
    entries = [*reference["prompt"], *reference["greedy"]]
    assert len(entries) == len(prompt) - 1 + len(greedy)
    fields = {**GREEDY, "max_tokens": len(greedy), "prompt_logprobs": NUM_TOP}

    response = await client.post(
        "/v1/completions", json={**fields, "prompt": prompt, "echo": True, "logprobs": NUM_TOP}
    )
    [choice] = response.raise_for_status().json()["choices"]
    assert choice["text"] == text_of([*prompt, *greedy])
    own = choice["logprobs"]["token_logprobs"]
    assert own[0] is None
    assert own[1:] == pytest.approx([logprob for logprob, _ in entries], abs=TOLERANCE)
    for got, (_, top) in zip(choice["logprobs"]["top_logprobs"][1:], entries, strict=True):
        assert_close(got, top)

    response = await client.post(
        "/v1/chat/completions",
        json={
            **fields,
            "messages": [{"role": "user", "content": text_of(prompt)}],
            "logprobs": True,
            "top_logprobs": NUM_TOP,
        },
    )
    answer = response.raise_for_status().json()
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == [f"<{token_id}>" for token_id in greedy]
    for token, (logprob, top) in zip(tokens, reference["greedy"], strict=True):
        assert token["logprob"] == pytest.approx(logprob, abs=TOLERANCE)
        assert_close({each["token"]: each["logprob"] for each in token["top_logprobs"]}, top)

    for found in (answer["prompt_logprobs"], choice["prompt_logprobs"]):
        assert found[0] is None
        for position, token_id, (logprob, top) in zip(
            found[1:], prompt[1:], reference["prompt"], strict=True
        ):
            entry = position[str(token_id)]
            assert entry["logprob"] == pytest.approx(logprob, abs=TOLERANCE)
            assert entry["decoded_token"] == f"<{token_id}>"
            ranks = {int(other): each["rank"] for other, each in position.items()}
            assert {i: ranks[i] for i, _ in top} == {i: n for n, (i, _) in enumerate(top, start=1)}
            assert_close({f"<{i}>": each["logprob"] for i, each in position.items()}, top)


@pytest.mark.long
async def test_log_probabilities_of_qwen1_are_those_of_the_original(
    client: httpx.AsyncClient, engine: FakeEngine, load: Callable[[str], LLM]
) -> None:
    generate_with(load("tiny-qwen1"), engine)
    golden = json.loads((DATA / "tiny-qwen1" / "golden.json").read_text())
    ids = golden["ids"]
    expected: dict[int, np.ndarray] = {}
    for length, logits in golden["logits_last"].items():
        shifted = np.array(logits, np.float64) - max(logits)
        expected[int(length)] = shifted - math.log(np.exp(shifted).sum())
    for length, logprobs in expected.items():
        likeliest = np.argsort(-logprobs)[:NUM_TOP]
        response = await client.post(
            "/v1/chat/completions",
            json={
                **GREEDY,
                "max_tokens": 1,
                "messages": [{"role": "user", "content": text_of(ids[:length])}],
                "logprobs": True,
                "top_logprobs": NUM_TOP,
            },
        )
        [token] = response.raise_for_status().json()["choices"][0]["logprobs"]["content"]
        assert token["token"] == f"<{likeliest[0]}>"
        got = {each["token"]: each["logprob"] for each in token["top_logprobs"]}
        assert_close(got, [[int(i), float(logprobs[i])] for i in likeliest])
    # Within the trained length a token's probability does not hang on what follows it.
    trained = max(length for length in expected if length <= 64)
    response = await client.post(
        "/v1/completions",
        json={**GREEDY, "max_tokens": 1, "prompt": ids[:trained], "prompt_logprobs": 0},
    )
    [choice] = response.raise_for_status().json()["choices"]
    inner = [length for length in expected if length < trained]
    assert inner
    for length in inner:
        own = choice["prompt_logprobs"][length][str(ids[length])]
        assert own["logprob"] == pytest.approx(expected[length][ids[length]], abs=TOLERANCE)
        assert own["rank"] == 1 + np.sum(expected[length] > expected[length][ids[length]])
