"""Tool calls as Qwen3-Coder writes them:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

A parameter's text is a JSON value of the type that the tool's schema gives it, and a string where
that is its type, or where it is nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.answer_parts import (
    AnswerPart,
    AnswerReader,
    CallArguments,
    CallStart,
    Content,
)
from engine.text.tagged_calls import BEGIN, END, TaggedCallReader, tagged_call_grammar
from engine.text.tool_formats import Tool, json_rule, literal

_FUNCTION = re.compile(r"\s*<function=([^>\n]{1,256})>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,256})>")
_PARAMETER_END = "</parameter>"
_FUNCTION_END = "</function>"
_CALL_END = re.compile(rf"\s*{_FUNCTION_END}|\s*(?={END})")


class Qwen3CoderFormat:
    """A `ToolFormat`."""

    stop: tuple[str, ...] = ()

    def reader(self, tools: Sequence[Tool]) -> AnswerReader:
        schemas = {tool.name: tool.parameters for tool in tools}
        return TaggedCallReader(lambda index: Qwen3CoderBody(index, schemas))

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        is_call_required: bool,
        max_calls: int | None,
        text_source: str | None = None,
    ) -> str:
        names = [f"call_{index}" for index in range(len(tools))]
        rules = [f"body: {' | '.join(names)}"]
        for name, tool in zip(names, tools, strict=True):
            rules += _call_rules(name, tool)
        body = "\n".join([*rules, ""])
        return tagged_call_grammar(
            body,
            is_call_required=is_call_required,
            max_calls=max_calls,
            text_source=text_source,
        )


def _call_rules(name: str, tool: Tool) -> list[str]:
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = set(tool.parameters.get("required", ()))
    opening, closing = literal(f"<function={tool.name}>\n"), literal(_FUNCTION_END)
    if not properties and tool.parameters.get("additionalProperties", True):
        # Of its arguments nothing is said: any parameters.
        end = literal(f"\n{_PARAMETER_END}\n")
        return [
            f"{name}: {opening} {name}_any* {closing}",
            f'{name}_any: "<parameter=" /[^>\\n]{{1,256}}/ ">\\n" {name}_text',
            f"{name}_text[lazy]: TEXT_{name.upper()} {end}",
            f"TEXT_{name.upper()}: /(.|\\n)*/",
        ]
    rules, body = [], []
    for index, (parameter, schema) in enumerate(properties.items()):
        rule = f"{name}_{index}"
        head, end = literal(f"<parameter={parameter}>\n"), literal(f"\n{_PARAMETER_END}\n")
        if _is_text(schema) and "enum" not in schema:
            rules.append(f"{rule}_text[lazy]: TEXT_{rule.upper()} {end}")
            rules.append(f"TEXT_{rule.upper()}: /(.|\\n)*/")
            rules.append(f"{rule}: {head} {rule}_text")
        elif _is_text(schema):
            choices = " | ".join(literal(str(value)) for value in schema["enum"])
            rules.append(f"{rule}: {head} ({choices}) {end}")
        else:
            rules.append(f"{rule}: {head} {json_rule(schema)} {end}")
        body.append(rule if parameter in required else f"{rule}?")
    return [f"{name}: {' '.join([opening, *body, closing])}", *rules]


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


class Qwen3CoderBody:
    """A `CallBody`. A parameter is given when it is whole.

    Args:
        index: Of the call in the answer.
        schemas: Of each tool's arguments, by its name.
    """

    def __init__(self, index: int, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.rest: str | None = None
        self.is_call = False
        self._index = index
        self._schemas = schemas
        self._held = ""
        self._function = ""
        self._num_parameters = 0
        self._is_complete = False

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        if not self.is_call:
            self._read_function(parts)
        while self.is_call and not self._is_complete and self._read_parameter(parts):
            pass
        end = self._held.find(END) if self._is_complete or not self.is_call else -1
        if end >= 0:
            if not self.is_call:
                parts.append(Content(BEGIN + self._held[: end + len(END)]))
            self.rest = self._held[end + len(END) :]
        return parts

    def finish(self) -> list[AnswerPart]:
        return [] if self.is_call else [Content(BEGIN + self._held)]

    def _read_function(self, parts: list[AnswerPart]) -> None:
        function = _FUNCTION.match(self._held)
        if function is not None:
            self.is_call = True
            self._function = function.group(1).strip()
            self._held = self._held[function.end() :]
            parts += [CallStart(self._index, self._function), CallArguments(self._index, "{")]

    def _read_parameter(self, parts: list[AnswerPart]) -> bool:
        """Read what comes next in a call: a parameter, or its end; False if that is not whole."""
        end = _CALL_END.match(self._held)
        if end is not None:
            parts.append(CallArguments(self._index, "}"))
            self._is_complete = True
            self._held = self._held[end.end() :]
            return False
        parameter = _PARAMETER.match(self._held)
        if parameter is None:
            return False
        stop = self._held.find(_PARAMETER_END, parameter.end())
        if stop < 0:
            return False
        name = parameter.group(1).strip()
        text = self._held[parameter.end() : stop].removeprefix("\n").removesuffix("\n")
        self._held = self._held[stop + len(_PARAMETER_END) :]
        separator = ", " if self._num_parameters else ""
        self._num_parameters += 1
        value = _value(text, self._schema_of(name))
        entry = f"{separator}{json.dumps(name, ensure_ascii=False)}: {value}"
        parts.append(CallArguments(self._index, entry))
        return True

    def _schema_of(self, parameter: str) -> Any:
        properties = self._schemas.get(self._function, {}).get("properties", {})
        return properties.get(parameter, {}) if isinstance(properties, Mapping) else {}


def _value(text: str, schema: Any) -> str:
    """A parameter's text as JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    is_text = kind == "string" or (kind is None and not _has_alternatives(schema))
    if not is_text:
        try:
            return json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
        if text in ("True", "False", "None"):  # as templates write such values
            return {"True": "true", "False": "false", "None": "null"}[text]
    return json.dumps(text, ensure_ascii=False)


def _has_alternatives(schema: Any) -> bool:
    return isinstance(schema, Mapping) and bool(
        {"anyOf", "oneOf", "allOf", "enum", "const", "$ref", "properties", "items"} & schema.keys()
    )
