"""Every parameter of OpenAI's own client, against what this server and its documents know."""

import re
import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    chat_completion_assistant_message_param,
    chat_completion_developer_message_param,
    chat_completion_function_message_param,
    chat_completion_stream_options_param,
    chat_completion_system_message_param,
    chat_completion_tool_message_param,
    chat_completion_user_message_param,
)
from openai.types.chat import completion_create_params as chat_completion_create_params
from pydantic import BaseModel

from cluster.openai.body import NO_EFFECT, UNSUPPORTED, UNSUPPORTED_IN_MESSAGE
from cluster.openai.schema import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    StreamOptions,
)

PAGE = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()


def names_of(*kinds: type) -> set[str]:
    return {name for kind in kinds for name in typing.get_type_hints(kind)}


CHAT = names_of(
    chat_completion_create_params.CompletionCreateParamsStreaming,
    chat_completion_create_params.CompletionCreateParamsNonStreaming,
)
COMPLETION = names_of(
    completion_create_params.CompletionCreateParamsStreaming,
    completion_create_params.CompletionCreateParamsNonStreaming,
)
MESSAGE = names_of(
    chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam,
    chat_completion_developer_message_param.ChatCompletionDeveloperMessageParam,
    chat_completion_function_message_param.ChatCompletionFunctionMessageParam,
    chat_completion_system_message_param.ChatCompletionSystemMessageParam,
    chat_completion_tool_message_param.ChatCompletionToolMessageParam,
    chat_completion_user_message_param.ChatCompletionUserMessageParam,
)
STREAM = names_of(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam)


@pytest.mark.parametrize(
    ("names", "kind", "others"),
    [
        (CHAT, ChatCompletionRequest, NO_EFFECT | UNSUPPORTED.keys()),
        (COMPLETION, CompletionRequest, NO_EFFECT | UNSUPPORTED.keys()),
        (MESSAGE, ChatMessage, UNSUPPORTED_IN_MESSAGE.keys()),
        (STREAM, StreamOptions, set()),
    ],
    ids=["chat", "completion", "message", "stream_options"],
)
def test_each_parameter_is_honoured_or_dropped_or_refused_by_name(
    names: set[str], kind: type[BaseModel], others: set[str]
) -> None:
    assert {"model", "role", "include_usage"} & names, "the client's types are read"
    assert names - kind.model_fields.keys() - others == set()


def test_each_parameter_stands_in_the_table() -> None:
    table = PAGE[PAGE.index("## OpenAI's parameters") :]
    named = set(re.findall(r"`([a-z_]+)`", "\n".join(_first_cells(table))))
    assert (CHAT | COMPLETION) - named == set()


def test_the_table_says_of_what_is_dropped_or_refused_that_it_is() -> None:
    table = PAGE[PAGE.index("## OpenAI's parameters") :]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    told: dict[str, set[str]] = {"accepted": set(), "refused": set()}
    for row in rows:
        first, rest = row.removeprefix("| ").split(" | ", 1)
        for kind, names in told.items():
            if rest.startswith(kind):
                names.update(re.findall(r"`([a-z_]+)`", first))
    assert told["accepted"] & (CHAT | COMPLETION) == NO_EFFECT & (CHAT | COMPLETION)
    assert told["refused"] == UNSUPPORTED.keys() & (CHAT | COMPLETION)


def _first_cells(table: str) -> list[str]:
    return [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
