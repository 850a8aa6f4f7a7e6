"""Items of a response's input and output, as OpenAI's Responses API names them.

What a conversation consists of there: messages, thoughts, calls, and what calls gave. Output items
may be sent back as they came. What a model makes of them is elsewhere.
"""

import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    StrictStr,
    WithJsonSchema,
)

from cluster.openai.schema import MAX_FIELDS, MAX_MESSAGES, RequestObject, TopLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]

_TEXT_PARTS: Mapping[str, str] = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
}
"""Parts of a message that are text, and the field that holds it."""

_THOUGHT_PARTS: Mapping[str, str] = {"reasoning_text": "text", "text": "text"}
_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _texts(content: Any, kinds: Mapping[str, str]) -> list[str]:
    """Texts of a content that is a string or a list of parts."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise ValueError("it must be a string or a list of content parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(
                f"part {index} is of type {reprlib.repr(kind)}; this model reads text only, so "
                f"every part must be of type {' or '.join(kinds)}"
            )
        text = part.get(kinds[kind])
        if not isinstance(text, str):
            raise ValueError(f'part {index} has no string "{kinds[kind]}"')
        texts.append(text)
    return texts


def _read_texts(content: Any) -> list[str]:
    return _texts(content, _TEXT_PARTS)


def _read_thoughts(content: Any) -> list[str]:
    return _texts(content, _THOUGHT_PARTS)


def _parts(kind: str, texts: list[str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


def _content_schema(kinds: Mapping[str, str]) -> WithJsonSchema:
    parts = [
        {
            "type": "object",
            "properties": {"type": {"const": kind}, field: {"type": "string"}},
            "required": ["type", field],
        }
        for kind, field in kinds.items()
    ]
    texts = {"type": "array", "items": {"anyOf": parts}}
    return WithJsonSchema({"anyOf": [{"type": "string"}, texts]})


Texts = Annotated[
    list[StrictStr],
    BeforeValidator(_read_texts),
    PlainSerializer(partial(_parts, "input_text")),
    _content_schema(_TEXT_PARTS),
]
Thoughts = Annotated[
    list[StrictStr],
    BeforeValidator(_read_thoughts),
    PlainSerializer(partial(_parts, "reasoning_text")),
    _content_schema(_THOUGHT_PARTS),
]


class _Item(RequestObject):
    id: StrictStr | None = None
    status: ItemStatus | None = None


class MessageItem(_Item):
    """A message; `content` holds the texts of its parts."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    phase: StrictStr | None = None
    """Accepted, as others give it with their messages; means nothing here."""


class FunctionCallItem(_Item):
    """A call in the conversation's past."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr = "{}"


class FunctionCallOutputItem(_Item):
    """What a call has given."""

    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Texts


class ReasoningItem(_Item):
    """Thoughts of the past; those that come encrypted are another server's and are left out."""

    type: Literal["reasoning"]
    summary: list[Any] = Field(default_factory=list)
    content: Thoughts = Field(default_factory=list)
    encrypted_content: StrictStr | None = None


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem,
    Field(discriminator="type"),
]


def _read_items(items: Any) -> Any:
    """The input as a list of items, each with its type."""
    if isinstance(items, str):
        return [{"type": "message", "role": "user", "content": items}]
    if not isinstance(items, list):
        raise ValueError("it must be a string or a list of items")
    # Where there are more, the list's length is refused.
    return [_read_item(index, item) for index, item in enumerate(items[: MAX_MESSAGES + 1])]


def _read_item(index: int, item: Any) -> Any:
    if not isinstance(item, dict) or len(item) > MAX_FIELDS:
        return item
    kind = item.get("type", "message" if "role" in item else None)
    if kind not in _ITEM_TYPES:
        raise ValueError(
            f"item {index} is of type {reprlib.repr(kind)}; this server takes items of the types "
            f"{', '.join(_ITEM_TYPES)}"
        )
    # Clients send an answer's items back as they got them, with fields that are empty.
    fields = {name: value for name, value in item.items() if value is not None}
    return {**fields, "type": kind}


InputItems = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_read_items, json_schema_input_type=str | list[InputItem]),
]


class TextLogprob(BaseModel):
    """A token of a message's text."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TextLogprob] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """What the model thought, in the clear; nobody sums it up, so `summary` is empty."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningText]
    encrypted_content: None = None


class OutputFunctionCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputReasoning | OutputFunctionCall
