"""/v1/chat/completions: messages to a prompt, updates to a chat completion or its chunks."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from cluster.openai.generation import Generation, ShownToken, collect
from cluster.openai.heading import Heading
from cluster.openai.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    StopReason,
    TopLogprob,
)
from cluster.openai.sse import TextEvent, encode_event
from engine.errors import RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer


def render_messages(request: ChatCompletionRequest, template: ChatTemplate | None) -> str:
    """Write the conversation as the model's prompt.

    Raises:
        RequestError: The model knows no conversations, a message has no content, or the template
            refuses them.
    """
    if template is None:
        raise RequestError(
            "This model has no chat template: it is a base model. Use /v1/completions, or start "
            "the server with --chat-template."
        )
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(request.messages):
        if message.content is None:
            raise RequestError(
                f"messages[{index}] has no content.", param=f"messages[{index}].content"
            )
        # "developer" is OpenAI's later name of "system", which templates do not know.
        role = "system" if message.role == "developer" else message.role
        entry = {"role": role, "content": message.content}
        if message.name is not None:
            entry["name"] = message.name
        if message.reasoning_content is not None:
            entry["reasoning_content"] = message.reasoning_content
        messages.append(entry)
    return template.render(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        kwargs=request.chat_template_kwargs,
    )


async def answer_chat(
    body: ChatCompletionRequest, generation: Generation, heading: Heading, tokenizer: Tokenizer
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end, or the whole object."""
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = stream_chat(generation, heading, tokenizer=tokenizer, include_usage=usage)
        async with aclosing(events):
            async for event in events:
                yield event
    else:
        completion = await collect_chat(
            generation, heading, tokenizer=tokenizer, has_logprobs=body.logprobs
        )
        yield completion.model_dump_json().encode()


async def stream_chat(
    generation: Generation,
    heading: Heading,
    *,
    tokenizer: Tokenizer,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end."""

    def chunk(choices: list[ChatChunkChoice], **usage: Any) -> ChatCompletionChunk:
        if include_usage and not usage:
            usage = {"usage": None}
        return ChatCompletionChunk(
            id=heading.id,
            object="chat.completion.chunk",
            created=heading.created,
            model=heading.model,
            choices=choices,
            system_fingerprint=heading.system_fingerprint,
            **usage,
        )

    def text_event(index: int) -> TextEvent:
        return TextEvent(lambda text: chunk([_chunk_choice(index, ChatDelta(content=text))]))

    text_events: dict[int, TextEvent] = {}
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            events = b""
            if update.index not in text_events:
                text_events[update.index] = text_event(update.index)
                delta = ChatDelta(role="assistant", content="")
                opening = chunk([_chunk_choice(update.index, delta)])
                events = encode_event(opening, generation.opening_event_id(update.index))
            if update.tokens or update.finish_reason is not None:
                choice = _chunk_choice(
                    update.index,
                    ChatDelta(content=update.text) if update.text or update.tokens else ChatDelta(),
                    logprobs=_logprobs(update.tokens, tokenizer) if update.tokens else None,
                    finish_reason=update.finish_reason,
                )
                events += encode_event(chunk([choice]), generation.event_id())
            elif update.text:
                events += text_events[update.index].encode(update.text, generation.event_id())
            if events and not update.was_sent:
                yield events
    if include_usage:
        yield encode_event(chunk([], usage=generation.usage()))


async def collect_chat(
    generation: Generation,
    heading: Heading,
    *,
    tokenizer: Tokenizer,
    has_logprobs: bool,
) -> ChatCompletion:
    """Wait for the whole answer."""
    choices = await collect(generation)
    return ChatCompletion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=[
            ChatChoice(
                index=index,
                message=AssistantMessage(content=choice.text),
                logprobs=_logprobs(choice.tokens, tokenizer) if has_logprobs else None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage(),
        system_fingerprint=heading.system_fingerprint,
    )


def _chunk_choice(
    index: int,
    delta: ChatDelta,
    *,
    logprobs: ChatLogprobs | None = None,
    finish_reason: StopReason | None = None,
) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def _logprobs(tokens: Sequence[ShownToken], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs(content=[_token_logprob(token, tokenizer) for token in tokens])


def _token_logprob(token: ShownToken, tokenizer: Tokenizer) -> ChatTokenLogprob:
    def spell(token_id: int) -> dict[str, Any]:
        token_bytes = tokenizer.token_bytes(token_id)
        # A token may be part of a character: `bytes` is exact, `token` readable.
        return {"token": token_bytes.decode(errors="replace"), "bytes": list(token_bytes)}

    logprobs = token.logprobs
    return ChatTokenLogprob(
        **spell(token.token_id),
        logprob=logprobs.logprob,
        top_logprobs=[
            TopLogprob(**spell(token_id), logprob=logprob)
            for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        ],
    )
