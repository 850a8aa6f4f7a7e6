"""Bytes of a request body to its pydantic object, every fault explained by OpenAI's field name.

What this server cannot do is refused by name, never ignored: a client that asks for audio and gets
prose would be misled. Fields that change no answer are accepted and dropped.
"""

import difflib
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from cluster.openai.schema import MAX_MESSAGES, MAX_TOOLS
from engine.errors import RequestError

NO_EFFECT = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Each with the values that ask for nothing beyond what is done anyway; null always is one.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Clients send an assistant's answer back as they got it, with fields that are empty.
UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "refusal": (),
}
# What clients note for themselves in messages that they send back: Qwen-Agent the first two, the
# openai package what it parsed.
NO_EFFECT_IN_MESSAGE = frozenset({"extra", "id", "parsed"})
NO_EFFECT_IN_PAST_CALL = frozenset({"parsed_arguments"})

_MAX_NAME_CHARS = 64
_MAX_PATH_CHARS = 200

_Body = TypeVar("_Body", bound=BaseModel)


def parse_body(
    kind: type[_Body],
    body: bytes,
    *,
    unsupported: Mapping[str, tuple[Any, ...]] = UNSUPPORTED,
    no_effect: Collection[str] = NO_EFFECT,
) -> _Body:
    """Parse and check a request body.

    Args:
        unsupported: Fields that are refused, unless they have one of these values.
        no_effect: Fields that are dropped.

    Raises:
        RequestError: Not JSON, not an object, or a field that is missing, unknown, of a wrong type
            or not supported.
    """
    try:
        # Keeping strings for their next use costs more than it saves where no string comes twice.
        fields = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise RequestError(f"The body must be a JSON object, not {_kind(fields)}.")
    _drop_or_refuse(fields, unsupported, "")
    messages = fields.get("messages")
    # Where there are more, the schema says so.
    first_messages = messages[:MAX_MESSAGES] if isinstance(messages, list) else []
    for index, message in enumerate(first_messages):
        if isinstance(message, dict):
            _drop_or_refuse(message, UNSUPPORTED_IN_MESSAGE, f"messages[{index}].")
            _drop_notes(message)
            _check_parts(message.get("content"), f"messages[{index}].content")
    for name in no_effect:
        fields.pop(name, None)
    # null means the same as a field that is not there.
    fields = {name: value for name, value in fields.items() if value is not None}
    return checked_body(kind, fields)


def checked_body(kind: type[_Body], fields: dict[str, Any]) -> _Body:
    """Make a body of its fields.

    Raises:
        RequestError: One is missing, unknown or of a wrong type.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error, kind, fields) from None


def _drop_notes(message: dict[str, Any]) -> None:
    for name in NO_EFFECT_IN_MESSAGE & message.keys():
        del message[name]
    calls = message.get("tool_calls")
    for call in calls[:MAX_TOOLS] if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            for name in NO_EFFECT_IN_PAST_CALL & function.keys():
                del function[name]


def _drop_or_refuse(
    fields: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]], where: str
) -> None:
    for name in unsupported:
        value = fields.pop(name, None)
        # `1 == True` in Python, and best_of: true is no number.
        if value is not None and not any(
            value == neutral and type(value) is type(neutral) for neutral in unsupported[name]
        ):
            raise RequestError(
                f"{where}{name} is not supported by this server. Leave it out.",
                param=where + name,
                code="unsupported_parameter",
            )


def _check_parts(content: Any, where: str) -> None:
    """Refuse the first part of a message that is no text; what is no part, the schema refuses."""
    if not isinstance(content, list):
        return
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise RequestError(
                f"{where}[{index}] is of type {_excerpt(kind)}, but this model reads text only. "
                'Every part must be {"type": "text", "text": "…"}.',
                param=f"{where}[{index}].type",
                code="unsupported_value",
            )


def _explain(error: ValidationError, kind: type[BaseModel], fields: dict[str, Any]) -> RequestError:
    fault = error.errors(include_url=False)[0]
    param = _param(fault["loc"], fields, has_last=fault["type"] != "missing")
    if fault["type"] == "extra_forbidden":
        is_a_name = len(param) <= _MAX_NAME_CHARS and "." not in param
        near = difflib.get_close_matches(param, kind.model_fields, n=1) if is_a_name else []
        hint = f" Did you mean {near[0]}?" if near else ""
        return RequestError(
            f"Unrecognized request argument supplied: {param}.{hint}",
            param=param,
            code="unknown_parameter",
        )
    if fault["type"] == "missing":
        return RequestError(
            f"You must provide {param}.", param=param, code="missing_required_parameter"
        )
    message = fault["msg"].removeprefix("Value error, ")
    return RequestError(
        f"Invalid value for {param or 'the body'}: {message}; got {_excerpt(fault['input'])}.",
        param=param or None,
        code="invalid_value",
    )


def _param(location: tuple[Any, ...], fields: Any, *, has_last: bool) -> str:
    """messages, 0, role → messages[0].role

    Where a field may be of several kinds, pydantic adds the kind's name, which is no step.

    Args:
        fields: What the location is in.
        has_last: The location's last step is there, too.
    """
    path = ""
    for place, step in enumerate(location):
        is_last = place == len(location) - 1
        if isinstance(fields, dict):
            is_there = step in fields
        else:
            is_there = isinstance(fields, list) and isinstance(step, int) and step < len(fields)
        if is_there:
            fields = fields[step]
        elif has_last or not is_last:
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path if len(path) <= _MAX_PATH_CHARS else path[:_MAX_PATH_CHARS] + "…"


def _excerpt(value: Any, max_chars: int = 80) -> str:
    # The plain repr of a whole body would take as long as the body.
    text = repr(value[: max_chars + 1]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= max_chars else text[:max_chars] + "…"


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
