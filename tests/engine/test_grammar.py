"""Grammars followed token by token, against jsonschema and Python's regular expressions."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from tiny_tokenizer import write_tiny_tokenizer

from engine.errors import RequestError
from engine.grammar import (
    MAX_GRAMMAR_CHARS,
    Constraint,
    Grammar,
    GrammarCompiler,
    choice_source,
    ebnf_source,
    json_schema_source,
    regex_source,
)
from engine.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def end_token_id(tokenizer: Tokenizer) -> int:
    return tokenizer.special_tokens["<|im_end|>"]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, end_token_id: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, end_token_ids=[end_token_id])


def allowed(constraint: Constraint) -> list[int]:
    words = constraint.allowed_tokens()
    assert words is not None
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def takes(compiler: GrammarCompiler, source: str, token_ids: Sequence[int]) -> bool:
    """Whether a grammar lets exactly this be an answer: all tokens, and an end behind them."""
    constraint = compiler.constraint(Grammar(source))
    for token_id in token_ids:
        if token_id not in allowed(constraint):
            return False
        constraint.accept(token_id)
    return constraint.error is None


def walk(
    constraint: Constraint, end_token_id: int, rng: random.Random, max_tokens: int
) -> list[int] | None:
    """Any answer that the grammar allows, or None if it has not ended by then."""
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        choices = allowed(constraint)
        assert choices
        if end_token_id in choices:
            return token_ids
        token_ids.append(rng.choice(choices))
        constraint.accept(token_ids[-1])
        assert constraint.error is None
    return None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
}
ENUM = [f"v{number}" for number in range(90)]
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"enum": [1, "two", None, {"three": 3}]},
    {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 3}, "maxItems": 5},
    {"type": "string", "pattern": "^[a-f]{2,5}$"},
    {"type": "string", "format": "date"},
    {
        "$defs": {"x": {"type": "boolean"}},
        "type": "object",
        "properties": {"y": {"$ref": "#/$defs/x"}},
        "required": ["y"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_whatever_a_schema_lets_through_is_valid(
    schema: dict[str, Any], compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    source = json_schema_source(schema, param="schema")
    rng = random.Random(1)
    texts = set()
    for _ in range(20):
        answer = walk(compiler.constraint(Grammar(source)), end_token_id, rng, 400)
        if answer is not None:
            text = b"".join(map(tokenizer.token_bytes, answer)).decode()
            validator.validate(json.loads(text))
            texts.add(text)
    assert texts


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        ({"name": "Bob", "age": 30, "next": None}, True),
        ({"name": "Bob", "age": 30, "tags": ["a", "b"], "next": True}, True),
        ({"name": "Bob", "age": 151, "next": None}, False),
        ({"name": "Bob", "age": 3.5, "next": None}, False),
        ({"name": "Bob", "next": None}, False),
        ({"name": "Bob", "age": 30, "next": None, "more": 1}, False),
        ({"name": "much too long a name", "age": 30, "next": None}, False),
        ({"name": "Bob", "age": 30, "tags": ["c"], "next": None}, False),
    ],
)
def test_what_is_not_valid_is_not_let_through(
    value: Any,
    is_valid: bool,
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    end_token_id: int,
) -> None:
    assert jsonschema.Draft202012Validator(PERSON).is_valid(value) == is_valid
    source = json_schema_source(PERSON, param="schema")
    answer = [*tokenizer.encode(json.dumps(value)), end_token_id]
    assert takes(compiler, source, answer) == is_valid


def test_blanks_are_those_of_the_pattern(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    plain = json_schema_source(schema, param="schema")
    wide = json_schema_source(schema, param="schema", whitespace_pattern=r"[ \n]{0,3}")

    def is_taken(source: str, text: str) -> bool:
        return takes(compiler, source, [*tokenizer.encode(text), end_token_id])

    assert [is_taken(plain, text) for text in ("[1, 2]", "[1,2]", "[1,\n 2 ]")] == [
        True,
        False,
        False,
    ]
    assert [is_taken(wide, text) for text in ("[1, 2]", "[1,2]", "[1,\n 2 ]", "[     1]")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("regex", [r"[ab]{3}", r"(yes|no|maybe)!?", r"[0-9]{4}-[0-9]{2}"])
def test_an_answer_matches_the_whole_regular_expression(
    regex: str, compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    source = regex_source(regex, param="regex")
    rng = random.Random(2)
    for _ in range(10):
        answer = walk(compiler.constraint(Grammar(source)), end_token_id, rng, 50)
        assert answer is not None
        text = b"".join(map(tokenizer.token_bytes, answer)).decode()
        assert re.fullmatch(regex, text)


def test_one_of_the_choices_comes_whole(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    choices = ["yes", 'no "never"', "yes\nand no"]
    source = choice_source(choices, param="choice")
    for text, is_choice in [*((choice, True) for choice in choices), ("ye", False), ("no", False)]:
        assert takes(compiler, source, [*tokenizer.encode(text), end_token_id]) == is_choice


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "(" start ")" | "x"',
        'root ::= "(" root ")" | "x"',
    ],
    ids=["Lark", "GBNF"],
)
def test_a_grammar_may_be_written_in_two_notations(
    grammar: str, compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    source = ebnf_source(grammar, param="grammar")
    for text, is_word in (("x", True), ("((x))", True), ("((x)", False), ("()", False)):
        assert takes(compiler, source, [*tokenizer.encode(text), end_token_id]) == is_word


def test_an_answer_goes_on_behind_tokens_that_have_come(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = Grammar(json_schema_source(PERSON, param="schema"))
    whole = compiler.constraint(grammar)
    token_ids = tokenizer.encode('{"name": "Bob", "age": 30, "next": null}')
    for num_past, token_id in enumerate(token_ids):
        resumed = compiler.constraint(grammar, token_ids[:num_past])
        assert allowed(resumed) == allowed(whole)
        whole.accept(token_id)


def test_what_must_come_is_known_as_the_tokenizer_would_split_it(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    schema = {
        "type": "object",
        "properties": {"first": {"type": "boolean"}, "second": {"const": "always this"}},
        "required": ["first", "second"],
        "additionalProperties": False,
    }
    grammar = Grammar(json_schema_source(schema, param="schema"))
    constraint = compiler.constraint(grammar)
    token_ids: list[int] = []
    runs = []
    while end_token_id not in allowed(constraint):
        run = constraint.forced_tokens()
        runs.append(b"".join(map(tokenizer.token_bytes, run)).decode())
        for place, token_id in enumerate(run):
            assert allowed(constraint) == [token_id]
            # Whoever goes on in the midst of it knows the rest.
            resumed = compiler.constraint(grammar, token_ids)
            assert resumed.forced_tokens() == run[place:]
            constraint.accept(token_id)
            token_ids.append(token_id)
        assert not constraint.forced_tokens()
        choices = allowed(constraint)
        if end_token_id not in choices:
            assert len(choices) > 1
            # The longest that begins one of the two.
            token_ids.append(max(choices, key=lambda each: len(tokenizer.token_bytes(each))))
            constraint.accept(token_ids[-1])
    text = b"".join(map(tokenizer.token_bytes, token_ids)).decode()
    jsonschema.validate(json.loads(text), schema)
    assert '{"first":'.startswith(runs[0])
    assert len(runs[0]) > 5
    assert any("second" in run and "always" in run for run in runs[1:])


def test_a_run_of_any_length_must_come_in_bounded_time(compiler: GrammarCompiler) -> None:
    """Timed by the test's own limit; a grammar may ask for it in a few bytes."""
    try:
        constraint = compiler.constraint(Grammar(regex_source("a{40000}", param="regex")))
    except RequestError:
        return
    assert len(constraint.forced_tokens()) <= 40000


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("minimum", "Ù" * 80),
        ("maxLength", "Ù" * 80),
        ("required", "Ù" * 80),
        ("pattern", ["xÙ" * 80]),
        ("format", ["xÙ" * 80]),
        ("$ref", ["xÙ" * 80]),
    ],
)
def test_what_the_library_panics_on_is_refused(keyword: str, value: Any) -> None:
    # Its message quotes so many bytes of the value, the last of them amid a character.
    with pytest.raises(RequestError) as caught:
        json_schema_source({keyword: value}, param="schema")
    assert caught.value.param == "schema"


