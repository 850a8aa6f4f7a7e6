"""What a model's answer consists of, as it comes: thoughts, text, calls of tools.

Readers turn a stream of text into such parts, whatever way the stream is cut; nothing of the text
is lost but the marks between parts. Knows no formats and no clients.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called; its arguments follow.

    Attributes:
        index: Of the call in the answer, from 0.
        name: Of the tool.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all of them together are a JSON object."""

    index: int
    text: str


AnswerPart = Content | Reasoning | CallStart | CallArguments


class AnswerReader(Protocol):
    """Reads one answer. Invariant: what it holds back may still turn out to be part of a mark."""

    def push(self, text: str) -> list[AnswerPart]:
        """Take more text, and give the parts that are certain by it."""
        ...

    def finish(self) -> list[AnswerPart]:
        """The answer has ended: give what was held back."""
        ...


def held_len(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, but not all of it."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
