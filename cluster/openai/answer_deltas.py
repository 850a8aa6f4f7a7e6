"""Parts of an answer to OpenAI's deltas and messages."""

from cluster.openai.schema import (
    AssistantMessage,
    ChatDelta,
    ChatStopReason,
    FunctionCall,
    FunctionCallDelta,
    StopReason,
    ToolCall,
    ToolCallDelta,
)
from cluster.openai.tools import call_id
from engine.text.answer_parts import (
    AnswerPart,
    AnswerReader,
    CallArguments,
    CallStart,
    Content,
    Reasoning,
)


class AnswerDeltas:
    """One choice's text to deltas, each of which has all that a piece of text made certain.

    Args:
        reader: Used by nobody else.
        request_id: With the choice's index, of which the ids of calls are made.
        choice: That index.
        is_old: A call is a `function_call`, of which a message has one; further ones are left out.
    """

    def __init__(
        self, reader: AnswerReader, request_id: str, choice: int, *, is_old: bool = False
    ) -> None:
        self._reader = reader
        self._request_id = request_id
        self._choice = choice
        self._is_old = is_old
        self._has_calls = False

    def take(self, text: str, *, is_last: bool) -> ChatDelta:
        """Take more text; fields of which it says nothing are not set."""
        parts = self._reader.push(text) if text else []
        if is_last:
            parts = [*parts, *self._reader.finish()]
        content = "".join(part.text for part in parts if isinstance(part, Content))
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        calls = self._calls(parts)
        delta = ChatDelta()
        if content:
            delta.content = content
        if reasoning:
            delta.reasoning_content = delta.reasoning = reasoning
        if calls:
            self._has_calls = True
            if not self._is_old:
                delta.tool_calls = calls
            elif calls[0].index == 0:
                delta.function_call = calls[0].function
        return delta

    def finish_reason(self, reason: StopReason | None) -> ChatStopReason | None:
        """What ended the choice, given what ended its text."""
        if reason != "stop" or not self._has_calls:
            return reason
        return "function_call" if self._is_old else "tool_calls"

    def _calls(self, parts: list[AnswerPart]) -> list[ToolCallDelta]:
        calls: list[ToolCallDelta] = []
        for part in parts:
            if isinstance(part, CallStart):
                calls.append(
                    ToolCallDelta(
                        index=part.index,
                        id=call_id(self._request_id, self._choice, part.index),
                        type="function",
                        function=FunctionCallDelta(name=part.name, arguments=""),
                    )
                )
            elif isinstance(part, CallArguments):
                if not calls or calls[-1].index != part.index:
                    function = FunctionCallDelta(arguments="")
                    calls.append(ToolCallDelta(index=part.index, function=function))
                function = calls[-1].function
                function.arguments = (function.arguments or "") + part.text
        return calls


def whole_message(delta: ChatDelta) -> AssistantMessage:
    """The message that an answer's only delta makes."""
    calls = [
        ToolCall(id=call.id or "", function=_whole_call(call.function))
        for call in delta.tool_calls or []
    ]
    call = delta.function_call
    content = delta.content
    has_call = bool(calls) or call is not None
    return AssistantMessage(
        content=content if content is not None or has_call else "",
        reasoning_content=delta.reasoning_content,
        reasoning=delta.reasoning,
        tool_calls=calls or None,
        function_call=None if call is None else _whole_call(call),
    )


def _whole_call(call: FunctionCallDelta) -> FunctionCall:
    return FunctionCall(name=call.name or "", arguments=call.arguments or "")
