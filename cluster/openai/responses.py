"""/v1/responses as a chat: items to messages, a response's fields to those of a chat.

All that happens to a chat happens to it: template, tools, thoughts, grammar, sampling. Knows
neither what becomes of the answer nor where responses are kept.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.openai.body import checked_body
from cluster.openai.effort import LOW_EFFORT_TOKENS, NO_THINKING
from cluster.openai.response_items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
)
from cluster.openai.responses_schema import (
    INCLUDE_LOGPROBS,
    AllowedFunctions,
    FunctionTool,
    FunctionToolName,
    ResponseRequest,
    TextFormat,
)
from cluster.openai.sampling import DEFAULTED
from cluster.openai.schema import ChatCompletionRequest
from engine.errors import RequestError

# Fields of a response that a chat has under the same name.
_SAME = (
    "model",
    "stream",
    "stream_options",
    "parallel_tool_calls",
    *DEFAULTED,
    "seed",
    "stop",
    "cache_salt",
    "chat_template_kwargs",
)
# What a chat calls a field of a response, the longer names first.
_CHAT_NAMES = (
    ("response_format.json_schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("messages", "input"),
)


class ResponseCall(BaseModel):
    """A request for a response, with the conversation that it goes on with.

    Attributes:
        body: The request.
        past: What came before its input.
    """

    model_config = ConfigDict(frozen=True)

    body: ResponseRequest
    past: list[InputItem] = []

    @property
    def items(self) -> list[InputItem]:
        """The whole conversation, its instructions left out."""
        return [*self.past, *self.body.input]

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The chat whose answer is the response.

        Raises:
            RequestError: Something in it cannot be.
        """
        return self._chat_of(self.items, len(self.past))

    def fitting_chat(self, fits: Callable[[ChatCompletionRequest], bool]) -> ChatCompletionRequest:
        """The chat with as many of its latest turns as fit, but at least the last one.

        What the conversation begins with for the model's instruction is always there. A turn begins
        with a message of the user's, so that no call is parted from its output.

        Args:
            fits: Whether the model has room for a chat; true for all that are shorter than one
                for which it is.

        Raises:
            RequestError: Something in it cannot be.
        """
        if fits(self.chat):
            return self.chat
        items = self.items
        head = next((i for i, item in enumerate(items) if not _is_instruction(item)), len(items))
        starts = [i for i, item in enumerate(items) if i > head and _is_users(item)]
        if not starts:
            return self.chat

        def chat_from(start: int) -> ChatCompletionRequest:
            kept = [*items[:head], *items[start:]]
            return self._chat_of(kept, len(self.past) - (start - head))

        place = bisect_left(starts, True, key=lambda start: fits(chat_from(start)))
        return chat_from(starts[min(place, len(starts) - 1)])

    def _chat_of(self, items: Sequence[InputItem], num_past: int) -> ChatCompletionRequest:
        body = self.body
        fields = {name: body.__dict__[name] for name in _SAME if name in body.model_fields_set}
        tools, tool_choice = _tools(body)
        fields |= {
            "messages": messages_of(body.instructions, items, num_past=num_past),
            "max_completion_tokens": body.max_output_tokens,
            "tools": tools,
            "tool_choice": tool_choice,
            **_thinking(body),
            **_logprobs(body),
        }
        if body.text.format is not None:
            fields["response_format"] = _response_format(body.text.format)
        chosen = {name: value for name, value in fields.items() if value is not None}
        try:
            return checked_body(ChatCompletionRequest, chosen)
        except RequestError as error:
            in_own_words(error)
            raise


def in_own_words(error: RequestError) -> None:
    """Name fields in an error of the chat that a response is as the response has them."""
    message = str(error)
    for chat_name, own_name in _CHAT_NAMES:
        message = message.replace(chat_name, own_name)
        if error.param is not None and error.param.startswith(chat_name):
            # Which message it is tells nothing of which item it was.
            error.param = own_name
    error.args = (message,)


