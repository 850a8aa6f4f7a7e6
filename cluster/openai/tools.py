"""Which tools a chat may call: OpenAI's fields to tools, and calls to OpenAI's objects."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cluster.openai.schema import ChatCompletionRequest, NamedToolChoice, PastToolCall
from engine.errors import RequestError
from engine.text.chat_template import CallHistory
from engine.text.tool_formats import Tool

_ANY_ARGUMENTS = {"type": "object"}


def callable_tools(body: ChatCompletionRequest) -> list[Tool]:
    """The tools that the answer may call; none if there are none, or the client wants no call.

    Raises:
        RequestError: Two have one name, or the tool that is to be called is not there.
    """
    choice = body.tool_choice
    tools = [
        Tool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or _ANY_ARGUMENTS,
            is_strict=bool(tool.function.strict),
        )
        for tool in body.tools
    ]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools has two functions of one name.", param="tools")
    if choice == "none":
        return []
    if isinstance(choice, NamedToolChoice):
        wanted = choice.function.name
        if wanted not in names:
            raise RequestError(
                f"tool_choice names {wanted}, which is not among tools.", param="tool_choice"
            )
        return [tool for tool in tools if tool.name == wanted]
    if choice == "required" and not tools:
        raise RequestError("tool_choice is required, but there are no tools.", param="tool_choice")
    return tools


def is_call_required(body: ChatCompletionRequest) -> bool:
    """Whether the answer must call a tool."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedToolChoice)


def max_calls(body: ChatCompletionRequest) -> int | None:
    """How many calls there may be, None for any number; a function by name is called once."""
    is_named = isinstance(body.tool_choice, NamedToolChoice)
    return None if body.parallel_tool_calls and not is_named else 1


def template_tools(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The tools as templates want them."""
    if body.tool_choice == "none":
        return []
    return [tool.model_dump(exclude_unset=True) for tool in body.tools]


def past_calls(calls: Sequence[PastToolCall]) -> list[dict[str, Any]]:
    """Calls of a conversation's past as templates want them."""
    return [
        {
            "type": "function",
            "id": call.id,
            "function": {
                "name": call.function.name,
                "arguments": _past_arguments(call.function.arguments),
            },
        }
        for call in calls
    ]


def _past_arguments(written: str) -> CallHistory | str:
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return CallHistory(arguments, written) if isinstance(arguments, dict) else written


def call_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call: the same from every router that goes on with the answer."""
    digest = hashlib.sha256(f"{request_id}/{choice}/{index}".encode()).hexdigest()
    return f"call_{digest[:24]}"
