"""What an answer must look like, however a client spells it: OpenAI's way, vLLM's or SGLang's.

One request may say it once. Knows schemas and grammars, not what models make of them.
"""

from collections.abc import Callable
from typing import Any

from cluster.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
    StructuredOutputs,
)
from engine.errors import RequestError
from engine.grammar import choice_source, ebnf_source, json_schema_source, regex_source

ANY_JSON_OBJECT = {"type": "object"}

_SPELLED_BY: dict[str, Callable[..., str]] = {
    "json_schema": json_schema_source,
    "regex": regex_source,
    "choice": choice_source,
    "grammar": ebnf_source,
}


def grammar_source(body: ChatCompletionRequest | CompletionRequest) -> str | None:
    """The grammar that a request asks for, in llguidance's notation; None for none.

    Takes some milliseconds, and a large schema a tenth of a second: not for an event loop.

    Raises:
        RequestError: There is more than one, or it cannot be followed.
    """
    wanted = _wanted(body)
    if not wanted:
        return None
    if len(wanted) > 1:
        raise RequestError(
            f"The request says in {len(wanted)} ways what the answer must look like "
            f"({', '.join(wanted)}). Say it once.",
            param=next(iter(wanted)),
        )
    _check_goes_with_grammar(body)
    [(param, (kind, value, options))] = wanted.items()
    return _SPELLED_BY[kind](value, param=param, **options)


def _wanted(
    body: ChatCompletionRequest | CompletionRequest,
) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """By the client's name of it: what kind of description, the description, and its options."""
    wanted: dict[str, tuple[str, Any, dict[str, Any]]] = {}
    response_format = body.response_format
    if response_format is not None and response_format.type != "text":
        wanted["response_format"] = "json_schema", _schema_of(response_format), {}
    outputs = body.structured_outputs or StructuredOutputs()
    blanks = {"whitespace_pattern": outputs.whitespace_pattern or body.guided_whitespace_pattern}
    if outputs.json_object:
        wanted["structured_outputs.json_object"] = "json_schema", ANY_JSON_OBJECT, blanks
    spelled = (
        ("guided_json", "json_schema", body.guided_json, blanks),
        ("structured_outputs.json", "json_schema", outputs.json_, blanks),
        ("json_schema", "json_schema", body.json_schema, blanks),
        ("guided_regex", "regex", body.guided_regex, {}),
        ("structured_outputs.regex", "regex", outputs.regex, {}),
        ("regex", "regex", body.regex, {}),
        ("guided_choice", "choice", body.guided_choice, {}),
        ("structured_outputs.choice", "choice", outputs.choice, {}),
        ("guided_grammar", "grammar", body.guided_grammar, {}),
        ("structured_outputs.grammar", "grammar", outputs.grammar, {}),
        ("ebnf", "grammar", body.ebnf, {}),
    )
    wanted.update(
        {
            name: (kind, value, options)
            for name, kind, value, options in spelled
            if value is not None
        }
    )
    return wanted


def _schema_of(response_format: ResponseFormat) -> Any:
    if response_format.type == "json_object":
        return ANY_JSON_OBJECT
    if response_format.json_schema is None:
        raise RequestError(
            "response_format.type is json_schema: give response_format.json_schema.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    schema = response_format.json_schema.schema_
    # OpenAI takes a missing one for any object.
    return ANY_JSON_OBJECT if schema is None else schema


def _check_goes_with_grammar(body: ChatCompletionRequest | CompletionRequest) -> None:
    if body.ignore_eos:
        raise RequestError(
            "ignore_eos does not go with structured output, which ends where it is complete.",
            param="ignore_eos",
        )
    if body.min_tokens:
        raise RequestError(
            "min_tokens does not go with structured output, which ends where it is complete. Say "
            "the least length in the schema or the grammar.",
            param="min_tokens",
        )
