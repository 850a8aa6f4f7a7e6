import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.text.detokenizer import Detokenizer

END = 256


class ByteTokenizer:
    """Ids below 256 are bytes; 256 is a special end token; longer tokens follow."""

    vocab_size = 1000
    special_tokens: Mapping[str, int] = {"<|end|>": END}
    eos_token: str | None = "<|end|>"
    bos_token: str | None = None

    def __init__(self, tokens: Sequence[bytes] = ()) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)] + [b"<|end|>", *tokens]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < len(self._tokens) else b""

    def token_id(self, token: str) -> int | None:
        return self.special_tokens.get(token)

    def find_special(self, text: str) -> str | None:
        return "<|end|>" if "<|end|>" in text else None


def run(tokens: Sequence[bytes], **options: object) -> tuple[list[str], Detokenizer]:
    """Push tokens until a stop; the pieces given out, the last of them by `finish`."""
    detokenizer = Detokenizer(ByteTokenizer(tokens), **options)  # type: ignore[arg-type]
    pieces = []
    for index in range(len(tokens)):
        pieces.append(detokenizer.push(END + 1 + index).text)
        if detokenizer.stop_string is not None:
            return pieces, detokenizer
    pieces.append(detokenizer.finish().text)
    return pieces, detokenizer


def cut_first_stop(text: str, stop: Sequence[str], *, include: bool) -> str:
    """Slow oracle: grow the text character by character until it ends in a stop string."""
    for end in range(len(text) + 1):
        endings = [string for string in stop if text[:end].endswith(string)]
        if endings:
            return text[:end] if include else text[: end - max(map(len, endings))]
    return text


def splits(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(borders):
        yield data[start:end]


texts = st.text(alphabet="abcäあ👍\n ", max_size=30)
stop_strings = st.lists(st.text(alphabet="abcä👍\n", min_size=1, max_size=4), max_size=3)
cut_points = st.lists(st.integers(min_value=0, max_value=200), max_size=20)


@given(data=st.binary(max_size=40), cuts=cut_points)
def test_any_split_of_any_bytes_gives_the_same_text(data: bytes, cuts: list[int]) -> None:
    pieces, _ = run(list(splits(data, cuts)))
    assert "".join(pieces) == data.decode(errors="replace")


@given(text=texts, cuts=cut_points)
def test_no_piece_has_a_broken_character(text: str, cuts: list[int]) -> None:
    pieces, _ = run(list(splits(text.encode(), cuts)))
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=texts, stop=stop_strings, cuts=cut_points, include=st.booleans())
def test_any_split_stops_at_the_same_stop_string(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    pieces, detokenizer = run(list(splits(text.encode(), cuts)), stop=stop, include_stop=include)
    assert "".join(pieces) == cut_first_stop(text, stop, include=include)
    assert (detokenizer.stop_string is not None) == any(string in text for string in stop)


@given(text=texts, stop=stop_strings, cuts=cut_points)
def test_what_was_given_out_never_has_to_be_taken_back(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    pieces, _ = run(list(splits(text.encode(), cuts)), stop=stop)
    expected = cut_first_stop(text, stop, include=False)
    given_out = ""
    for piece in pieces:
        given_out += piece
        assert expected.startswith(given_out)


@given(text=texts, stop=stop_strings, cuts=cut_points)
def test_no_more_is_held_back_than_may_become_a_stop_string(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    assume(not any(string in text for string in stop))
    detokenizer = Detokenizer(ByteTokenizer(tokens := list(splits(text.encode(), cuts))), stop=stop)
    given_out, seen = "", b""
    for index, token in enumerate(tokens):
        seen += token
        given_out += detokenizer.push(END + 1 + index).text
        held = seen.decode(errors="ignore")[len(given_out) :]
        assert held == "" or any(string.startswith(held) for string in stop)


@given(data=st.binary(max_size=40), stop=stop_strings, cuts=cut_points)
def test_each_token_is_reported_once_and_not_before_its_text(
    data: bytes, stop: list[str], cuts: list[int]
) -> None:
    tokens = list(splits(data, cuts))
    detokenizer = Detokenizer(ByteTokenizer(tokens), stop=stop)
    num_reported, given_out = 0, ""
    for index in range(len(tokens)):
        delta = detokenizer.push(END + 1 + index)
        num_reported += delta.num_tokens
        given_out += delta.text
        # Reported tokens spell a beginning of what was given out.
        spelled = b"".join(tokens[:num_reported]).decode(errors="replace")
        assert len(spelled) <= len(given_out) + 1
        assert given_out.startswith(spelled.rstrip("\ufffd"))
        if detokenizer.stop_string is not None:
            return
    num_reported += detokenizer.finish().num_tokens
    assert num_reported == len(tokens)


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    pieces, detokenizer = run([b"42.", b"\nUs", b"er", b":", b" hi"], stop=["\nUser:"])
    assert pieces == ["42.", "", "", ""]
    assert detokenizer.stop_string == "\nUser:"
    assert detokenizer.num_tokens == 4


def test_what_looked_like_a_stop_string_comes_out_when_it_is_none() -> None:
    pieces, detokenizer = run([b"42.", b"\nUs", b"ed"], stop=["\nUser:"])
    assert pieces == ["42.", "", "\nUsed", ""]
    assert detokenizer.stop_string is None


def test_what_is_held_comes_out_at_the_end() -> None:
    pieces, _ = run([b"42.", b"\nUs"], stop=["\nUser:"])
    assert pieces == ["42.", "", "\nUs"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    pieces, _ = run([b"ok", "你".encode()[:2]])
    assert pieces == ["ok", "", "\ufffd"]


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    pieces, detokenizer = run([b"a", b"STOP", b"b", b"STOP", b"c"], stop=["STOP"], min_tokens=3)
    assert "".join(pieces) == "aSTOPb"
    assert detokenizer.num_tokens == 4


@pytest.mark.parametrize(("skip", "shown"), [(True, "ab"), (False, "a<|end|>b")])
def test_special_tokens_are_shown_only_if_asked_for(skip: bool, shown: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id).text for token_id in (ord("a"), END, ord("b"))]
    assert "".join(pieces) == shown


@pytest.mark.parametrize(
    ("include", "skip", "shown"),
    [(True, False, "<|end|>"), (True, True, ""), (False, False, ""), (False, True, "")],
)
def test_the_stop_token_is_shown_only_if_asked_for(include: bool, skip: bool, shown: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), include_stop=include, skip_special_tokens=skip)
    detokenizer.push(ord("a"))
    assert detokenizer.finish(END).text == shown
