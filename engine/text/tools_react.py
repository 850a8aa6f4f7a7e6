"""Tool calls as Qwen-7B-Chat (Qwen1) was taught them, which knows no tools in its chat format.

What tools there are is written into the user's question, as the model's card shows it, and the
answer goes on so:

    Thought: I need the weather.
    Action: get_weather
    Action Input: {"city": "Paris"}
    Observation: …              ← where generation stops, and the tool's result comes in
    Thought: I now know the final answer.
    Final Answer: It rains.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from engine.errors import RequestError
from engine.text.answer_parts import (
    AnswerPart,
    AnswerReader,
    CallArguments,
    CallStart,
    Content,
    held_len,
)
from engine.text.chat_template import CallHistory, Message
from engine.text.tool_formats import Tool, json_rule, literal

OBSERVATION = "Observation:"
FINAL_ANSWER = "Final Answer:"

_ACTION = "Action:"
_INPUT = re.compile(r"[ \t]*([^\n]{1,256})\nAction Input:[ \t]*")
_MARKS = (_ACTION, FINAL_ANSWER)


class ReActFormat:
    """A `ToolFormat`."""

    stop: tuple[str, ...] = (OBSERVATION,)

    def reader(self, tools: Sequence[Tool]) -> AnswerReader:
        del tools
        return ReActReader()

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        is_call_required: bool,
        max_calls: int | None,
        text_source: str | None = None,
    ) -> str:
        del max_calls  # The format has one call an answer.
        if text_source is not None and not is_call_required:
            raise RequestError(
                "This model writes calls and answers amid its thoughts (ReAct), so that what it "
                "says beside calls cannot be bound by response_format or another form. Set "
                "tool_choice to none or required.",
                param="tools",
            )
        calls = " | ".join(
            " ".join([literal(f" {tool.name}\nAction Input: "), json_rule(tool.parameters)])
            for tool in tools
        )
        end = "" if is_call_required else " | thought"
        return (
            f'start: action ({calls}) "\\n"?{end}\n'
            "thought: TEXT\n"
            "TEXT: /(.|\\n)*/\n"
            f"action[lazy]: TEXT {literal(_ACTION)}\n"
        )


def describe_tools(tools: Sequence[Tool], question: str) -> str:
    """Write what tools there are before the user's question, as Qwen1 was taught."""
    descriptions = "\n\n".join(
        f"{tool.name}: {tool.description} Parameters: {json.dumps(dict(tool.parameters))}"
        for tool in tools
    )
    names = ",".join(tool.name for tool in tools)
    return (
        f"Answer the question with the help of these tools:\n\n{descriptions}\n\n"
        "Use this format:\n\n"
        "Question: the question to answer\n"
        "Thought: what to do next\n"
        f"Action: one of [{names}]\n"
        "Action Input: the tool's parameters as a JSON object\n"
        "Observation: the tool's result\n"
        "... (Thought, Action, Action Input and Observation may come several times)\n"
        "Thought: I now know the final answer\n"
        "Final Answer: the answer to the question\n\n"
        f"Begin!\n\nQuestion: {question}"
    )


def spell_react(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Message]:
    """Write calls and their results into the turns of a chat that knows neither.

    A question, the calls for it and their results are two turns: the user's, with what tools there
    are, and the assistant's, which is left open where the last result has just come.

    Args:
        messages: As `ChatTemplate.render` takes them.
        tools: Those that may be called for the last question.
    """
    last_question = max(
        (index for index, message in enumerate(messages) if message["role"] == "user"), default=-1
    )
    turns: list[Message] = []
    num_spelled = 0
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user" and index == last_question and tools:
            content = describe_tools(tools, content)
        calls = message.get("tool_calls", ())
        if role == "assistant" and calls:
            later = islice(messages, index + 1, None)
            results = list(takewhile(lambda each: each["role"] == "tool", later))
            content += _spell_calls(calls, results)
            num_spelled = index + 1 + len(results)
        if role == "tool":
            if index < num_spelled:
                continue
            role, content = "assistant", _observation(content)
        if turns and role == "assistant" and turns[-1]["role"] == "assistant":
            turns[-1] = {"role": role, "content": turns[-1]["content"] + content}
        else:
            turns.append({"role": role, "content": content})
    if messages and messages[-1]["role"] == "tool":
        turns[-1] = {**turns[-1], "content": turns[-1]["content"] + "Thought:", "is_open": True}
    return turns


def _spell_calls(calls: Sequence[Mapping[str, Any]], results: Sequence[Message]) -> str:
    """Write the calls of one message, each with its own result behind it: the format has one call
    at a time. Results that are none's come last."""
    waiting = list(results)
    written = ""
    for call in calls:
        function, call_id = call["function"], call.get("id")
        arguments = function["arguments"]
        if isinstance(arguments, CallHistory):
            arguments = arguments.written
        written += f"{_ACTION} {function['name']}\nAction Input: {arguments}\n"
        own = (
            place
            for place, result in enumerate(waiting)
            if None in (call_id, result.get("tool_call_id")) or result["tool_call_id"] == call_id
        )
        place = next(own, None)
        if place is not None:
            written += _observation(waiting.pop(place)["content"])
    return written + "".join(_observation(result["content"]) for result in waiting)


def _observation(content: str) -> str:
    return f"{OBSERVATION} {content}\n"


class ReActReader:
    """An `AnswerReader`: the call of an answer, or its final answer; thoughts are content, too."""

    def __init__(self) -> None:
        self._held = ""
        self._is_final = False
        self._is_action = False
        self._has_begun = False

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        parts: list[AnswerPart] = []
        if not self._is_action and not self._is_final:
            self._read_thought(parts)
        if self._is_final:
            # A blank behind the mark belongs to it.
            text = self._held if self._has_begun else self._held.lstrip(" ")
            self._held = ""
            if text:
                self._has_begun = True
                parts.append(Content(text))
        return parts

    def finish(self) -> list[AnswerPart]:
        held, self._held = self._held, ""
        if not self._is_action:
            return [Content(held)] if held else []
        head = _INPUT.match(held)
        whole: list[AnswerPart] = [Content(_ACTION + held)]
        if head is None:
            return whole
        try:
            arguments, _ = json.JSONDecoder().raw_decode(held, head.end())
        except (ValueError, RecursionError):
            return whole
        if not isinstance(arguments, dict):
            return whole
        text = json.dumps(arguments, ensure_ascii=False)
        return [CallStart(0, head.group(1).strip()), CallArguments(0, text)]

    def _read_thought(self, parts: list[AnswerPart]) -> None:
        """Give thoughts until a call or the final answer begins."""
        found = [(place, mark) for mark in _MARKS if (place := self._held.find(mark)) >= 0]
        if found:
            place, mark = min(found)
            if thought := self._held[:place]:
                parts.append(Content(thought))
            self._is_action = mark == _ACTION
            self._is_final = not self._is_action
            self._held = self._held[place + len(mark) :]
            return
        num_held = max(held_len(self._held, mark) for mark in _MARKS)
        if thought := self._held[: len(self._held) - num_held]:
            parts.append(Content(thought))
        self._held = self._held[len(self._held) - num_held :]
