"""Answers through the openai SDK over a loopback server; the engine is a fake."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from fake_engine import CONTEXT_LENGTH, FakeEngine

from cluster.openai.sse import AnswerResponse
from engine.errors import EngineDiedError, RequestGivenUpError

# Its overloads do not take a bool for `stream`.
Client = Any

MODEL = "Tiny/Tiny-Chat"
HELLO: Any = [{"role": "user", "content": "Hello"}]


async def test_a_chat_is_answered(sdk: Client, engine: FakeEngine) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Once upon a time"
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.id == engine.requests[0].request_id


async def test_a_streamed_chat_says_the_same_as_a_whole_one(sdk: Client) -> None:
    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Once upon a time"
    assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
    assert all(c.choices[0].finish_reason is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


async def test_openais_client_reads_on_when_a_stream_says_that_it_waits(
    sdk: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.openai.sse.COMMENT_PERIOD_S", 0.01)
    engine.steps = steps = asyncio.Semaphore(3)
    text = ""
    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    has_commented = _next_comment(monkeypatch)
    async with asyncio.timeout(30):
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text and not has_commented.is_set():
                await has_commented.wait()
                for _ in range(100):
                    steps.release()
    assert text == "Once upon a time"


def _next_comment(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a stream has sent a comment from here on."""
    has_commented = asyncio.Event()
    send = AnswerResponse._send

    async def watched(self: AnswerResponse, to: Any, body: bytes, **options: Any) -> None:
        await send(self, to, body, **options)
        if body.startswith(b":"):
            has_commented.set()

    monkeypatch.setattr(AnswerResponse, "_send", watched)
    return has_commented


async def test_the_stream_ends_with_usage_if_asked_for(sdk: Client) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    whole = await sdk.chat.completions.create(model=MODEL, messages=HELLO)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_usage_counts_tokens(sdk: Client, engine: FakeEngine) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO, n=2)
    prompt_len = len(engine.requests[0].choices[0].prompt_token_ids)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == prompt_len
    # Both choices, their end tokens included.
    assert usage.completion_tokens == 2 * (len(engine._tokenizer.encode("Once upon a time")) + 1)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 4


async def test_the_prompt_is_the_rendered_template(sdk: Client, engine: FakeEngine) -> None:
    await sdk.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    [choice] = engine.requests[0].choices
    spelled = b"".join(map(engine._tokenizer.token_bytes, choice.prompt_token_ids)).decode()
    assert spelled == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert choice.prompt_token_ids[0] == engine._tokenizer.special_tokens["<|im_start|>"]


async def test_n_choices_are_told_apart(sdk: Client, engine: FakeEngine) -> None:
    engine.answer = lambda choice: f"I am number {choice.sample_index}."
    expected = [f"I am number {index}." for index in range(3)]
    whole = await sdk.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert [choice.message.content for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_one_choice_and_not_the_other(
    sdk: Client, engine: FakeEngine, stream: bool
) -> None:
    engine.answer = lambda choice: ["fox END dog", "fox EN dog"][choice.sample_index]
    texts, reasons = ["", ""], [None, None]
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, stop=["END"], stream=stream
    )
    if isinstance(answer, openai.AsyncStream):
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    else:
        texts = [choice.message.content for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
    assert texts == ["fox ", "fox EN dog"]
    assert reasons == ["stop", "stop"]
    assert [index for _, index in engine.aborted_choices] == [0]


async def test_the_stop_string_is_reported_and_shown_if_asked_for(
    sdk: Client, engine: FakeEngine
) -> None:
    engine.answer = lambda _: "fox END dog"
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stop="END", extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].message.content == "fox END"
    assert answer.choices[0].model_extra == {"stop_reason": "END"}


async def test_max_tokens_ends_with_length(sdk: Client) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO, **limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


async def test_characters_are_never_split_across_chunks(sdk: Client, engine: FakeEngine) -> None:
    text = "你好 👩‍👩‍👧 مرحبا"
    engine.answer = lambda _: text
    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_name_each_token(sdk: Client, engine: FakeEngine, stream: bool) -> None:
    engine.answer = lambda _: "fox 你"
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3, stream=stream
    )
    if isinstance(answer, openai.AsyncStream):
        content = []
        async for chunk in answer:
            if chunk.choices[0].logprobs is not None:
                content += chunk.choices[0].logprobs.content or []
    else:
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    # The end token is no text of the answer, and is not among them.
    spelled = b"".join(bytes(token.bytes or []) for token in content)
    assert spelled.decode() == "fox 你"
    assert len(content) == len(engine._tokenizer.encode("fox 你"))
    assert {token.logprob for token in content} == {-0.25}
    for token in content:
        assert [top.logprob for top in token.top_logprobs] == [-0.25, -1.25, -2.25]
        assert token.top_logprobs[0].token == token.token


