"""/v1/chat/completions: updates to a chat completion or its chunks."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from cluster.openai.answer_deltas import AnswerDeltas, whole_message
from cluster.openai.answer_form import AnswerForm
from cluster.openai.generation import (
    ChoiceUpdate,
    Generation,
    ShownToken,
    WholeChoice,
    collect,
)
from cluster.openai.heading import Heading
from cluster.openai.prompt_logprobs import spell_prompt_logprobs
from cluster.openai.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatStopReason,
    ChatTokenLogprob,
    StreamOptions,
    TopLogprob,
    Usage,
)
from cluster.openai.sse import TextEvent, encode_event
from cluster.openai.tools import asks_in_the_old_way
from engine.text.tokenizer import Tokenizer


async def answer_chat(
    body: ChatCompletionRequest,
    generation: Generation,
    heading: Heading,
    tokenizer: Tokenizer,
    form: AnswerForm,
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end, or the whole object."""
    if body.stream:
        stream = ChatStream(body, generation, heading, tokenizer, form)
        async with aclosing(generation.updates()) as updates:
            async for update in updates:
                events = stream.take(update)
                if events and not update.was_sent:
                    yield events
        if end := stream.end():
            yield end
        return
    choices = await collect(generation)
    make_json = partial(_whole_json, body, choices, generation, heading, tokenizer, form)
    # A long prompt's log probabilities take as long as hundreds of events.
    yield make_json() if body.prompt_logprobs is None else await asyncio.to_thread(make_json)


class ChatStream:
    """Updates to the events of one stream.

    What is text and nothing else goes the quick way, a `TextEvent`.
    """

    def __init__(
        self,
        body: ChatCompletionRequest,
        generation: Generation,
        heading: Heading,
        tokenizer: Tokenizer,
        form: AnswerForm,
    ) -> None:
        options = body.stream_options or StreamOptions()
        self._has_usage = options.include_usage
        self._has_usage_of_choices = options.has_usage_of_choices
        self._generation = generation
        self._heading = heading
        self._tokenizer = tokenizer
        self._text_events: dict[int, TextEvent] = {}
        self._answers = [
            None if form.is_plain else _answer_deltas(body, form, heading, index)
            for index in range(len(generation.request.choices))
        ]

    def take(self, update: ChoiceUpdate) -> bytes:
        """The events that say what is certain by an update; empty if nothing is."""
        index, text = update.index, update.text
        finish_reason: ChatStopReason | None = update.finish_reason
        events = b""
        if index not in self._text_events:
            self._text_events[index] = self._text_event(index)
            opening = ChatChunkChoice(
                index=index,
                delta=ChatDelta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
            )
            events = self._encode(opening, is_opening=True)
        answer = self._answers[index]
        delta: ChatDelta | None = None
        if answer is not None:
            delta = answer.take(text, is_last=finish_reason is not None)
            finish_reason = answer.finish_reason(update.finish_reason)
            is_text = delta.model_fields_set <= {"content"}
            text, delta = (delta.content or "", None) if is_text else ("", delta)
        if delta is None and not update.tokens and finish_reason is None:
            if not text:
                return events
            if not self._has_usage_of_choices:
                event_id = self._generation.event_id()
                return events + self._text_events[index].encode(text, event_id)
        choice = ChatChunkChoice(
            index=index,
            delta=delta or (ChatDelta(content=text) if text or update.tokens else ChatDelta()),
            logprobs=_logprobs(update.tokens, self._tokenizer) if update.tokens else None,
            finish_reason=finish_reason,
        )
        return events + self._encode(choice)

    def end(self) -> bytes:
        """The event behind all updates, if the client wants one."""
        if not self._has_usage:
            return b""
        return encode_event(self._chunk([], usage=self._generation.usage()))

    def _encode(self, choice: ChatChunkChoice, *, is_opening: bool = False) -> bytes:
        generation, index, usage = self._generation, choice.index, None
        if self._has_usage_of_choices:
            usage = generation.choice_usage(index, is_opening=is_opening)
        event_id = generation.opening_event_id(index) if is_opening else generation.event_id()
        return encode_event(self._chunk([choice], usage=usage), event_id)

    def _text_event(self, index: int) -> TextEvent:
        def make_event(text: str) -> ChatCompletionChunk:
            delta = ChatDelta(content=text)
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            return self._chunk([choice])

        return TextEvent(make_event)

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None
    ) -> ChatCompletionChunk:
        # OpenAI has a null in each event but the last, where usage was asked for.
        fields: dict[str, Any] = {"usage": usage} if self._has_usage else {}
        heading = self._heading
        return ChatCompletionChunk(
            id=heading.id,
            object="chat.completion.chunk",
            created=heading.created,
            model=heading.model,
            choices=choices,
            system_fingerprint=heading.system_fingerprint,
            **fields,
        )


def _whole_json(
    body: ChatCompletionRequest,
    choices: Sequence[WholeChoice],
    generation: Generation,
    heading: Heading,
    tokenizer: Tokenizer,
    form: AnswerForm,
) -> bytes:
    completion = ChatCompletion(
        id=heading.id,
        created=heading.created,
        model=heading.model,
        choices=[
            _whole_choice(index, choice, body, heading, tokenizer, form)
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage(),
        system_fingerprint=heading.system_fingerprint,
    )
    if body.prompt_logprobs is None:
        return completion.model_dump_json().encode()
    prompt = generation.request.choices[0].prompt_token_ids
    prompt_logprobs = spell_prompt_logprobs(
        prompt, choices[0].prompt_logprobs, body.prompt_logprobs, tokenizer
    )
    # pydantic would hold all streams up for seconds.
    return msgspec.json.encode({**completion.model_dump(), "prompt_logprobs": prompt_logprobs})


def _whole_choice(
    index: int,
    choice: WholeChoice,
    body: ChatCompletionRequest,
    heading: Heading,
    tokenizer: Tokenizer,
    form: AnswerForm,
) -> ChatChoice:
    message = AssistantMessage(content=choice.text)
    finish_reason: ChatStopReason = choice.finish_reason
    if not form.is_plain:
        answer = _answer_deltas(body, form, heading, index)
        message = whole_message(answer.take(choice.text, is_last=True))
        finish_reason = answer.finish_reason(choice.finish_reason) or choice.finish_reason
    return ChatChoice(
        index=index,
        message=message,
        logprobs=_logprobs(choice.tokens, tokenizer) if body.logprobs else None,
        finish_reason=finish_reason,
        stop_reason=choice.stop_reason,
    )


def _answer_deltas(
    body: ChatCompletionRequest, form: AnswerForm, heading: Heading, index: int
) -> AnswerDeltas:
    is_old = asks_in_the_old_way(body)
    return AnswerDeltas(form.reader(), heading.id, index, is_old=is_old)


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
