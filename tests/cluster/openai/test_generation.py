"""Deltas of any size, as a lagging router gets them, give what deltas of one token give."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny_tokenizer import write_tiny_tokenizer

from cluster.openai.engine_client import (
    ChoiceRequest,
    EngineInfo,
    Fleet,
    GenerateRequest,
    ResponseStore,
    StreamRecord,
    TokenDelta,
)
from cluster.openai.generation import Generation, WholeChoice, collect
from engine.errors import EngineDiedError, EngineError
from engine.request import SamplingParams, TokenLogprobs
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer


class Replay:
    """An `EngineClient` that replays deltas."""

    def __init__(self, deltas: Sequence[tuple[int, TokenDelta]]) -> None:
        self._deltas = deltas
        self.aborted: list[int] = []

    async def engine_info(self) -> EngineInfo:
        return EngineInfo(is_ready=True)

    async def engines(self) -> list[EngineInfo]:
        return []

    async def fleet(self) -> Fleet:
        raise NotImplementedError

    async def wait_until_ready(self, timeout_s: float) -> EngineInfo:
        return EngineInfo(is_ready=True)

    async def profile(self, num_steps: int) -> None:
        raise NotImplementedError

    @property
    def responses(self) -> ResponseStore:
        raise NotImplementedError

    async def recall(
        self, request_id: str, *, engine_id: str | None, tenant: bytes
    ) -> StreamRecord:
        raise NotImplementedError

    def resume(self, record: StreamRecord) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        raise NotImplementedError

    def abort_choice(self, request_id: str, index: int) -> None:
        self.aborted.append(index)

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        for delta in self._deltas:
            yield delta


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


def run(
    tokenizer: Tokenizer,
    deltas: Sequence[tuple[int, TokenDelta]],
    *,
    num_choices: int = 1,
    stop: Sequence[str] = (),
    own_stop_token_ids: frozenset[int] = frozenset(),
) -> tuple[list[WholeChoice], Generation, Replay]:
    engine = Replay(deltas)
    choices = tuple(
        ChoiceRequest(prompt_token_ids=(1, 2, 3), sampling=SamplingParams(), sample_index=index)
        for index in range(num_choices)
    )
    generation = Generation(
        engine,
        GenerateRequest(request_id="cmpl-1", choices=choices),
        make_detokenizer=lambda: Detokenizer(tokenizer, stop=stop),
        own_stop_token_ids=own_stop_token_ids,
    )
    whole = asyncio.run(collect(generation))
    return whole, generation, engine


def delta_of(token_ids: Sequence[int], **fields: object) -> TokenDelta:
    logprobs = tuple(
        TokenLogprobs(logprob=-float(token_id), rank=1, top_token_ids=(), top_logprobs=())
        for token_id in token_ids
    )
    return replace(TokenDelta(token_ids=tuple(token_ids), logprobs=logprobs), **fields)


def cut(token_ids: Sequence[int], sizes: Sequence[int], end: int) -> list[tuple[int, TokenDelta]]:
    """Deltas of the given sizes (cyclically), the last of them with the end token."""
    token_ids = [*token_ids, end]
    deltas, start, index = [], 0, 0
    while start < len(token_ids):
        size = sizes[index % len(sizes)]
        deltas.append(delta_of(token_ids[start : start + size]))
        start, index = start + size, index + 1
    deltas[-1] = replace(deltas[-1], finish_reason="stop", stop_token_id=end)
    return [(0, delta) for delta in deltas]


@given(
    text=st.text(alphabet="fox dé👍\n", max_size=20),
    stop=st.lists(st.text(alphabet="fox é", min_size=1, max_size=3), max_size=2),
    sizes=st.lists(st.integers(min_value=1, max_value=5), min_size=1, max_size=4),
)
def test_deltas_of_any_size_give_the_same_answer(
    text: str, stop: list[str], sizes: list[int], tokenizer: Tokenizer
) -> None:
    end = tokenizer.special_tokens["<|im_end|>"]
    token_ids = tokenizer.encode(text)
    [expected], one_by_one, _ = run(tokenizer, cut(token_ids, [1], end), stop=stop)
    [choice], generation, _ = run(tokenizer, cut(token_ids, sizes, end), stop=stop)
    assert choice == expected
    assert generation.usage() == one_by_one.usage()


def test_tokens_after_a_stop_string_are_neither_shown_nor_counted(tokenizer: Tokenizer) -> None:
    token_ids = [*b"ab#cd"]
    ids = [tokenizer.encode(chr(byte))[0] for byte in token_ids]
    [choice], generation, engine = run(tokenizer, [(0, delta_of(ids))], stop=["#"])
    assert choice.text == "ab"
    assert [token.token_id for token in choice.tokens] == ids[:2]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "#")
    assert generation.usage().completion_tokens == 3
    assert engine.aborted == [0]


def test_a_choice_that_the_engine_ended_with_the_stop_string_is_not_aborted(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a#")
    _, _, engine = run(tokenizer, [(0, delta_of(ids, finish_reason="length"))], stop=["#"])
    assert engine.aborted == []


def test_deltas_of_a_choice_that_has_ended_are_dropped(tokenizer: Tokenizer) -> None:
    late, other = tokenizer.encode("a#")[0], tokenizer.encode("b")
    deltas = [
        (0, delta_of(tokenizer.encode("a#"))),
        (0, delta_of([late, late])),
        (1, delta_of(other)),
        (0, delta_of([late], finish_reason="abort")),
        (1, delta_of(other, finish_reason="length")),
    ]
    choices, generation, _ = run(tokenizer, deltas, num_choices=2, stop=["#"])
    assert [choice.text for choice in choices] == ["a", "bb"]
    assert [choice.finish_reason for choice in choices] == ["stop", "length"]
    usage = generation.usage()
    assert usage.prompt_tokens == 3
    assert usage.completion_tokens == len(tokenizer.encode("a#")) + 2


def test_only_the_clients_own_stop_token_is_a_stop_reason(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens["<|im_end|>"]
    deltas = cut(tokenizer.encode("a"), [1], end)
    [choice], _, _ = run(tokenizer, deltas)
    assert choice.stop_reason is None
    [choice], _, _ = run(tokenizer, deltas, own_stop_token_ids=frozenset({end}))
    assert choice.stop_reason == end


def test_a_request_that_the_engine_gave_up_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="gave up"):
        run(tokenizer, [(0, delta_of([5], finish_reason="abort"))])


def test_an_engine_that_ends_before_all_choices_is_an_error(tokenizer: Tokenizer) -> None:
    deltas = [(0, delta_of([5], finish_reason="length")), (1, delta_of([5]))]
    with pytest.raises(EngineDiedError, match="1 of 2 choices"):
        run(tokenizer, deltas, num_choices=2)