async def test_logprobs_of_a_hidden_stop_string_are_hidden_too(
    sdk: Client, engine: FakeEngine
) -> None:
    engine.answer = lambda _: "fox##dog"
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, stop="##"
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(token.token for token in content) == "fox"
    assert all(token.top_logprobs == [] for token in content)


async def test_a_completion_continues_text_or_token_ids(sdk: Client, engine: FakeEngine) -> None:
    token_ids = engine._tokenizer.encode("The quick")
    for prompt in ("The quick", token_ids):
        answer = await sdk.completions.create(model=MODEL, prompt=prompt)
        assert answer.id.startswith("cmpl-")
        assert answer.object == "text_completion"
        assert answer.choices[0].text == "Once upon a time"
        assert list(engine.requests[-1].choices[0].prompt_token_ids) == token_ids


@pytest.mark.parametrize("stream", [False, True])
async def test_list_prompts_come_back_in_order(
    sdk: Client, engine: FakeEngine, stream: bool
) -> None:
    engine.answer = lambda choice: f"{len(choice.prompt_token_ids)}-{choice.sample_index}"
    answer = await sdk.completions.create(
        model=MODEL, prompt=[[1, 2], [1, 2, 3]], n=2, echo=True, stream=stream
    )
    texts = [""] * 4
    if isinstance(answer, openai.AsyncStream):
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 5
    two = "".join(engine._tokenizer.token_bytes(i).decode() for i in (1, 2))
    three = two + engine._tokenizer.token_bytes(3).decode()
    assert texts == [f"{two}2-0", f"{two}2-1", f"{three}3-0", f"{three}3-1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_has_logprobs_too(
    sdk: Client, engine: FakeEngine, stream: bool
) -> None:
    answer = await sdk.completions.create(
        model=MODEL, prompt="The quick", echo=True, logprobs=1, stream=stream
    )
    text, tokens, offsets, scores = "", [], [], []
    chunks = [c async for c in answer] if isinstance(answer, openai.AsyncStream) else [answer]
    for chunk in chunks:
        choice = chunk.choices[0]
        assert choice.logprobs is not None
        text += choice.text
        tokens += choice.logprobs.tokens or []
        offsets += choice.logprobs.text_offset or []
        scores += choice.logprobs.token_logprobs or []
    assert text == "".join(tokens) == "The quickOnce upon a time"
    assert offsets == [len("".join(tokens[:index])) for index in range(len(tokens))]
    num_prompt_tokens = len(engine.requests[-1].choices[0].prompt_token_ids)
    assert "".join(tokens[:num_prompt_tokens]) == "The quick"
    # Nothing comes before the first token that it could be likely after.
    assert scores == [None, *[-0.25] * (len(tokens) - 1)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_scored_without_an_answer(
    sdk: Client, engine: FakeEngine, stream: bool
) -> None:
    answer = await sdk.completions.create(
        model=MODEL, prompt="The quick", echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    chunks = [c async for c in answer] if isinstance(answer, openai.AsyncStream) else [answer]
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == "The quick"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs is not None]
    assert "".join(token for each in logprobs for token in each.tokens or []) == "The quick"
    num_prompt_tokens = len(engine.requests[-1].choices[0].prompt_token_ids)
    scores = [score for each in logprobs for score in each.token_logprobs or []]
    assert scores == [None, *[-0.25] * (num_prompt_tokens - 1)]
    if not isinstance(answer, openai.AsyncStream):
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
            num_prompt_tokens,
            0,
        )
    # What ends at once is not taken for an end.
    engine.answer = lambda _: ""
    empty = await sdk.completions.create(model=MODEL, prompt="The", max_tokens=0)
    assert (empty.choices[0].text, empty.choices[0].finish_reason) == ("", "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_are_parallel_lists(sdk: Client, stream: bool) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="The", logprobs=2, stream=stream)
    tokens, offsets, tops = [], [], []
    chunks = [c async for c in answer] if isinstance(answer, openai.AsyncStream) else [answer]
    for chunk in chunks:
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        tokens += logprobs.tokens or []
        offsets += logprobs.text_offset or []
        tops += logprobs.top_logprobs or []
        assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or [])
    assert "".join(tokens) == "Once upon a time"
    assert offsets == [len("".join(tokens[:index])) for index in range(len(tokens))]
    assert all(top[token] == -0.25 for token, top in zip(tokens, tops, strict=True))


