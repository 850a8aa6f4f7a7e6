"""Messages to one prompt text: the checkpoint's Jinja template, or ChatML where it has none.

Templates come from checkpoints and are not trusted: they run in Jinja's immutable sandbox, set up
as transformers sets it up, without importing transformers (2.6 s in every router process).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import CheckpointError, ConfigError, RequestError
from engine.text.tokenizer import Tokenizer, read_tokenizer_config

CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"
CHATML_DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."

Message = Mapping[str, Any]


class CallHistory(dict[str, Any]):
    """Arguments of a call in a conversation's past.

    Where a template writes them as JSON they come out as the model wrote them, so that the prompt
    has the very tokens that were generated, which the prefix cache then knows.

    Attributes:
        written: As the model wrote them.
    """

    def __init__(self, arguments: Mapping[str, Any], written: str) -> None:
        super().__init__(arguments)
        self.written = written


class ChatTemplate(Protocol):
    """How a model wants its conversations written.

    Attributes:
        stop_tokens: Texts of tokens that end an answer, beside those that the checkpoint names.
        source: The template as text; empty where it is built in.
    """

    stop_tokens: tuple[str, ...]
    source: str

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Write a conversation as the prompt's text, special tokens spelled out.

        Args:
            messages: Each with "role" and "content", both strings; an assistant's may have
                "tool_calls", as OpenAI has them, but with `CallHistory` for arguments.
            add_generation_prompt: Open the assistant's turn at the end.
            kwargs: The client's `chat_template_kwargs` (enable_thinking, …).
            tools: As OpenAI has them.

        Raises:
            RequestError: The template refuses this conversation, or fails on it.
        """
        ...


class ChatMLTemplate:
    """Qwen1's format, whose checkpoints bring no template; a `ChatTemplate`.

    A conversation that opens without a system message gets the one of the model's card. A last
    message that "is_open" is one that the answer goes on with.
    """

    stop_tokens: tuple[str, ...] = (CHATML_END, "<|endoftext|>")
    source = ""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        assert not tools, "they are written into the messages; see tools_react"
        if kwargs:
            raise RequestError(
                f"chat_template_kwargs has {', '.join(sorted(kwargs))}, but this model's format "
                "(ChatML, built in) takes none.",
                param="chat_template_kwargs",
            )
        if not messages or messages[0]["role"] != "system":
            default = {"role": "system", "content": CHATML_DEFAULT_SYSTEM_PROMPT}
            messages = [default, *messages]
        turns = [
            f"{CHATML_START}{message['role']}\n{message['content']}{CHATML_END}\n"
            for message in messages
        ]
        if messages[-1].get("is_open"):
            turns[-1] = turns[-1].removesuffix(f"{CHATML_END}\n")
        elif add_generation_prompt:
            turns.append(f"{CHATML_START}assistant\n")
        return "".join(turns)


class JinjaTemplate:
    """A Jinja chat template in a sandbox; a `ChatTemplate`. Safe to use from several threads.

    Args:
        source: The template's text.
        variables: What it may refer to beside messages and the client's own (bos_token, …).

    Raises:
        ConfigError: The text is no Jinja template.
    """

    stop_tokens: tuple[str, ...] = ()

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._variables = dict(variables)
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"The chat template cannot be compiled: {error}. Give one that can with "
                "--chat-template."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        reserved = {"messages", "add_generation_prompt", "tools", "documents"} & kwargs.keys()
        if reserved:
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(sorted(reserved))}.",
                param="chat_template_kwargs",
            )
        variables = {**self._variables, **kwargs}
        try:
            return self._template.render(
                variables,
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # Whatever a template does wrong with a client's messages (a key that is missing, an
        # addition of string and list) comes as that operation's own exception.
        except (Exception, RecursionError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def load_chat_template(
    directory: Path, tokenizer: Tokenizer, *, template_file: Path | None = None
) -> ChatTemplate | None:
    """Find the template: the user's file, `chat_template.jinja`, `tokenizer_config.json`, ChatML.

    ChatML is what a checkpoint gets that has no template but has ChatML's tokens (Qwen1). None
    means that the model knows no conversations (a base model).

    Raises:
        ConfigError: The user's file is missing, or a template is not Jinja.
        CheckpointError: `tokenizer_config.json` cannot be read.
    """
    variables = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    if template_file is not None:
        if not template_file.is_file():
            raise ConfigError(f"--chat-template={template_file} is no file.")
        return JinjaTemplate(template_file.read_text(encoding="utf-8"), variables)
    path = directory / "chat_template.jinja"
    if path.is_file():
        return JinjaTemplate(path.read_text(encoding="utf-8"), variables)
    source = _template_of(read_tokenizer_config(directory), directory)
    if source is not None:
        return JinjaTemplate(source, variables)
    if {CHATML_START, CHATML_END} <= tokenizer.special_tokens.keys():
        return ChatMLTemplate()
    return None


def _template_of(config: Mapping[str, Any], directory: Path) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several named templates: [{"name": "default", "template": …}, {"name": "tool_use", …}].
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(
        f"chat_template in {directory / 'tokenizer_config.json'} is neither text nor a list of "
        "named templates. Give a template with --chat-template."
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, CallHistory):
        return value.written
    # Jinja's own filter escapes HTML; models were trained on plain JSON.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers for training: here it only shows its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
