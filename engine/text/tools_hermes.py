"""Tool calls as Qwen2.5 and Qwen3 write them, after the Hermes models:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Arguments are handed on as they are written, character by character, so that a template which
writes the call into a later prompt writes the very tokens that were generated.
"""

import json
import re
from collections.abc import Sequence

from engine.text.answer_parts import (
    AnswerPart,
    AnswerReader,
    CallArguments,
    CallStart,
    Content,
)
from engine.text.tagged_calls import BEGIN, END, TaggedCallReader, tagged_call_grammar
from engine.text.tool_formats import Tool, json_rule, literal

# The order in which models write it; any other is read when the call is whole.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_MAX_HEAD_CHARS = 1024


class HermesFormat:
    """A `ToolFormat`."""

    stop: tuple[str, ...] = ()

    def reader(self, tools: Sequence[Tool]) -> AnswerReader:
        del tools  # A name that is none of theirs is the client's to judge.
        return TaggedCallReader(HermesBody)

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        is_call_required: bool,
        max_calls: int | None,
        text_source: str | None = None,
    ) -> str:
        body = "body: " + " | ".join(map(_call_rule, tools)) + "\n"
        return tagged_call_grammar(
            body,
            is_call_required=is_call_required,
            max_calls=max_calls,
            text_source=text_source,
        )


def _call_rule(tool: Tool) -> str:
    head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
    return " ".join([literal(head), json_rule(tool.parameters), literal("}")])


class HermesBody:
    """A `CallBody`. Nothing is given of a call before its name and its arguments' beginning."""

    def __init__(self, index: int) -> None:
        self.rest: str | None = None
        self.is_call = False
        self._index = index
        self._held = ""
        self._arguments = _ObjectEnd()

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        if not self.is_call:
            head = _HEAD.match(self._held, 0, _MAX_HEAD_CHARS)
            name = _read_string(head.group(1)) if head is not None else None
            if head is not None and name is not None:
                self.is_call = True
                parts.append(CallStart(self._index, name))
                self._held = self._held[head.end() :]
        if self.is_call and not self._arguments.is_reached:
            length = self._arguments.read(self._held)
            if length:
                parts.append(CallArguments(self._index, self._held[:length]))
            self._held = self._held[length:]
            if not self._arguments.is_reached:
                return parts
        end = self._held.find(END)
        if end >= 0:
            if not self.is_call:
                parts += self._whole_call(self._held[:end], BEGIN + self._held[: end + len(END)])
            self.rest = self._held[end + len(END) :]
        return parts

    def finish(self) -> list[AnswerPart]:
        return [] if self.is_call else self._whole_call(self._held, BEGIN + self._held)

    def _whole_call(self, body: str, whole: str) -> list[AnswerPart]:
        """A call in another order or spelling; what is none is the text that it is."""
        try:
            call = json.loads(body)
            name = call["name"]
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [Content(whole)]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return [Content(whole)]
        self.is_call = True
        text = json.dumps(arguments, ensure_ascii=False)
        return [CallStart(self._index, name), CallArguments(self._index, text)]


def _read_string(text: str) -> str | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


class _ObjectEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.is_reached = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def read(self, text: str) -> int:
        """How much of the next piece belongs to the object."""
        for place, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                if character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._is_in_string = False
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_reached = True
                    return place + 1
        return len(text)
