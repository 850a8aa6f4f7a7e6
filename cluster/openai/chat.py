"""/v1/chat/completions: messages to a prompt, updates to a chat completion or its chunks."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from cluster.openai.answer_deltas import AnswerDeltas, whole_message
from cluster.openai.answer_form import AnswerForm
from cluster.openai.generation import Generation, ShownToken, WholeChoice, collect
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
    ChatMessage,
    ChatStopReason,
    ChatTokenLogprob,
    TopLogprob,
)
from cluster.openai.sse import TextEvent, encode_event
from cluster.openai.tools import callable_tools, past_calls, template_tools
from engine.errors import RequestError
from engine.text.chat_template import ChatMLTemplate, ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.text.tools_react import spell_react


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
    messages = [_template_message(index, each) for index, each in enumerate(request.messages)]
    tools = template_tools(request)
    if isinstance(template, ChatMLTemplate):
        messages, tools = spell_react(messages, callable_tools(request)), []
    kwargs = dict(request.chat_template_kwargs)
    if request.enable_thinking is not None:
        kwargs["enable_thinking"] = request.enable_thinking
    return template.render(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        kwargs=kwargs,
        tools=tools,
    )


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    if message.content is None and not message.tool_calls:
        raise RequestError(f"messages[{index}] has no content.", param=f"messages[{index}].content")
    # "developer" is OpenAI's later name of "system", which templates do not know.
    role = "system" if message.role == "developer" else message.role
    entry: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        entry["name"] = message.name
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        entry["reasoning_content"] = reasoning
    if message.tool_calls:
        entry["tool_calls"] = past_calls(message.tool_calls)
    return entry


async def answer_chat(
    body: ChatCompletionRequest,
    generation: Generation,
    heading: Heading,
    tokenizer: Tokenizer,
    form: AnswerForm,
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end, or the whole object."""
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = stream_chat(
            generation, heading, tokenizer=tokenizer, form=form, include_usage=usage
        )
        async with aclosing(events):
            async for event in events:
                yield event
    else:
        completion = await collect_chat(
            generation, heading, tokenizer=tokenizer, form=form, has_logprobs=body.logprobs
        )
        yield completion.model_dump_json().encode()


async def stream_chat(
    generation: Generation,
    heading: Heading,
    *,
    tokenizer: Tokenizer,
    form: AnswerForm,
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
    deltas = [
        None if form.is_plain else AnswerDeltas(form.reader(), heading.id, index)
        for index in range(len(generation.request.choices))
    ]
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            events = b""
            if update.index not in text_events:
                text_events[update.index] = text_event(update.index)
                delta = ChatDelta(role="assistant", content="")
                opening = chunk([_chunk_choice(update.index, delta)])
                events = encode_event(opening, generation.opening_event_id(update.index))
            answer = deltas[update.index]
            text, finish_reason = update.text, update.finish_reason
            delta: ChatDelta | None = None
            if answer is not None:
                delta = answer.take(text, is_last=finish_reason is not None)
                finish_reason = answer.finish_reason(finish_reason)
                # What is text and nothing else goes the quick way.
                is_text = delta.model_fields_set <= {"content"}
                text, delta = (delta.content or "", None) if is_text else ("", delta)
            if update.tokens or finish_reason is not None:
                delta = delta or (ChatDelta(content=text) if text or update.tokens else ChatDelta())
            if delta is not None:
                choice = _chunk_choice(
                    update.index,
                    delta,
                    logprobs=_logprobs(update.tokens, tokenizer) if update.tokens else None,
                    finish_reason=finish_reason,
                )
                events += encode_event(chunk([choice]), generation.event_id())
            elif text:
                events += text_events[update.index].encode(text, generation.event_id())
            if events and not update.was_sent:
                yield events
    if include_usage:
        yield encode_event(chunk([], usage=generation.usage()))


async def collect_chat(
    generation: Generation,
    heading: Heading,
    *,
    tokenizer: Tokenizer,
    form: AnswerForm,
    has_logprobs: bool,
) -> ChatCompletion:
    """Wait for the whole answer."""
    choices = await collect(generation)
    return ChatCompletion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=[
            _whole_choice(index, choice, heading, tokenizer, form, has_logprobs=has_logprobs)
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage(),
        system_fingerprint=heading.system_fingerprint,
    )


def _whole_choice(
    index: int,
    choice: WholeChoice,
    heading: Heading,
    tokenizer: Tokenizer,
    form: AnswerForm,
    *,
    has_logprobs: bool,
) -> ChatChoice:
    message = AssistantMessage(content=choice.text)
    finish_reason: ChatStopReason = choice.finish_reason
    if not form.is_plain:
        answer = AnswerDeltas(form.reader(), heading.id, index)
        message = whole_message(answer.take(choice.text, is_last=True))
        finish_reason = answer.finish_reason(choice.finish_reason) or choice.finish_reason
    return ChatChoice(
        index=index,
        message=message,
        logprobs=_logprobs(choice.tokens, tokenizer) if has_logprobs else None,
        finish_reason=finish_reason,
        stop_reason=choice.stop_reason,
    )


def _chunk_choice(
    index: int,
    delta: ChatDelta,
    *,
    logprobs: ChatLogprobs | None = None,
    finish_reason: ChatStopReason | None = None,
) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def _logprobs(tokens: Sequence[ShownToken], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs(content=[token_logprob(token, tokenizer) for token in tokens])


def token_logprob(token: ShownToken, tokenizer: Tokenizer) -> ChatTokenLogprob:
    """Describe a token whose log probabilities are wanted."""

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
