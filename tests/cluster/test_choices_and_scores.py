"""best_of, the log probabilities of prompts, and usage in each event of a stream."""

import itertools
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from cluster.openai.engine_client import ChoiceRequest
from engine.request import TokenLogprobs

# Its overloads do not take a bool for `stream`.
Client = Any

MODEL = "Tiny/Tiny-Chat"
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def scores(engine: FakeEngine) -> dict[str, float]:
    """Log probability of each token of an answer, by the answer's text; may be filled."""
    scores: dict[str, float] = {}

    def score(choice: ChoiceRequest, token_id: int, num_top: int) -> TokenLogprobs:
        del token_id
        logprob = scores[engine.answer(choice)]
        return TokenLogprobs(logprob=logprob, rank=1, top_token_ids=(), top_logprobs=())

    engine.score = score
    return scores


async def test_the_likeliest_of_the_choices_are_the_answer(
    sdk: Client, engine: FakeEngine, scores: dict[str, float]
) -> None:
    # By the token: the second is longer than the others, and so less likely as a whole.
    texts = ["no", "yes, that is so, and so it is", "perhaps", "maybe"]
    scores |= dict(zip(texts, (-2.0, -0.5, -1.0, -3.0), strict=True))
    engine.answer = lambda choice: texts[choice.sample_index]
    answer = await sdk.completions.create(
        model=MODEL, prompt=["The", "A quick"], n=2, best_of=4, max_tokens=40
    )
    assert [choice.text for choice in answer.choices] == [texts[1], texts[2]] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in answer.choices)
    prompts = [choice.prompt_token_ids for choice in engine.requests[0].choices]
    assert [len(list(group)) for _, group in itertools.groupby(prompts)] == [4, 4]
    num_tokens = sum(len(engine._tokenizer.encode(text)) + 1 for text in texts)
    assert answer.usage.completion_tokens == 2 * num_tokens
    assert answer.usage.prompt_tokens == len(prompts[0]) + len(prompts[4])


async def test_best_of_as_many_as_n_is_what_n_is(sdk: Client, engine: FakeEngine) -> None:
    engine.answer = lambda choice: f"I am number {choice.sample_index}."
    texts = ["", ""]
    stream = await sdk.completions.create(model=MODEL, prompt="The", n=2, best_of=2, stream=True)
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["I am number 0.", "I am number 1."]
    assert engine.requests[0].choices[0].sampling.logprobs is None


