import base64
import importlib.metadata
import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import SPECIAL_TOKENS, write_tiny_tokenizer

from engine.errors import CheckpointError, RequestError
from engine.text.tokenizer import (
    QWEN_PATTERN,
    JsonTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
)

VARIED_TEXTS = {
    "english": "It's a truth universally acknowledged, that we'll need 12345 tokens.",
    "chinese": "通义千问是阿里云研发的大语言模型，你好世界！１２３",
    "arabic": "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣",
    "devanagari": "नमस्ते दुनिया",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 ☃️ e\u0301 ﬁ",
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # ok\r\n\r\n",
    "whitespace": " " * 300 + "\n" * 50 + "\t" * 70 + "x" + " " * 129,
    "decomposed": unicodedata.normalize("NFD", "Ünïcödé Tiếng Việt 한국어"),
    "controls": "\x00\x01\ufeff\u200b\ud7ff\U0010ffff",
    "long word": "aB" * 700,
    "digits": "3.14159265358979" * 20,
}


class SlowQwenTokenizer:
    """Byte-pair encoding as its definition says it: merge the pair of lowest rank, again and again.

    Reads the same file, and shares no code with the tokenizer under test but the pattern.
    """

    def __init__(self, path: Path) -> None:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        self._ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self._specials = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        token_ids: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, self._specials)) + ")", text):
            if piece in self._specials:
                token_ids.append(self._specials[piece])
                continue
            for word in regex.findall(QWEN_PATTERN, piece):
                token_ids += self._encode_word(word.encode())
        return token_ids

    def _encode_word(self, word: bytes) -> list[int]:
        parts = [word[index : index + 1] for index in range(len(word))]
        while True:
            ranked = [
                (self._ranks[left + right], index)
                for index, (left, right) in enumerate(itertools.pairwise(parts))
                if left + right in self._ranks
            ]
            if not ranked:
                return [self._ranks[part] for part in parts]
            _, index = min(ranked)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]


@pytest.fixture(scope="session")
def qwen_tiktoken() -> Path:
    """Qwen's own vocabulary, as the dashscope package carries it (it is not imported)."""
    files = importlib.metadata.files("dashscope") or []
    [path] = [Path(str(file.locate())) for file in files if file.name == "qwen.tiktoken"]
    return path


@pytest.fixture(scope="session")
def qwen(qwen_tiktoken: Path) -> TiktokenTokenizer:
    return TiktokenTokenizer(qwen_tiktoken)


@pytest.fixture(scope="session")
def slow_qwen(qwen_tiktoken: Path) -> SlowQwenTokenizer:
    return SlowQwenTokenizer(qwen_tiktoken)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("name", VARIED_TEXTS)
def test_qwen_tokens_are_those_of_plain_byte_pair_encoding(
    name: str, qwen: TiktokenTokenizer, slow_qwen: SlowQwenTokenizer
) -> None:
    assert qwen.encode(VARIED_TEXTS[name]) == slow_qwen.encode(VARIED_TEXTS[name])


@given(text=st.text(max_size=60))
def test_qwen_tokens_of_any_text_are_those_of_plain_byte_pair_encoding(
    text: str, qwen: TiktokenTokenizer, slow_qwen: SlowQwenTokenizer
) -> None:
    assert qwen.encode(text) == slow_qwen.encode(text)


@pytest.mark.parametrize("name", VARIED_TEXTS)
def test_qwen_token_bytes_give_back_the_normalised_text(name: str, qwen: TiktokenTokenizer) -> None:
    text = VARIED_TEXTS[name]
    spelled = b"".join(map(qwen.token_bytes, qwen.encode(text)))
    assert spelled.decode() == unicodedata.normalize("NFC", text)


def test_qwen_special_tokens_have_the_ids_of_the_checkpoints(qwen: TiktokenTokenizer) -> None:
    assert qwen.special_tokens["<|endoftext|>"] == 151643
    assert qwen.special_tokens["<|im_start|>"] == 151644
    assert qwen.special_tokens["<|im_end|>"] == 151645
    assert qwen.special_tokens["<|extra_0|>"] == 151646
    assert qwen.vocab_size == 151851
    assert qwen.eos_token == "<|endoftext|>"
    assert qwen.encode("<|im_start|>user") == [151644, *qwen.encode("user")]


def test_ids_beyond_the_vocabulary_have_no_bytes(qwen: TiktokenTokenizer, tiny: Tokenizer) -> None:
    # Models pad their vocabulary, so such an id can be sampled.
    assert qwen.token_bytes(151935) == b""
    assert tiny.token_bytes(100_000) == b""
    assert tiny.token_bytes(-1) == b""


@pytest.mark.parametrize("unit", [" ", "a", "\n", "!", "é", "\u3000"])
def test_a_long_run_of_one_character_is_encoded(unit: str, qwen: TiktokenTokenizer) -> None:
    text = unit * 200_000
    assert b"".join(map(qwen.token_bytes, qwen.encode(text))).decode() == text


def test_a_run_that_is_too_long_for_the_pattern_is_refused(qwen: TiktokenTokenizer) -> None:
    with pytest.raises(RequestError, match="cannot split this text"):
        qwen.encode(" " * 2_000_000)


@given(text=st.text(max_size=200))
def test_json_tokenizer_equals_the_tokenizers_library(text: str, tiny: Tokenizer) -> None:
    token_ids = tiny.encode(text)
    assert b"".join(map(tiny.token_bytes, token_ids)).decode() == text


def test_token_bytes_equal_the_librarys_decoding_of_each_token(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path) / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    tiny = JsonTokenizer(path)
    assert tiny.vocab_size == library.get_vocab_size()
    for token_id in range(tiny.vocab_size):
        expected = library.decode([token_id], skip_special_tokens=False)
        assert tiny.token_bytes(token_id).decode(errors="replace") == expected


def test_special_tokens_in_a_text_are_parsed_and_can_be_found(tiny: Tokenizer) -> None:
    end = tiny.special_tokens["<|im_end|>"]
    assert tiny.encode("fox<|im_end|>fox") == [*tiny.encode("fox"), end, *tiny.encode("fox")]
    assert tiny.find_special("fox<|im_end|>fox") == "<|im_end|>"
    assert tiny.find_special("fox <think> im_end") is None


def test_only_special_added_tokens_count_as_special(tiny: Tokenizer) -> None:
    assert set(tiny.special_tokens) == set(SPECIAL_TOKENS)
    assert tiny.token_id("<think>") is not None
    assert tiny.token_bytes(tiny.token_id("<think>") or 0) == b"<think>"


def test_the_end_token_is_read_in_old_and_new_spelling(tmp_path: Path) -> None:
    directory = write_tiny_tokenizer(tmp_path)
    assert load_tokenizer(directory).eos_token == "<|im_end|>"
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(directory).eos_token == "<|endoftext|>"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor qwen\.tiktoken"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    path = write_tiny_tokenizer(tmp_path) / "tokenizer.json"
    description = json.loads(path.read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="byte-level"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "Nonsense"}}'])
def test_a_broken_tokenizer_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["IQ== 0\nIg==", "IQ== 0\nIg== 2", "!!! 0"])
def test_a_broken_qwen_tiktoken_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken"):
        load_tokenizer(tmp_path)
