"""Each data set's lengths, as ids and as text that encodes to exactly that many tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import write_tiny_tokenizer

from benchmarks.serving.command_line import parse_arguments
from benchmarks.serving.datasets import draw_lens, make_requests
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.flags import read_dataset_options
from benchmarks.serving.prompts import PromptMaker, find_tokenizer, find_vocab_size
from benchmarks.serving.results import BenchRequest
from engine.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def dataset(
    *flags: str, tokenizer: Tokenizer | None = None, wants_text: bool = False
) -> list[BenchRequest]:
    options = read_dataset_options(parse_arguments(flags))
    rng = np.random.default_rng(options.seed)
    prompts = PromptMaker(rng, tokenizer=tokenizer, vocab_size=400, wants_text=wants_text)
    return make_requests(options, prompts, rng)


RANDOM = ("--num-prompts", "40", "--random-input", "50", "--random-output", "20")


def test_a_range_ratio_of_one_makes_all_lengths_equal():
    requests = dataset(*RANDOM, "--random-range-ratio", "1")
    assert {len(request.prompt) for request in requests} == {50}
    assert {request.output_len for request in requests} == {20}
    assert len({tuple(request.prompt) for request in requests}) == 40


def test_lengths_are_drawn_between_the_ratio_and_the_whole():
    lens = draw_lens(10, 0.5, 2000, np.random.default_rng(0))
    assert set(lens.tolist()) == {5, 6, 7, 8, 9, 10}
    assert set(draw_lens(3, 0.0, 200, np.random.default_rng(0)).tolist()) == {1, 2, 3}


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    assert dataset(*RANDOM) == dataset(*RANDOM)
    assert dataset(*RANDOM) != dataset(*RANDOM, "--seed", "2")


def test_random_text_encodes_to_exactly_its_length(tokenizer):
    requests = dataset(*RANDOM, tokenizer=tokenizer, wants_text=True)
    for request in requests:
        assert isinstance(request.prompt, str)
        assert len(tokenizer.encode(request.prompt)) == request.prompt_len
    assert len({str(request.prompt) for request in requests}) > 30


def test_random_text_of_a_real_vocabulary_encodes_to_exactly_its_length(demo_checkpoint):
    tokenizer = load_tokenizer(demo_checkpoint)
    requests = dataset(*RANDOM, tokenizer=tokenizer, wants_text=True)
    assert [len(tokenizer.encode(str(r.prompt))) for r in requests] == [
        r.prompt_len for r in requests
    ]


def test_drawn_ids_are_never_special(tokenizer):
    special = set(tokenizer.special_tokens.values())
    for request in dataset(*RANDOM, tokenizer=tokenizer):
        assert not special & set(request.prompt)


def test_random_with_a_file_repeats_or_cuts_its_texts(tokenizer, tmp_path):
    texts = ["The quick brown fox jumps. ", "user: Tell me a story. " * 40]
    path = write_conversations(tmp_path, [(text, "fine") for text in texts])
    flags = ("--random-range-ratio", "1", "--dataset-path", str(path))
    for request in dataset(*RANDOM, *flags, tokenizer=tokenizer, wants_text=True):
        assert len(tokenizer.encode(str(request.prompt))) == 50
        assert str(request.prompt)[:9] in ("The quick", "user: Tel")


def test_prompts_of_a_group_begin_with_the_same_system_prompt(tokenizer):
    flags = ("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "3")
    flags += ("--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "30")
    flags += ("--gsp-question-len", "10", "--gsp-output-len", "7", "--gsp-ordered")
    requests = dataset(*flags)
    assert [(len(r.prompt), r.prompt_len, r.output_len) for r in requests] == [(40, 40, 7)] * 12
    prefixes = [tuple(request.prompt[:30]) for request in requests]
    assert len(set(prefixes)) == 3
    assert prefixes == sorted(prefixes, key=prefixes.index)
    for request in dataset(*flags, tokenizer=tokenizer, wants_text=True):
        assert len(tokenizer.encode(str(request.prompt))) == 40
    shuffled = dataset(*flags[:-1])
    assert {tuple(request.prompt[:30]) for request in shuffled} == set(prefixes)


def write_conversations(directory: Path, turns: list[tuple[str, str]]) -> Path:
    rows = [{"conversations": [{"value": text} for text in pair]} for pair in turns]
    rows.append({"conversations": [{"value": "nobody answered"}]})
    path = directory / "sharegpt.json"
    path.write_text(json.dumps(rows))
    return path


def test_sharegpt_asks_the_question_and_wants_as_many_tokens_as_the_answer(tokenizer, tmp_path):
    turns = [("How are you today?", "I am fine, thank you."), ("Tell me a story.", "x")]
    path = write_conversations(tmp_path, turns)
    flags = ("--dataset-name", "sharegpt", "--dataset-path", str(path))
    (request,) = dataset(*flags, tokenizer=tokenizer, wants_text=True)
    assert request.prompt == "How are you today?"
    assert request.prompt_len == len(tokenizer.encode("How are you today?"))
    assert request.output_len == len(tokenizer.encode("I am fine, thank you."))
    requests = dataset(*flags, "--sharegpt-output-len", "9", tokenizer=tokenizer)
    assert [request.output_len for request in requests] == [9, 9]
    (ids,) = dataset(*flags, "--tokenize-prompt", tokenizer=tokenizer)
    assert ids.prompt == tokenizer.encode("How are you today?")
    with pytest.raises(BenchmarkError, match="no usable row"):
        dataset(*flags, "--sharegpt-context-len", "4", tokenizer=tokenizer)


def test_sharegpt_without_a_file_or_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(BenchmarkError, match="needs --dataset-path"):
        dataset("--dataset-name", "sharegpt")
    path = write_conversations(tmp_path, [("How are you?", "Fine.")])
    flags = ("--dataset-name", "sharegpt", "--dataset-path", str(path))
    with pytest.raises(BenchmarkError, match="--sharegpt-output-len"):
        dataset(*flags)
    (request,) = dataset(*flags, "--sharegpt-output-len", "5")
    assert (request.prompt, request.prompt_len, request.output_len) == ("How are you?", None, 5)


def test_custom_rows_may_be_ids_text_or_conversations(tokenizer, tmp_path):
    path = tmp_path / "custom.jsonl"
    rows = [
        {"prompt": [5, 6, 7], "output_tokens": 11},
        {"prompt": "a story", "output_len": 12},
        {"conversations": [{"content": "How?"}, {"content": "thank you"}]},
        {"prompt": "user"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--dataset-name", "custom", "--dataset-path", str(path))
    requests = dataset(*flags, tokenizer=tokenizer)
    assert [request.prompt for request in requests] == [[5, 6, 7], "a story", "How?", "user"]
    assert [request.output_len for request in requests] == [
        11,
        12,
        len(tokenizer.encode("thank you")),
        256,
    ]
    assert requests[0].prompt_len == 3
    fixed = dataset(*flags, "--custom-output-len", "4", "--num-prompts", "2", tokenizer=tokenizer)
    assert [request.output_len for request in fixed] == [4, 4]


@pytest.mark.parametrize("content", ["no json", "[1, 2]", '{"question": "?"}'])
def test_a_file_that_is_no_data_set_is_refused_by_name(content, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=r"wrong\.json"):
        dataset("--dataset-name", "custom", "--dataset-path", str(path))


def test_a_local_model_brings_its_tokenizer_and_vocabulary(tmp_path):
    assert find_tokenizer(None, None, "tiny", str(tmp_path)) is None
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert find_tokenizer(None, "tiny", str(tmp_path)) is not None
    assert find_vocab_size("tiny", str(tmp_path)) == 77
    with pytest.raises(BenchmarkError, match="--tokenizer="):
        find_tokenizer(str(tmp_path / "absent"))
