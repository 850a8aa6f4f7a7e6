"""How a family of models is told of tools, and how it calls them: what all formats have in common.

A format reads calls out of an answer as it comes, and says as a grammar (in llguidance's notation)
what an answer with calls must look like.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.grammar import COMPACT_JSON
from engine.text.answer_parts import AnswerReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments, of an object.
        is_strict: Its arguments must follow the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any]
    is_strict: bool = False


class ToolFormat(Protocol):
    """One way to call tools.

    Attributes:
        stop: Strings that end an answer in which a tool was called.
    """

    stop: tuple[str, ...]

    def reader(self, tools: Sequence[Tool]) -> AnswerReader:
        """Make what reads one answer's text and calls."""
        ...

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        is_call_required: bool,
        max_calls: int | None,
        text_source: str | None = None,
    ) -> str:
        """Spell what an answer may be.

        Args:
            tools: Those that may be called; the arguments of each follow its schema.
            is_call_required: The answer consists of calls; else there may be text before them.
            max_calls: None for any number.
            text_source: The grammar of text, where no call is required: an answer is such a text or
                consists of calls. None for text of any kind.

        Raises:
            RequestError: The format cannot tell the one from the other.
        """
        ...


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema within a grammar, written as templates write it when the call is history."""
    return "%json " + json.dumps({**schema, "x-guidance": COMPACT_JSON})


def with_rule(grammar: str, name: str, source: str) -> str:
    """A grammar that refers to another one as @name; both, as the whole, in llguidance's notation.

    Args:
        grammar: In Lark's notation.
        name: Of the rule.
        source: What it stands for: Lark's notation, or llguidance's list of one grammar.
    """
    try:
        [rule] = json.loads(source)["grammars"]
    except ValueError:
        rule = {"lark_grammar": source}
    return json.dumps({"grammars": [{"lark_grammar": grammar}, {**rule, "name": name}]})


def literal(text: str) -> str:
    """A text within a grammar."""
    return json.dumps(text)
