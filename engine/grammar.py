"""Structured output: a grammar, and before each token which ones may come.

Grammars are written in llguidance's notation, whatever a client gave: a JSON schema, a regular
expression, choices, a grammar in EBNF. Whoever spells one needs no model; to follow one takes the
model's vocabulary. Knows neither requests nor queues, and no arrays of devices.
"""

import contextlib
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import llguidance
import msgspec
import numpy as np

from engine.errors import RequestError

MAX_GRAMMAR_CHARS = 256 * 1024
"""Of a schema or a grammar as the client wrote it."""

NUM_KEPT_GRAMMARS = 256
"""How many are kept compiled, the latest used."""

# What one grammar may take: a tenth of a second at its start, 20 ms at each token, and 50 MB.
# Beyond, it is refused, or the answer ends in an error. Items are the places in the grammar where
# an answer may be; a token costs their third power, and of 560 schemas in use none has 500.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=500,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# As models are trained to write JSON, without a choice of blanks: an answer cannot run away in
# them, and what lies between two values is certain before it is generated.
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer may be.

    Attributes:
        source: In llguidance's notation; empty = anything.
        after_token_id: The grammar begins behind the first such token of the answer (the end of a
            model's thinking); None = at once.
        max_tokens_before: So many tokens may come before that one, which then must.
    """

    source: str
    after_token_id: int | None = None
    max_tokens_before: int | None = None


class Vocabulary(Protocol):
    """What of a tokenizer a grammar needs; see `engine.text.tokenizer.Tokenizer`."""

    vocab_size: int
    special_tokens: Mapping[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def json_schema_source(
    schema: Mapping[str, Any], *, param: str, whitespace_pattern: str | None = None
) -> str:
    """Spell a JSON schema.

    Args:
        schema: The schema.
        param: What the client called it, for errors.
        whitespace_pattern: A regular expression of what may stand between two tokens of JSON; None
            for a blank behind colons and commas.

    Raises:
        RequestError: No JSON schema, one with keywords that cannot be followed, or too large.
    """
    options: Any = COMPACT_JSON
    if whitespace_pattern is not None:
        options = {"whitespace_pattern": whitespace_pattern}
    text = json.dumps(schema)
    _check_size(text, param)
    try:
        with _panics_refused(param):
            source = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)
    except ValueError as error:
        raise RequestError(f"{param} is no JSON schema: {error}.", param=param) from error
    return checked(source, param=param)


def regex_source(regex: str, *, param: str) -> str:
    """Spell a regular expression, of which the whole answer is a match; raises as above."""
    _check_size(regex, param)
    with _panics_refused(param):
        source = llguidance.LLMatcher.grammar_from_regex(regex)
    return checked(source, param=param)


def choice_source(choices: Sequence[str], *, param: str) -> str:
    """Spell a choice of whole answers; raises as above."""
    text = json.dumps(list(choices))
    _check_size(text, param)
    with _panics_refused(param):
        source = llguidance.grammar_from("choice", text)
    return checked(source, param=param)


def ebnf_source(grammar: str, *, param: str) -> str:
    """Spell a grammar that is written in Lark's notation or in GBNF; raises as above."""
    _check_size(grammar, param)
    try:
        with _panics_refused(param):
            source = llguidance.grammar_from("grammar", grammar)
    except ValueError as error:
        raise RequestError(f"{param} is no grammar: {error}.", param=param) from error
    return checked(source, param=param)


def checked(source: str, *, param: str) -> str:
    """Return a grammar in llguidance's notation that can be followed.

    Raises:
        RequestError: It cannot.
    """
    with _panics_refused(param):
        fault = llguidance.LLMatcher.validate_grammar(source, limits=_LIMITS)
    if fault and not fault.startswith("WARNING"):
        raise RequestError(f"{param} cannot be followed: {fault.strip()[:500]}", param=param)
    return source


class Constraint:
    """Follows one answer through its grammar; a `TokenConstraint` of `engine.request`."""

    def __init__(self, matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
        self._matcher = matcher
        self._after_token_id = grammar.after_token_id
        self._num_left_before = grammar.max_tokens_before
        # The matcher is behind these already.
        self._forced: deque[int] = deque()
        self._has_panicked = False
        if self._after_token_id is None:
            self._force()

    @property
    def error(self) -> str | None:
        """Why it can go no further, or None: the grammar takes too much, or leads nowhere."""
        if self._has_panicked:
            return "the grammar's library failed"
        return self._matcher.get_error().splitlines()[0] if self._matcher.is_error() else None

    def allowed_tokens(self) -> np.ndarray | None:
        if self._forced:
            return _only(self._forced[0])
        if self._after_token_id is None:
            with self._panics_noted():
                return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return None if self._num_left_before != 0 else _only(self._after_token_id)

    def accept(self, token_id: int) -> None:
        if self._forced:
            self._forced.popleft()
        elif self._after_token_id is None:
            with self._panics_noted():
                self._matcher.consume_token(token_id)
            self._force()
        elif token_id == self._after_token_id:
            self._after_token_id = None
            self._force()
        elif self._num_left_before:
            self._num_left_before -= 1

    def forced_tokens(self) -> list[int]:
        return list(self._forced)

    def _force(self) -> None:
        """See which tokens must come next.

        They come as the tokenizer would split their text, whether or not the engine makes use of
        knowing them, so that an answer does not depend on what else runs.
        """
        if self._has_panicked or self._matcher.is_stopped():
            return
        with self._panics_noted():
            forced = self._matcher.compute_ff_tokens()
            if forced and self._matcher.consume_tokens(forced):
                self._forced.extend(forced)

    @contextlib.contextmanager
    def _panics_noted(self) -> Iterator[None]:
        """Let a panic of the library end this answer, and not the engine."""
        try:
            yield
        except BaseException as error:
            if not _is_panic(error):
                raise
            self._has_panicked = True


def _only(token_id: int) -> np.ndarray:
    words = np.zeros(token_id // 32 + 1, np.uint32)
    words[-1] = 1 << (token_id % 32)
    return words


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary, and keeps them. Safe to use from threads.

    Making one takes a second or two for 150,000 tokens.

    Args:
        vocabulary: The model's tokenizer.
        end_token_ids: One of them may come where the grammar is satisfied.
    """

    def __init__(self, vocabulary: Vocabulary, *, end_token_ids: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary, end_token_ids)),
            eos_token=list(end_token_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def constraint(self, grammar: Grammar, past_token_ids: Sequence[int] = ()) -> Constraint:
        """Begin to follow a grammar, or go on with an answer of which some tokens have come.

        Raises:
            RequestError: No answer satisfies it, or it takes too much.
        """
        matcher = self._compiled(grammar.source).deep_copy()
        constraint = Constraint(matcher, grammar)
        for token_id in past_token_ids:
            constraint.accept(token_id)
        return constraint

    def _compiled(self, source: str) -> llguidance.LLMatcher:
        with self._lock:
            matcher = self._kept.get(source)
            if matcher is not None:
                self._kept.move_to_end(source)
                return matcher
        matcher = self._compile(source or _ANYTHING)
        with self._lock:
            self._kept[source] = matcher
            while len(self._kept) > NUM_KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return matcher

    def _compile(self, source: str) -> llguidance.LLMatcher:
        with _panics_refused(None):
            matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                # Some faults, as a rule that never ends, show with the first token only.
                matcher.compute_bitmask()
        if matcher.is_error():
            fault = matcher.get_error().strip()[:500]
            raise RequestError(f"The answer's grammar cannot be followed: {fault}")
        return matcher


_ANYTHING = r"start: /(.|\n)*/"
# By which llguidance knows a token that is no text.
_SPECIAL_MARK = b"\xff"


class _Tokens:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, end_token_ids: Sequence[int]) -> None:
        special_ids = {*vocabulary.special_tokens.values(), *end_token_ids}
        self.eos_token_id = end_token_ids[0]
        # A model may end with a token that its tokenizer does not know.
        num_tokens = max(vocabulary.vocab_size, max(end_token_ids) + 1)
        self.tokens = [
            _SPECIAL_MARK * (token_id in special_ids) + vocabulary.token_bytes(token_id)
            for token_id in range(num_tokens)
        ]
        self._vocabulary = vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        return self._vocabulary.encode(text if isinstance(text, str) else text.decode())


def _is_panic(error: BaseException) -> bool:
    """Whether it is a fault of a library in Rust, which is none of Python's `Exception`s."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _panics_refused(param: str | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise RequestError(
            f"{param or 'The grammar'} cannot be followed: the grammar's library failed on it.",
            param=param,
        ) from error


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"{param} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} may be.", param=param
        )
