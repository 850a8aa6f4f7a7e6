"""/tokenize and /detokenize: a model's text to tokens and back, as vLLM names it."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from cluster.openai.body import checked_body
from cluster.openai.engine_client import EngineInfo
from cluster.openai.model_text import ModelText
from cluster.openai.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatCompletionRequest,
    ChatMessage,
    RequestObject,
    ToolDefinition,
)
from engine.errors import RequestError

_OF_A_CHAT = (
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template_kwargs",
    "enable_thinking",
)


class TokenizeRequest(RequestObject):
    """Body of POST /tokenize: a prompt, or messages of a chat with what its template takes."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    add_special_tokens: StrictBool | None = None
    """By default true for a prompt; a chat's template brings its frame with it."""
    return_token_strs: StrictBool = False
    add_generation_prompt: StrictBool = True
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default=[]
    )
    chat_template_kwargs: dict[str, Any] = Field(default={})
    enable_thinking: StrictBool | None = None


class TokenizeAnswer(BaseModel):
    """Tokens of a text, in its order; `token_strs` if they were asked for."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestObject):
    """Body of POST /detokenize."""

    model: StrictStr | None = None
    tokens: Annotated[list[StrictInt], Field(fail_fast=True)]


class DetokenizeAnswer(BaseModel):
    prompt: str


def tokenize(text: ModelText, body: TokenizeRequest, info: EngineInfo) -> TokenizeAnswer:
    """The tokens that a completion or a chat would send to the engine. Not for an event loop.

    Raises:
        RequestError: There is not one of prompt and messages, or the template refuses them.
    """
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either prompt or messages.", param="prompt")
    if body.prompt is not None:
        _refuse_fields_of_a_chat(body)
        is_framed = body.add_special_tokens is not False
        tokens = text.tokenizer.encode(body.prompt, add_special_tokens=is_framed)
    else:
        if body.add_special_tokens:
            raise RequestError(
                "add_special_tokens does not go with messages: the chat template writes the "
                "control tokens.",
                param="add_special_tokens",
            )
        fields = {name: body.__dict__[name] for name in _OF_A_CHAT}
        chat = checked_body(ChatCompletionRequest, {"model": body.model or "", **fields})
        tokens = text.encode_chat(chat).token_ids
    strings = None
    if body.return_token_strs:
        strings = [_text_of(text, [token_id]) for token_id in tokens]
    return TokenizeAnswer(
        count=len(tokens),
        max_model_len=info.context_length or None,
        tokens=tokens,
        token_strs=strings,
    )


def detokenize(text: ModelText, body: DetokenizeRequest, info: EngineInfo) -> DetokenizeAnswer:
    """The text that tokens stand for, control tokens and all. Not for an event loop.

    Raises:
        RequestError: An id is not in the vocabulary.
    """
    vocab_size = max(text.tokenizer.vocab_size, info.vocab_size)
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"tokens has the token id {token_id}; ids run from 0 to {vocab_size - 1}.",
                param="tokens",
            )
    return DetokenizeAnswer(prompt=_text_of(text, body.tokens))


def _text_of(text: ModelText, token_ids: Sequence[int]) -> str:
    return b"".join(map(text.tokenizer.token_bytes, token_ids)).decode(errors="replace")


def _refuse_fields_of_a_chat(body: TokenizeRequest) -> None:
    for name in sorted(body.model_fields_set & set(_OF_A_CHAT)):
        raise RequestError(f"{name} goes with messages, not with prompt.", param=name)
