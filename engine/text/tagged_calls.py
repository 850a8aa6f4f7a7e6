"""Answers in which calls of tools stand between <tool_call> and </tool_call>, text around them."""

from collections.abc import Callable
from typing import Protocol

from engine.text.answer_parts import AnswerPart, Content, held_len
from engine.text.tool_formats import literal, with_rule

BEGIN = "<tool_call>"
END = "</tool_call>"


def tagged_call_grammar(
    body_rules: str, *, is_call_required: bool, max_calls: int | None, text_source: str | None
) -> str:
    """Spell an answer of calls, or of text and calls; see `ToolFormat.grammar`.

    Args:
        body_rules: The rule `body`, of what stands between the marks, and what it takes.
    """
    begin, end, line = literal(BEGIN), literal("\n" + END), literal("\n")
    calls = "call"
    if max_calls != 1:
        more = "*" if max_calls is None else f"{{0,{max_calls - 1}}}"
        calls = f"call ({line} call){more}"
    call = f"call: {begin} {line} body {end}\n{body_rules}"
    if is_call_required:
        return f"start: {calls}\n{call}"
    if text_source is not None:
        return with_rule(f"start: @text | {calls}\n{call}", "text", text_source)
    # Text of any kind, until a call begins.
    more = "*" if max_calls is None else f"{{0,{max_calls}}}"
    return (
        f"start: call{more} text\n"
        "text: TEXT\n"
        "TEXT: /(.|\\n)*/\n"
        f"begin[lazy]: TEXT {begin}\n"
        f"call: begin {line} body {end}\n{body_rules}"
    )


class CallBody(Protocol):
    """Reads one call.

    Attributes:
        rest: What came behind the call's end; None as long as that has not come.
        is_call: A call has begun, and its arguments are given as they come.
    """

    rest: str | None
    is_call: bool

    def push(self, text: str) -> list[AnswerPart]:
        """Take more text; not after the end."""
        ...

    def finish(self) -> list[AnswerPart]:
        """The answer has ended before the call."""
        ...


class TaggedCallReader:
    """An `AnswerReader`.

    A line break before a call, and blanks behind one, belong to the call, as templates write them.

    Args:
        make_body: Makes what reads a call, given its number in the answer.
    """

    def __init__(self, make_body: Callable[[int], CallBody]) -> None:
        self._make_body = make_body
        self._held = ""
        self._body: CallBody | None = None
        self._num_calls = 0
        self._is_behind_call = False

    def push(self, text: str) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        while text:
            if self._body is None:
                text = self._read_content(text, parts)
            else:
                parts += self._body.push(text)
                text = self._body.rest or ""
                if self._body.rest is not None:
                    self._num_calls += self._body.is_call
                    self._is_behind_call = self._body.is_call
                    self._body = None
        return parts

    def finish(self) -> list[AnswerPart]:
        if self._body is not None:
            return self._body.finish()
        parts: list[AnswerPart] = []
        self._give(self._held, parts)
        self._held = ""
        return parts

    def _read_content(self, text: str, parts: list[AnswerPart]) -> str:
        """Give text until a call begins, and return what follows on its mark."""
        text = self._held + text
        start = text.find(BEGIN)
        if start >= 0:
            self._give(text[:start].removesuffix("\n"), parts)
            self._held = ""
            self._body = self._make_body(self._num_calls)
            return text[start + len(BEGIN) :]
        num_held = max(held_len(text, "\n" + BEGIN), held_len(text, BEGIN))
        self._held = text[len(text) - num_held :]
        self._give(text[: len(text) - num_held], parts)
        return ""

    def _give(self, text: str, parts: list[AnswerPart]) -> None:
        if self._is_behind_call:
            text = text.lstrip()
        if text:
            self._is_behind_call = False
            parts.append(Content(text))
