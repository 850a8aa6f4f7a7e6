"""/v1/completions: prompts in text or token ids, updates to a completion or its chunks."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.openai.generation import Generation, ShownToken, collect
from cluster.openai.heading import Heading
from cluster.openai.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    StopReason,
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
        echoes: One per choice.
    """
    has_logprobs = body.logprobs is not None
    if body.stream:
        events = stream_completion(
            generation,
            heading,
            echoes=echoes,
            tokenizer=tokenizer,
            has_logprobs=has_logprobs,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        async with aclosing(events):
            async for event in events:
                yield event
    else:
        completion = await collect_completion(
            generation,
            heading,
            echoes=echoes,
            tokenizer=tokenizer,
            has_logprobs=has_logprobs,
        )
        yield completion.model_dump_json().encode()


async def stream_completion(
    generation: Generation,
    heading: Heading,
    *,
    echoes: Sequence[Echo | None],
    tokenizer: Tokenizer,
    has_logprobs: bool,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events, without the [DONE] at its end.

    Args:
        echoes: One per choice.
    """
    unechoed = dict(enumerate(echoes))
    num_chars = [0] * len(echoes)

    fields = {"usage": None} if include_usage else {}
    text_events: dict[int, TextEvent] = {}

    def text_event(index: int) -> TextEvent:
        return TextEvent(
            lambda text: _completion(heading, [_choice(index, text, None, None, None)], **fields)
        )

    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            echo = unechoed.pop(update.index, None)
            text = update.text if echo is None else echo.text + update.text
            if has_logprobs or update.finish_reason is not None:
                if not text and not update.tokens and update.finish_reason is None:
                    continue
                logprobs = None
                if has_logprobs:
                    scored = _scored(echo, update.prompt_logprobs, update.tokens)
                    logprobs = _logprobs(scored, tokenizer, num_chars[update.index])
                    num_chars[update.index] += sum(map(len, logprobs.tokens))
                choice = _choice(
                    update.index, text, logprobs, update.finish_reason, update.stop_reason
                )
                if not update.was_sent:
                    event_id = generation.event_id()
                    yield encode_event(_completion(heading, [choice], **fields), event_id)
            elif text and not update.was_sent:
                if update.index not in text_events:
                    text_events[update.index] = text_event(update.index)
                yield text_events[update.index].encode(text, generation.event_id())
    if include_usage:
        yield encode_event(_completion(heading, [], usage=generation.usage()))


async def collect_completion(
    generation: Generation,
    heading: Heading,
    *,
    echoes: Sequence[Echo | None],
    tokenizer: Tokenizer,
    has_logprobs: bool,
) -> Completion:
    """Wait for the whole answer."""
    choices = await collect(generation)
    return _completion(
        heading,
        [
            _choice(
                index,
                choice.text if echo is None else echo.text + choice.text,
                _logprobs(_scored(echo, choice.prompt_logprobs, choice.tokens), tokenizer, 0)
                if has_logprobs
                else None,
                choice.finish_reason,
                choice.stop_reason,
            )
            for index, (echo, choice) in enumerate(zip(echoes, choices, strict=True))
        ],
        usage=generation.usage(),
    )


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
    tokens: Sequence[tuple[int, TokenLogprobs | None]], tokenizer: Tokenizer, text_offset: int
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
                for token_id, logprob in zip(
                    logprobs.top_token_ids, logprobs.top_logprobs, strict=True
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
