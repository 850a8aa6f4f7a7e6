"""/v1/completions: prompts in text or token ids, updates to a completion or its chunks."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec

from cluster.openai.generation import ChoiceUpdate, Generation, ShownToken, WholeChoice, collect
from cluster.openai.heading import Heading
from cluster.openai.prompt_logprobs import spell_prompt_logprobs
from cluster.openai.sampling import num_samples
from cluster.openai.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    StopReason,
    StreamOptions,
    Usage,
)
from cluster.openai.sse import TextEvent, encode_event
from engine.errors import RequestError
from engine.request import TokenLogprobs
from engine.text.tokenizer import Tokenizer


def encode_prompts(
    given: Sequence[str | list[int]], tokenizer: Tokenizer, *, vocab_size: int, param: str
) -> list[list[int]]:
    """Turn each prompt into token ids.

    Args:
        given: The prompts as the client wrote them.
        param: What the client called them.

    Raises:
        RequestError: A prompt is empty, or has an id that the model does not have.
    """
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            token_ids = tokenizer.encode(prompt, add_special_tokens=True)
        else:
            token_ids = prompt
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"The {param} has the token id {token_id}; ids run from 0 to "
                        f"{vocab_size - 1}.",
                        param=param,
                    )
        if not token_ids:
            raise RequestError(f"A {param} is empty; give at least one token.", param=param)
        prompts.append(token_ids)
    return prompts


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that stands at the beginning of its choices."""

    text: str
    token_ids: Sequence[int]