async def test_sampling_parameters_reach_the_engine(sdk: Client, engine: FakeEngine) -> None:
    await sdk.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": 5},
        seed=42,
        max_tokens=9,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 3,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "cache_salt": "väl",
        },
    )
    assert engine.requests[0].cache_salt == "väl".encode()
    sampling = engine.requests[0].choices[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.logit_bias, sampling.seed, sampling.max_tokens) == ({7: 5}, 42, 9)
    assert (sampling.min_tokens, sampling.stop_token_ids) == (3, (9,))
    assert sampling.ignore_eos


async def test_the_models_own_defaults_hold_where_the_client_says_nothing(
    sdk: Client, engine: FakeEngine
) -> None:
    engine.info = replace(
        engine.info, generation_defaults={"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    )
    await sdk.chat.completions.create(model=MODEL, messages=HELLO, top_p=0.5)
    sampling = engine.requests[0].choices[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 20, 0.5)
    prompt_len = len(engine.requests[0].choices[0].prompt_token_ids)
    assert sampling.max_tokens == CONTEXT_LENGTH - prompt_len
    assert sampling.seed is None


async def test_models_are_listed_and_found_by_each_name(sdk: Client) -> None:
    models = await sdk.models.list()
    assert [model.id for model in models.data] == [MODEL]
    for name in (MODEL, "Tiny-Chat"):
        assert (await sdk.models.retrieve(name)).id == name
        answer = await sdk.completions.create(model=name, prompt="The")
        assert answer.model == name
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("gpt-4")


async def test_an_engine_that_dies_amid_a_stream_ends_it_with_an_error_event(
    url: str, sdk: Client, engine: FakeEngine
) -> None:
    engine.failure = (2, EngineDiedError("Rank 1 died."))
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    async with httpx.AsyncClient() as plain:
        response = await plain.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 200
    *chunks, last = [line for line in response.text.split("\n\n") if line]
    assert len(chunks) >= 2
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["message"] == "Rank 1 died."
    assert error["type"] == "server_error"

    stream = await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="Rank 1 died"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_the_first_token_gives_503(
    sdk: Client, engine: FakeEngine, stream: bool
) -> None:
    engine.failure = (0, EngineDiedError("Rank 1 died."))
    with pytest.raises(openai.InternalServerError) as raised:
        await sdk.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) > 0


async def test_clients_do_not_send_again_what_engines_died_of(
    sdk: Client, engine: FakeEngine
) -> None:
    engine.failure = (0, RequestGivenUpError("The engine's hosts died 2 times."))
    with pytest.raises(openai.InternalServerError, match="died 2 times") as raised:
        await sdk.with_options(max_retries=2).chat.completions.create(model=MODEL, messages=HELLO)
    assert raised.value.status_code == 500
    assert "retry-after" not in raised.value.response.headers
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(1, 16), (CONTEXT_LENGTH - 3, 3)])
async def test_a_completion_without_max_tokens_has_16_or_what_the_context_has_room_for(
    prompt_len: int, max_tokens: int, sdk: Client, engine: FakeEngine
) -> None:
    await sdk.completions.create(model=MODEL, prompt=[1] * prompt_len)
    assert engine.requests[0].choices[0].sampling.max_tokens == max_tokens


async def test_a_chat_without_max_tokens_may_fill_the_context(
    sdk: Client, engine: FakeEngine
) -> None:
    await sdk.chat.completions.create(model=MODEL, messages=HELLO)
    (choice,) = engine.requests[0].choices
    assert choice.sampling.max_tokens == CONTEXT_LENGTH - len(choice.prompt_token_ids)


async def test_the_session_of_a_request_travels_with_it(sdk: Client, engine: FakeEngine) -> None:
    headers = {"x-session-id": "s" * 500}
    await sdk.chat.completions.create(model=MODEL, messages=HELLO, extra_headers=headers)
    await sdk.completions.create(model=MODEL, prompt="Hello", extra_headers=headers)
    await sdk.completions.create(model=MODEL, prompt="Hello")
    assert [request.session for request in engine.requests] == ["s" * 128, "s" * 128, None]