def test_thinking_comes_before_the_grammar_and_has_an_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, end_token_id: int
) -> None:
    end_of_thinking = tokenizer.encode("<think>")[0]
    source = choice_source(["yes", "no"], param="choice")
    free = compiler.constraint(Grammar(source, after_token_id=end_of_thinking))
    for token_id in tokenizer.encode("anything [ at all"):
        assert free.allowed_tokens() is None
        free.accept(token_id)
    free.accept(end_of_thinking)
    first = {tokenizer.token_bytes(token_id)[:1] for token_id in allowed(free)}
    assert first == {b"y", b"n"}

    bounded = compiler.constraint(
        Grammar(source, after_token_id=end_of_thinking, max_tokens_before=2)
    )
    for token_id in tokenizer.encode("a b")[:2]:
        assert bounded.allowed_tokens() is None
        bounded.accept(token_id)
    assert allowed(bounded) == [end_of_thinking]
    bounded.accept(end_of_thinking)
    assert {tokenizer.token_bytes(token_id)[:1] for token_id in allowed(bounded)} == first

    # A bound on thinking alone.
    unbound = compiler.constraint(Grammar("", after_token_id=end_of_thinking, max_tokens_before=0))
    assert allowed(unbound) == [end_of_thinking]
    unbound.accept(end_of_thinking)
    assert end_token_id in allowed(unbound)
    assert len(allowed(unbound)) > 200


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "string", "pattern": "("},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"not": {"type": "string"}},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "file:///etc/passwd"},
        {"enum": ["x" * MAX_GRAMMAR_CHARS]},
        {"type": "object", "properties": {f"k{i}": {"enum": ENUM} for i in range(700)}},
        False,
    ],
    ids=range(9),
)
def test_a_schema_that_cannot_be_followed_is_refused_by_its_name(schema: Any) -> None:
    with pytest.raises(RequestError, match="response_format") as refusal:
        json_schema_source(schema, param="response_format")
    assert refusal.value.param == "response_format"
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize("regex", ["(", "a{2,1}", r"\p{Nonsense}", r"(?<=a)b"])
def test_a_regular_expression_that_cannot_be_followed_is_refused(regex: str) -> None:
    with pytest.raises(RequestError, match="guided_regex"):
        regex_source(regex, param="guided_regex")


@pytest.mark.parametrize("grammar", ["", "start: a", 'root ::= "a', "("])
def test_a_grammar_that_cannot_be_read_is_refused(grammar: str) -> None:
    with pytest.raises(RequestError, match="ebnf"):
        ebnf_source(grammar, param="ebnf")


def test_a_grammar_that_leads_nowhere_is_refused_before_its_first_token(
    compiler: GrammarCompiler,
) -> None:
    source = ebnf_source('start: start "a"', param="ebnf")
    with pytest.raises(RequestError, match="cannot be followed"):
        compiler.constraint(Grammar(source))


def test_a_grammar_that_grows_too_complex_amid_an_answer_says_so(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    # Of n letters, any may be the first of the last part: the places grow with the answer.
    source = ebnf_source('start: part\npart: part part | "a"', param="ebnf")
    constraint = compiler.constraint(Grammar(source))
    [letter] = tokenizer.encode("a")
    for _ in range(1000):
        assert letter in allowed(constraint)
        constraint.accept(letter)
        if constraint.error is not None:
            break
    assert constraint.error