def messages_of(
    instructions: str | None, items: Sequence[InputItem], *, num_past: int = 0
) -> list[dict[str, Any]]:
    """A conversation as a chat's messages.

    Thoughts, text and calls of one turn become one message, as the model wrote them. Templates
    often know one system message only: those at the beginning are joined to the instructions.

    Args:
        num_past: So many items came before the request's own input.

    Raises:
        RequestError: Something is the output of a call that is not there.
    """
    messages: list[dict[str, Any]] = []
    head = [instructions] if instructions else []
    call_ids: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, MessageItem):
            text = "\n".join(item.content)
            if _is_instruction(item) and not messages:
                head.append(text)
            elif item.role == "assistant":
                _turn(messages, before="content")["content"] = text
            else:
                messages.append({"role": item.role, "content": text})
        elif isinstance(item, ReasoningItem):
            thoughts = "\n".join(item.content)
            if thoughts:
                _turn(messages, before="reasoning_content")["reasoning_content"] = thoughts
        elif isinstance(item, FunctionCallItem):
            call_ids.add(item.call_id)
            function = {"name": item.name, "arguments": item.arguments}
            _turn(messages).setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
        else:
            _check_call(item, call_ids, index - num_past)
            messages.append(
                {"role": "tool", "tool_call_id": item.call_id, "content": "\n".join(item.output)}
            )
    for message in messages:
        if "tool_calls" not in message:
            # A turn may have ended amid its thoughts.
            message.setdefault("content", "")
    if head:
        messages.insert(0, {"role": "system", "content": "\n\n".join(head)})
    return messages


def _is_instruction(item: InputItem) -> bool:
    return isinstance(item, MessageItem) and item.role in ("system", "developer")


def _is_users(item: InputItem) -> bool:
    return isinstance(item, MessageItem) and item.role == "user"


# What a turn may not have yet, for more of it to come: thoughts stand before text before calls.
_FOLLOWED_BY = {
    "reasoning_content": ("reasoning_content", "content", "tool_calls"),
    "content": ("content", "tool_calls"),
    "tool_calls": (),
}


def _turn(messages: list[dict[str, Any]], *, before: str = "tool_calls") -> dict[str, Any]:
    """The assistant's turn to which a part belongs: the last message, or another one."""
    last = messages[-1] if messages else None
    is_open = last is not None and last["role"] == "assistant"
    if last is None or not is_open or any(name in last for name in _FOLLOWED_BY[before]):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _check_call(item: FunctionCallOutputItem, call_ids: Iterable[str], index: int) -> None:
    if item.call_id not in call_ids:
        raise RequestError(
            f"input has the output of a call {item.call_id[:100]!r}, but no such call before it. "
            "Send the function_call item too, or name the response that has it as "
            "previous_response_id.",
            param=f"input[{index}].call_id",
        )


def _tools(body: ResponseRequest) -> tuple[list[dict[str, Any]], Any]:
    """The tools that the model is told of, and which of them it may call."""
    tools, choice = body.tools, body.tool_choice
    if isinstance(choice, AllowedFunctions):
        names = {tool.name for tool in choice.tools}
        missing = names - {tool.name for tool in tools}
        if missing:
            raise RequestError(
                f"tool_choice allows {min(missing)}, which is not among tools.",
                param="tool_choice",
            )
        tools = [tool for tool in tools if tool.name in names]
        return _functions(tools), choice.mode
    if isinstance(choice, FunctionToolName):
        return _functions(tools), {"type": "function", "function": {"name": choice.name}}
    return _functions(tools), choice


def _functions(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": tool.model_dump(exclude={"type"}, exclude_none=True),
        }
        for tool in tools
    ]


def _thinking(body: ResponseRequest) -> dict[str, Any]:
    effort = body.reasoning.effort
    is_wanted = None if effort is None else effort not in NO_THINKING
    budget = LOW_EFFORT_TOKENS if effort == "low" else None
    return {
        "enable_thinking": is_wanted if body.enable_thinking is None else body.enable_thinking,
        "thinking_budget": budget if body.thinking_budget is None else body.thinking_budget,
    }


def _logprobs(body: ResponseRequest) -> dict[str, Any]:
    if INCLUDE_LOGPROBS in body.include:
        return {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.top_logprobs:
        raise RequestError(
            f'top_logprobs needs include: ["{INCLUDE_LOGPROBS}"].', param="top_logprobs"
        )
    return {}


def _response_format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.schema_ is None:
        raise RequestError(
            "text.format.type is json_schema: give text.format.schema.",
            param="text.format.schema",
            code="missing_required_parameter",
        )
    schema = {"name": wanted.name or "", "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": schema}
