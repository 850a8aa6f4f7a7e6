"""Which tools a chat may call: OpenAI's fields, the older ones too, to tools, calls to objects."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.openai.schema import (
    AllowedToolsChoice,
    ChatCompletionRequest,
    ChatMessage,
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    PastFunctionCall,
)
from engine.errors import RequestError
from engine.text.chat_template import CallHistory
from engine.text.tool_formats import Tool

_ANY_ARGUMENTS = {"type": "object"}

_Choice = str | NamedToolChoice | AllowedToolsChoice | FunctionName


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools an answer may call.

    Attributes:
        tools: Those; none if there are none, or the client wants no call.
        is_required: It must call one.
        is_narrowed: The model is told of others, too.
        max_calls: None for any number.
    """

    tools: Sequence[Tool] = ()
    is_required: bool = False
    is_narrowed: bool = False
    max_calls: int | None = None


def asks_in_the_old_way(body: ChatCompletionRequest) -> bool:
    """Whether tools are `functions`, and a call is a `function_call`."""
    return bool(body.functions) or isinstance(body.function_call, FunctionName)


def tool_choice_of(body: ChatCompletionRequest) -> ToolChoice:
    """Say which tools the answer may call.

    Raises:
        RequestError: Two have one name, one that is to be called is not there, or they are given in
            the old way and in the new one.
    """
    is_old = asks_in_the_old_way(body)
    if is_old and (body.tools or body.tool_choice != "auto"):
        raise RequestError(
            "functions and function_call do not go with tools and tool_choice, which have replaced "
            "them. Leave them out.",
            param="functions" if body.functions else "function_call",
        )
    where, param = ("functions", "function_call") if is_old else ("tools", "tool_choice")
    functions = _functions(body)
    tools = {function.name: _tool(function) for function in functions}
    if len(tools) < len(functions):
        raise RequestError(f"{where} has two functions of one name.", param=where)
    choice: _Choice = body.function_call if is_old else body.tool_choice
    if choice == "none":
        return ToolChoice()
    if choice == "required" and not tools:
        raise RequestError("tool_choice is required, but there are no tools.", param=param)
    names = _named(choice, tools)
    for name in names:
        if name not in tools:
            raise RequestError(f"{param} names {name}, which is not among {where}.", param=param)
    return ToolChoice(
        tools=[tools[name] for name in names],
        is_required=_is_required(choice),
        is_narrowed=len(names) < len(tools),
        max_calls=_max_calls(body, choice),
    )


def template_tools(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The tools as templates want them."""
    if (body.function_call if asks_in_the_old_way(body) else body.tool_choice) == "none":
        return []
    return [
        {"type": "function", "function": function.model_dump(exclude_unset=True)}
        for function in _functions(body)
    ]


def past_calls(message: ChatMessage) -> list[dict[str, Any]]:
    """Calls of a message of the past as templates want them."""
    calls: list[tuple[str | None, PastFunctionCall]] = [
        (call.id, call.function) for call in message.tool_calls
    ]
    if message.function_call is not None:
        calls.append((None, message.function_call))
    return [
        {
            "type": "function",
            "id": call_id,
            "function": {"name": call.name, "arguments": _past_arguments(call.arguments)},
        }
        for call_id, call in calls
    ]


def call_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call: the same from every router that goes on with the answer."""
    digest = hashlib.sha256(f"{request_id}/{choice}/{index}".encode()).hexdigest()
    return f"call_{digest[:24]}"


def _max_calls(body: ChatCompletionRequest, choice: _Choice) -> int | None:
    # A function by name is called once, as OpenAI has it; the old way has place for one call.
    is_named = isinstance(choice, NamedToolChoice)
    is_single = is_named or asks_in_the_old_way(body) or not body.parallel_tool_calls
    return 1 if is_single else None


def _functions(body: ChatCompletionRequest) -> Sequence[FunctionDefinition]:
    return body.functions or [tool.function for tool in body.tools]


def _tool(function: FunctionDefinition) -> Tool:
    return Tool(
        name=function.name,
        description=function.description or "",
        parameters=function.parameters or _ANY_ARGUMENTS,
        is_strict=bool(function.strict),
    )


def _named(choice: _Choice, names: Iterable[str]) -> list[str]:
    """Names of the tools that a choice leaves."""
    match choice:
        case NamedToolChoice():
            return [choice.function.name]
        case FunctionName():
            return [choice.name]
        case AllowedToolsChoice():
            return list(dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools))
        case _:
            return list(names)


def _is_required(choice: _Choice) -> bool:
    if isinstance(choice, AllowedToolsChoice):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedToolChoice | FunctionName)


def _past_arguments(written: str) -> CallHistory | str:
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return CallHistory(arguments, written) if isinstance(arguments, dict) else written
