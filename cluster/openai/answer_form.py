"""What form the answer to a chat has: how it is read, and what it must be.

Tools, thoughts and structured output meet here; each by itself is elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.openai.schema import ChatCompletionRequest
from cluster.openai.structured_output import grammar_source
from cluster.openai.tools import callable_tools, is_call_required, max_calls
from engine.errors import RequestError
from engine.grammar import Grammar, checked
from engine.text.answer_parts import AnswerReader
from engine.text.chat_template import ChatTemplate
from engine.text.reasoning import (
    THINK_END,
    THINK_START,
    PlainReader,
    ReasoningReader,
    Thinking,
    thinking_after,
)
from engine.text.tokenizer import Tokenizer
from engine.text.tool_formats import Tool, ToolFormat

# Enough for a mark and the line breaks around it.
_NUM_END_TOKENS = 16


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of the answer to one prompt.

    Attributes:
        tool_format: How tools are called; None if the answer may call none.
        tools: Those that may be called.
        thinking: Where the answer begins.
    """

    tool_format: ToolFormat | None
    tools: Sequence[Tool]
    thinking: Thinking

    @property
    def is_plain(self) -> bool:
        """It is text and nothing else."""
        return self.tool_format is None and self.thinking is Thinking.NONE

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end it, beside the client's."""
        return () if self.tool_format is None else self.tool_format.stop

    def reader(self) -> AnswerReader:
        """Make what reads one choice."""
        reader: AnswerReader = PlainReader()
        if self.tool_format is not None:
            reader = self.tool_format.reader(self.tools)
        if self.thinking is Thinking.NONE:
            return reader
        return ReasoningReader(reader, is_open=self.thinking is Thinking.OPEN)


class AnswerForms:
    """Forms of one model's answers; may be used from several threads.

    Args:
        tool_format: How the model calls tools; None if it knows none.
        has_reasoning: Thoughts are told from the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        tool_format: ToolFormat | None,
        has_reasoning: bool,
    ) -> None:
        source = template.source if template is not None else ""
        self._tokenizer = tokenizer
        self._tool_format = tool_format
        self._think_end_id = tokenizer.token_id(THINK_END)
        knows_thoughts = self._think_end_id is not None or THINK_START in source
        self._has_reasoning = has_reasoning and knows_thoughts
        # A template that can forbid thoughts is one of a model that has them otherwise.
        self._thinks_by_itself = "enable_thinking" in source

    def form(self, body: ChatCompletionRequest, prompt: Sequence[int]) -> AnswerForm:
        """The form of the answer to a prompt.

        Raises:
            RequestError: It may call tools, of which the model knows nothing.
        """
        tools = callable_tools(body)
        if tools and self._tool_format is None:
            raise RequestError(
                "This model's chat template knows no tools. Leave tools out, serve a model that "
                "knows them, or say how it calls them with --tool-call-parser.",
                param="tools",
                code="unsupported_parameter",
            )
        return AnswerForm(self._tool_format if tools else None, tools, self._thinking(prompt))

    def grammar(self, body: ChatCompletionRequest, form: AnswerForm) -> Grammar | None:
        """What the answer must be; None for anything. Not for an event loop.

        Raises:
            RequestError: It cannot be followed.
        """
        source = grammar_source(body)
        if form.tool_format is not None and self._constrains_calls(body, form):
            if source is not None:
                raise RequestError(
                    "A call that is required or strict does not go with response_format or another "
                    "form of structured output.",
                    param="tool_choice" if is_call_required(body) else "tools",
                )
            source = checked(
                form.tool_format.grammar(
                    form.tools,
                    is_call_required=is_call_required(body),
                    max_calls=max_calls(body),
                ),
                param="tools",
            )
        budget = body.thinking_budget
        is_thinking = form.thinking is Thinking.OPEN or (
            form.thinking is Thinking.MAY_BEGIN and self._thinks_by_itself
        )
        if not is_thinking or self._think_end_id is None:
            return None if source is None else Grammar(source)
        if source is None and budget is None:
            return None
        return Grammar(source or "", self._think_end_id, budget)

    def _constrains_calls(self, body: ChatCompletionRequest, form: AnswerForm) -> bool:
        return is_call_required(body) or any(tool.is_strict for tool in form.tools)

    def _thinking(self, prompt: Sequence[int]) -> Thinking:
        if not self._has_reasoning:
            return Thinking.NONE
        end = b"".join(map(self._tokenizer.token_bytes, prompt[-_NUM_END_TOKENS:]))
        return thinking_after(end.decode(errors="replace"))
