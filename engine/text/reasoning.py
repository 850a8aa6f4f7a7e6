"""What a model thinks before it answers, between <think> and </think> as Qwen3 writes it."""

import enum

from engine.text.answer_parts import AnswerPart, AnswerReader, Content, Reasoning, held_len

THINK_START = "<think>"
THINK_END = "</think>"


class Thinking(enum.Enum):
    """Where an answer begins: behind thoughts, where they may begin, at their start, amid them."""

    NONE = enum.auto()
    MAY_BEGIN = enum.auto()
    OPEN = enum.auto()
    AMID = enum.auto()


def thinking_after(prompt_end: str) -> Thinking:
    """Where the answer to a prompt begins.

    Args:
        prompt_end: The last characters of the prompt, of a model that knows thoughts.
    """
    end = prompt_end.rstrip()
    if end.endswith(THINK_START):
        return Thinking.OPEN
    return Thinking.NONE if end.endswith(THINK_END) else Thinking.MAY_BEGIN


class PlainReader:
    """An `AnswerReader` of answers that are text and nothing else."""

    def push(self, text: str) -> list[AnswerPart]:
        return [Content(text)] if text else []

    def finish(self) -> list[AnswerPart]:
        return []


class ReasoningReader:
    """An `AnswerReader` that hands on what follows the thoughts.

    Line breaks around the thoughts belong to their marks. An answer that does not begin with
    <think> has no thoughts, unless its prompt has opened them.

    Args:
        answer: Reads what follows.
        begin: Where it begins; not `NONE`.
    """

    def __init__(self, answer: AnswerReader, begin: Thinking) -> None:
        self._answer = answer
        self._held = ""
        self._may_begin = begin is Thinking.MAY_BEGIN
        self._is_thinking = not self._may_begin
        # What the prompt has of the thoughts ends where it ends: what follows is no mark's.
        self._is_first = begin is not Thinking.AMID
        self._drops_blanks = False

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        if self._may_begin:
            opening = self._held.lstrip()
            if len(opening) < len(THINK_START) and THINK_START.startswith(opening):
                return []
            self._may_begin = False
            if opening.startswith(THINK_START):
                self._is_thinking = True
                self._held = opening.removeprefix(THINK_START)
        if self._is_thinking:
            parts += self._read_thoughts()
        if not self._is_thinking and self._held:
            parts += self._read_answer()
        return parts

    def finish(self) -> list[AnswerPart]:
        held, self._held = self._held, ""
        if self._is_thinking:
            # The answer was cut amid its thoughts.
            held = held.lstrip("\n") if self._is_first else held
            return [Reasoning(held)] if held else []
        rest = self._answer.push(held) if held else []
        return [*rest, *self._answer.finish()]

    def _read_thoughts(self) -> list[AnswerPart]:
        if self._is_first:
            self._held = self._held.lstrip("\n")
        end = self._held.find(THINK_END)
        if end >= 0:
            thought = self._held[:end].removesuffix("\n")
            self._held = self._held[end + len(THINK_END) :]
            self._is_thinking = False
            self._drops_blanks = True
        else:
            mark = "\n" + THINK_END
            num_held = max(held_len(self._held, mark), held_len(self._held, THINK_END))
            thought = self._held[: len(self._held) - num_held]
            self._held = self._held[len(self._held) - num_held :]
        if not thought:
            return []
        self._is_first = False
        return [Reasoning(thought)]

    def _read_answer(self) -> list[AnswerPart]:
        text, self._held = self._held, ""
        if self._drops_blanks:
            text = text.lstrip("\n")
            self._drops_blanks = not text
        return self._answer.push(text) if text else []