def make_echoes(
    request: CompletionRequest, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Sequence[Echo | None]:
    """Say what each choice begins with: its prompt with `echo`, else nothing.

    Args:
        prompts: The request's, as token ids.
    """
    if not request.echo:
        return [None] * (len(request.prompt) * request.n)
    echoes: list[Echo | None] = []
    for prompt, token_ids in zip(request.prompt, prompts, strict=True):
        text = prompt
        if not isinstance(text, str):
            text = b"".join(map(tokenizer.token_bytes, token_ids)).decode(errors="replace")
        echoes += [Echo(text, token_ids)] * request.n
    return echoes


async def answer_completion(
    body: CompletionRequest,
    generation: Generation,
    heading: Heading,
    tokenizer: Tokenizer,
    echoes: Sequence[Echo | None],
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end, or the whole object.

    Args:
        echoes: One per choice of the answer.
    """
    if body.stream:
        stream = CompletionStream(body, generation, heading, tokenizer, echoes)
        async with aclosing(generation.updates()) as updates:
            async for update in updates:
                event = stream.take(update)
                if event and not update.was_sent:
                    yield event
        if end := stream.end():
            yield end
        return
    choices = _best_choices(body, await collect(generation), generation)
    make_json = partial(_whole_json, body, choices, generation, heading, tokenizer, echoes)
    # A long prompt's log probabilities take as long as hundreds of events.
    has_prompt_logprobs = generation.request.choices[0].sampling.prompt_logprobs is not None
    yield await asyncio.to_thread(make_json) if has_prompt_logprobs else make_json()


class CompletionStream:
    """Updates to the events of one stream.

    What is text and nothing else goes the quick way, a `TextEvent`.

    Args:
        echoes: One per choice.
    """

    def __init__(
        self,
        body: CompletionRequest,
        generation: Generation,
        heading: Heading,
        tokenizer: Tokenizer,
        echoes: Sequence[Echo | None],
    ) -> None:
        options = body.stream_options or StreamOptions()
        self._has_usage = options.include_usage
        self._has_usage_of_choices = options.has_usage_of_choices
        self._num_logprobs = body.logprobs
        self._generation = generation
        self._heading = heading
        self._tokenizer = tokenizer
        self._unechoed = dict(enumerate(echoes))
        self._num_chars = [0] * len(echoes)
        self._text_events: dict[int, TextEvent] = {}

    def take(self, update: ChoiceUpdate) -> bytes:
        """The event that says what is certain by an update; empty if nothing is."""
        index = update.index
        echo = self._unechoed.pop(index, None)
        text = update.text if echo is None else echo.text + update.text
        if not text and not update.tokens and update.finish_reason is None:
            return b""
        is_text = self._num_logprobs is None and update.finish_reason is None
        if is_text and not self._has_usage_of_choices:
            if index not in self._text_events:
                self._text_events[index] = self._text_event(index)
            return self._text_events[index].encode(text, self._generation.event_id())
        logprobs = None
        if self._num_logprobs is not None:
            scored = _scored(echo, update.prompt_logprobs, update.tokens)
            num_chars = self._num_chars[index]
            logprobs = _logprobs(scored, self._tokenizer, num_chars, self._num_logprobs)
            self._num_chars[index] += sum(map(len, logprobs.tokens))
        choice = _choice(index, text, logprobs, update.finish_reason, update.stop_reason)
        usage = self._generation.choice_usage(index) if self._has_usage_of_choices else None
        return encode_event(self._completion([choice], usage), self._generation.event_id())

    def end(self) -> bytes:
        """The event behind all updates, if the client wants one."""
        if not self._has_usage:
            return b""
        return encode_event(self._completion([], self._generation.usage()))

    def _text_event(self, index: int) -> TextEvent:
        return TextEvent(lambda text: self._completion([_choice(index, text, None, None, None)]))

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> Completion:
        fields = {"usage": usage} if self._has_usage else {}
        return _completion(self._heading, choices, **fields)


def _best_choices(
    body: CompletionRequest, choices: Sequence[WholeChoice], generation: Generation
) -> list[WholeChoice]:
    """Of each prompt's choices the n that are likeliest by the token, the best first."""
    num_generated = num_samples(body)
    if num_generated == body.n:
        return list(choices)
    best: list[WholeChoice] = []
    for start in range(0, len(choices), num_generated):
        indices = range(start, start + num_generated)
        ranked = sorted(indices, key=generation.mean_logprob, reverse=True)
        best += [choices[index] for index in ranked[: body.n]]
    return best


def _whole_json(
    body: CompletionRequest,
    choices: Sequence[WholeChoice],
    generation: Generation,
    heading: Heading,
    tokenizer: Tokenizer,
    echoes: Sequence[Echo | None],
) -> bytes:
    whole: list[CompletionChoice] = []
    for index, (echo, choice) in enumerate(zip(echoes, choices, strict=True)):
        text = choice.text if echo is None else echo.text + choice.text
        logprobs = None
        if body.logprobs is not None:
            scored = _scored(echo, choice.prompt_logprobs, choice.tokens)
            logprobs = _logprobs(scored, tokenizer, 0, body.logprobs)
        whole.append(_choice(index, text, logprobs, choice.finish_reason, choice.stop_reason))
    completion = _completion(heading, whole, usage=generation.usage())
    if body.prompt_logprobs is None:
        return completion.model_dump_json().encode()
    prompts = [
        each.prompt_token_ids for each in generation.request.choices if each.sample_index == 0
    ]
    fields = completion.model_dump()
    for index, (choice, shown) in enumerate(zip(choices, fields["choices"], strict=True)):
        shown["prompt_logprobs"] = spell_prompt_logprobs(
            prompts[index // body.n], choice.prompt_logprobs, body.prompt_logprobs, tokenizer
        )
    # pydantic would hold all streams up for seconds.
    return msgspec.json.encode(fields)


def _completion(heading: Heading, choices: list[CompletionChoice], **usage: object) -> Completion:
    return Completion.model_validate(
        {
            "id": heading.id,
            "object": "text_completion",
            "created": heading.created,
            "model": heading.model,
            "choices": choices,
            "system_fingerprint": heading.system_fingerprint,
            **usage,
        }
    )


def _choice(
    index: int,
    text: str,
    logprobs: CompletionLogprobs | None,
    finish_reason: StopReason | None,
    stop_reason: int | str | None,
) -> CompletionChoice:
    return CompletionChoice(
        index=index,
        text=text,
        logprobs=logprobs,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )


def _scored(
    echo: Echo | None,
    prompt_logprobs: Sequence[TokenLogprobs],
    tokens: Sequence[ShownToken],
) -> list[tuple[int, TokenLogprobs | None]]:
    """Token ids and their log probabilities, an echoed prompt's first; its first token has none."""
    prompt = () if echo is None else echo.token_ids
    scored = list(zip(prompt, [None, *prompt_logprobs], strict=False))
    return [*scored, *((token.token_id, token.logprobs) for token in tokens)]


def _logprobs(
    tokens: Sequence[tuple[int, TokenLogprobs | None]],
    tokenizer: Tokenizer,
    text_offset: int,
    num_top: int,
) -> CompletionLogprobs:
    def spell(token_id: int) -> str:
        token = tokenizer.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            # Part of a character: OpenAI writes such a token so that it still is unambiguous.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token_id, logprobs in tokens:
        spelled = spell(token_id)
        top = None
        if logprobs is not None:
            top = {
                spell(token_id): logprob
                # Of a prompt's tokens there may be more, for its own log probabilities' sake.
                for token_id, logprob in zip(
                    logprobs.top_token_ids[:num_top], logprobs.top_logprobs, strict=False
                )
            }
            # As OpenAI does, the chosen token is among its alternatives even if it is less likely.
            top.setdefault(spelled, logprobs.logprob)
        found.tokens.append(spelled)
        found.token_logprobs.append(None if logprobs is None else logprobs.logprob)
        found.top_logprobs.append(top)
        found.text_offset.append(text_offset)
        text_offset += len(spelled)
    return found