async def test_the_best_choices_come_with_echo_and_log_probabilities(
    sdk: Client, engine: FakeEngine, scores: dict[str, float]
) -> None:
    scores |= {"no": -2.0, "yes": -0.5}
    engine.answer = lambda choice: ["no", "yes"][choice.sample_index]
    answer = await sdk.completions.create(
        model=MODEL, prompt=["The", "A"], best_of=2, echo=True, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == ["Theyes", "Ayes"]
    for choice in answer.choices:
        assert choice.logprobs.token_logprobs[0] is None
        assert set(choice.logprobs.token_logprobs[1:]) == {-0.5}


@pytest.mark.parametrize("num_top", [0, 3])
async def test_log_probabilities_of_a_prompt_come_as_vllm_gives_them(
    client: httpx.AsyncClient, engine: FakeEngine, num_top: int
) -> None:
    def score(choice: ChoiceRequest, token_id: int, num_top: int) -> TokenLogprobs:
        del choice
        # Tokens of odd ids are less likely than all that are reported.
        own = [token_id] if token_id % 2 == 0 else []
        top = [*(other for other in (61, 63) if other != token_id), *own, 65, 67][:num_top]
        return TokenLogprobs(
            logprob=-3.0 if token_id in top else -9.0,
            rank=top.index(token_id) + 1 if token_id in top else 1234,
            top_token_ids=tuple(top),
            top_logprobs=tuple(-1.0 - rank for rank in range(len(top))),
        )

    engine.score = score
    token_ids = [70, 80, 61, 81]
    body: dict[str, Any] = {"model": MODEL, "prompt_logprobs": num_top}
    completion = await client.post(COMPLETIONS, json={**body, "prompt": token_ids, "n": 2})
    choices = completion.raise_for_status().json()["choices"]

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = engine._tokenizer.token_bytes(token_id).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    expected: list[Any] = [
        None,
        {"80": entry(80, -9.0, 1234)},
        {"61": entry(61, -9.0, 1234)},
        {"81": entry(81, -9.0, 1234)},
    ]
    if num_top:
        likeliest = {"61": entry(61, -1.0, 1), "63": entry(63, -2.0, 2)}
        expected = [
            None,
            {"80": entry(80, -3.0, 3), **likeliest},
            {
                "61": entry(61, -9.0, 1234),
                "63": entry(63, -1.0, 1),
                "65": entry(65, -2.0, 2),
                "67": entry(67, -3.0, 3),
            },
            {"81": entry(81, -9.0, 1234), **likeliest, "65": entry(65, -3.0, 3)},
        ]
    assert [choice["prompt_logprobs"] for choice in choices] == [expected] * 2
    # The token itself comes first.
    assert [next(iter(each)) for each in choices[0]["prompt_logprobs"][1:]] == ["80", "61", "81"]

    chat = await client.post(CHAT, json={**body, "messages": HELLO})
    prompt = engine.requests[-1].choices[0].prompt_token_ids
    found = chat.raise_for_status().json()["prompt_logprobs"]
    assert found[0] is None
    assert [next(iter(each)) for each in found[1:]] == [str(token_id) for token_id in prompt[1:]]


async def test_an_answer_says_nothing_of_its_prompt_unless_asked(client: httpx.AsyncClient) -> None:
    chat = await client.post(CHAT, json={"model": MODEL, "messages": HELLO, "logprobs": True})
    completion = await client.post(
        COMPLETIONS, json={"model": MODEL, "prompt": "The", "echo": True}
    )
    assert "prompt_logprobs" not in chat.text + completion.text


async def test_an_echo_and_its_prompt_have_as_many_alternatives_as_each_was_asked_for(
    client: httpx.AsyncClient,
) -> None:
    body = {"model": MODEL, "prompt": [70, 80, 81], "max_tokens": 1, "echo": True}
    for num_logprobs, num_prompt_logprobs in ((1, 3), (3, 1)):
        fields = {"logprobs": num_logprobs, "prompt_logprobs": num_prompt_logprobs}
        answer = await client.post(COMPLETIONS, json={**body, **fields})
        [choice] = answer.raise_for_status().json()["choices"]
        assert [len(top or {}) for top in choice["logprobs"]["top_logprobs"]] == [
            0,
            *[num_logprobs] * 3,
        ]
        assert [len(each or {}) for each in choice["prompt_logprobs"]] == [
            0,
            *[num_prompt_logprobs] * 2,
        ]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_each_event_counts_its_choices_tokens_if_asked_to(
    path: str, sdk: Client, engine: FakeEngine
) -> None:
    engine.answer = lambda choice: ["Once upon a time", "No"][choice.sample_index]
    create = sdk.chat.completions.create if path == CHAT else sdk.completions.create
    prompt: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "The quick"}
    stream = await create(
        model=MODEL,
        n=2,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        **prompt,
    )
    chunks = [chunk async for chunk in stream]
    prompt_len = len(engine.requests[0].choices[0].prompt_token_ids)
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        assert chunk.usage.prompt_tokens == prompt_len
        assert chunk.usage.total_tokens == prompt_len + chunk.usage.completion_tokens
        counts[chunk.choices[0].index].append(chunk.usage.completion_tokens)
    num_tokens = [len(engine._tokenizer.encode(text)) for text in ("Once upon a time", "No")]
    # A chat's first event says whose turn it is; an answer's last one has its end token.
    openings = [0] if path == CHAT else []
    for index, expected in enumerate(num_tokens):
        assert sorted(counts[index]) == counts[index]
        assert len(counts[index]) > len(openings) + 1
        assert counts[index][: len(openings)] == openings
        assert counts[index][-1] == expected + 1
    whole = chunks[-1]
    assert whole.choices == []
    assert whole.usage.completion_tokens == sum(num_tokens) + 2


async def test_usage_comes_in_each_event_only_where_usage_is_wanted(
    sdk: openai.AsyncOpenAI,
) -> None:
    options: Any = {"continuous_usage_stats": True}
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options=options
    )
    assert [chunk.usage async for chunk in stream if chunk.usage is not None] == []
