"""The id of a stream's event: how much of the answer its reader has once it has read that far.

    3f9x2k1a:12,7.,-

Here the engine 3f9x2k1a had generated 12 tokens of the first choice; the 7 of the second were its
last; nothing of the third was sent. Where events have numbers, the event's own follows:
`3f9x2k1a:12/40`. The client gives it back as `Last-Event-ID`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import RequestError

_UNBEGUN = "-"
_MAX_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Sent:
    """How much of a choice was sent: the text of so many tokens, and whether its end was."""

    num_tokens: int
    is_ended: bool


@dataclass(frozen=True, slots=True)
class Position:
    """An event's id, taken apart.

    Attributes:
        engine_id: Who generated last; empty if that is not known.
        sent: One per choice; None for a choice of which nothing was sent.
        number: The event's, where events have numbers.
    """

    engine_id: str
    sent: tuple[Sent | None, ...]
    number: int | None = None


def format_choice(num_tokens: int, *, is_ended: bool) -> str:
    """Write how much of one choice was sent."""
    return f"{num_tokens}." if is_ended else str(num_tokens)


def format_event_id(engine_id: str, choices: Sequence[str | None]) -> str:
    """Write an event's id from what `format_choice` gave for each choice, or None."""
    return f"{engine_id}:{','.join(choice or _UNBEGUN for choice in choices)}"


def with_number(event_id: str, number: int) -> str:
    """The id of an event that has a number."""
    return f"{event_id}/{number}"


def parse_event_id(event_id: str) -> Position:
    """Read an event's id.

    Raises:
        RequestError: It is none of ours.
    """
    engine_id, colon, choices = event_id.rpartition(":")
    choices, slash, number = choices.partition("/")
    parts = choices.split(",")
    if not colon or not all(map(_is_choice, parts)) or (slash and not _is_number(number)):
        raise RequestError(
            f"Last-Event-ID is {event_id[:100]!r}, which is no event's id here. Send the id of the "
            "last event that arrived, or leave the header out to have the whole stream again.",
            param="Last-Event-ID",
        )
    return Position(engine_id, tuple(map(_parse_choice, parts)), int(number) if slash else None)


def _is_choice(text: str) -> bool:
    return text == _UNBEGUN or _is_number(text.removesuffix("."))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS


def _parse_choice(text: str) -> Sent | None:
    if text == _UNBEGUN:
        return None
    return Sent(int(text.removesuffix(".")), is_ended=text.endswith("."))
