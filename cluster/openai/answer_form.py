"""What form the answer to a chat has: how it is read, and what it must be.

Tools, thoughts and structured output meet here; each by itself is elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.openai.chat_prompt import continued_part
from cluster.openai.effort import thinking_budget
from cluster.openai.schema import ChatCompletionRequest
from cluster.openai.structured_output import ANY_JSON_OBJECT, grammar_source
from cluster.openai.tools import ToolChoice
from engine.errors import RequestError
from engine.grammar import Grammar, checked, json_schema_source
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
        choice: Which may be called.
        thinking: Where the answer begins.
    """

    tool_format: ToolFormat | None
    choice: ToolChoice
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
            reader = self.tool_format.reader(self.choice.tools)
        if self.thinking is Thinking.NONE:
            return reader
        return ReasoningReader(reader, self.thinking)


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
        self._template_source = source
        self._tokenizer = tokenizer
        self._tool_format = tool_format
        self._think_end_id = tokenizer.token_id(THINK_END)
        knows_thoughts = self._think_end_id is not None or THINK_START in source
        self._has_reasoning = has_reasoning and knows_thoughts
        # A template that can forbid thoughts is one of a model that has them otherwise.
        self._thinks_by_itself = "enable_thinking" in source

    def form(
        self, body: ChatCompletionRequest, prompt: Sequence[int], choice: ToolChoice
    ) -> AnswerForm:
        """The form of the answer to a prompt.

        Args:
            body: The request.
            prompt: What became of its messages.
            choice: Which tools it may call.

        Raises:
            RequestError: It may call tools, of which the model knows nothing.
        """
        if choice.tools and self._tool_format is None:
            raise RequestError(
                "This model's chat template knows no tools. Leave tools out, serve a model that "
                "knows them, or say how it calls them with --tool-call-parser.",
                param="tools",
                code="unsupported_parameter",
            )
        tool_format = self._tool_format if choice.tools else None
        return AnswerForm(tool_format, choice, self._thinking(body, prompt))

    def grammar(self, body: ChatCompletionRequest, form: AnswerForm) -> Grammar | None:
        """What the answer must be; None for anything. Not for an event loop.

        Raises:
            RequestError: It cannot be followed.
        """
        source = self._source(body, form)
        if source is not None and continued_part(body) == "content" and body.messages[-1].content:
            raise RequestError(
                "continue_final_message does not go with structured output or with tools that "
                "must be called or are strict: their form begins where the answer does.",
                param="continue_final_message",
            )
        budget = thinking_budget(body, self._template_source)
        is_thinking = form.thinking in (Thinking.OPEN, Thinking.AMID) or (
            form.thinking is Thinking.MAY_BEGIN and self._thinks_by_itself
        )
        if not is_thinking or self._think_end_id is None:
            return None if source is None else Grammar(source)
        if source is None and budget is None:
            return None
        return Grammar(source or "", self._think_end_id, budget)

    def _source(self, body: ChatCompletionRequest, form: AnswerForm) -> str | None:
        """The grammar of what follows the thoughts."""
        source, choice, tools = grammar_source(body), form.choice, form.choice.tools
        binds_calls = choice.is_required or any(tool.is_strict for tool in tools)
        if form.tool_format is None or not (
            binds_calls or choice.is_narrowed or source is not None
        ):
            return source
        if not binds_calls:
            # Their arguments need not follow a schema, so one that cannot be followed is no fault.
            tools = [_followable(tool) for tool in tools]
        grammar = form.tool_format.grammar(
            tools,
            is_call_required=choice.is_required,
            max_calls=choice.max_calls,
            # Where a call must come there is no text that a form could bind.
            text_source=None if choice.is_required else source,
        )
        return checked(grammar, param="tools")

    def _thinking(self, body: ChatCompletionRequest, prompt: Sequence[int]) -> Thinking:
        if not self._has_reasoning:
            return Thinking.NONE
        part = continued_part(body)
        if part == "reasoning_content":
            return Thinking.AMID
        if part == "content" and body.messages[-1].content:
            return Thinking.NONE
        end = b"".join(map(self._tokenizer.token_bytes, prompt[-_NUM_END_TOKENS:]))
        return thinking_after(end.decode(errors="replace"))


def _followable(tool: Tool) -> Tool:
    """A tool whose arguments may be any where its schema cannot be followed."""
    try:
        json_schema_source(tool.parameters, param="tools")
    except RequestError:
        return replace(tool, parameters=ANY_JSON_OBJECT)
    return tool
