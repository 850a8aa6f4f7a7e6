"""Request fields to `SamplingParams`: defaults, context length, and ids within the vocabulary."""

from collections.abc import Iterable
from typing import Any

from cluster.openai.engine_client import EngineInfo
from cluster.openai.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
)
from engine.errors import ContextLengthError, RequestError
from engine.request import SamplingParams

# Taken from the client, else from generation_config.json, else SamplingParams' own default.
DEFAULTED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def num_samples(body: ChatCompletionRequest | CompletionRequest) -> int:
    """How many choices are generated for each prompt; the answer has n of them.

    Raises:
        RequestError: `best_of` is less than n, or more in a stream.
    """
    if isinstance(body, ChatCompletionRequest) or body.best_of is None:
        return body.n
    if body.best_of < body.n:
        raise RequestError(
            f"best_of is {body.best_of}, less than n, which is {body.n}.", param="best_of"
        )
    if body.stream and body.best_of > body.n:
        raise RequestError(
            "best_of does not go with stream: which choices are best is known at their end.",
            param="best_of",
        )
    return body.best_of


def make_sampling_params(
    request: ChatCompletionRequest | CompletionRequest,
    *,
    info: EngineInfo,
    prompt_len: int,
    prompt_field: str,
    stop_token_ids: Iterable[int],
) -> SamplingParams:
    """Say how the answer to one prompt is to be sampled; `max_tokens` comes out set.

    Where a completion is to have none, one is generated that nobody is shown.

    Args:
        prompt_len: In tokens.
        prompt_field: What the prompt is called in this request ("messages", "prompt").
        stop_token_ids: End tokens of the chat format, which hold unless `ignore_eos`.

    Raises:
        RequestError: A parameter is out of range, or a token id is not in the vocabulary.
        ContextLengthError: Prompt, or prompt and `max_tokens`, exceed the context.
    """
    chosen: dict[str, Any] = {}
    for name in DEFAULTED:
        value = request.__dict__[name]
        if value is None:
            value = info.generation_defaults.get(name)
        if value is not None:
            chosen[name] = value
    ends = dict.fromkeys(request.stop_token_ids)
    if not request.ignore_eos:
        ends.update(dict.fromkeys(set(stop_token_ids) - set(info.eos_token_ids)))
    logit_bias = _parse_logit_bias(request.logit_bias or {})
    _check_ids("stop_token_ids", ends, info.vocab_size)
    _check_ids("logit_bias", logit_bias, info.vocab_size)
    return SamplingParams(
        **chosen,
        logit_bias=logit_bias,
        seed=request.seed,
        max_tokens=_max_tokens(request, info.context_length, prompt_len, prompt_field),
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(ends),
        ignore_eos=request.ignore_eos,
        logprobs=_num_generated_logprobs(request),
        prompt_logprobs=_num_prompt_logprobs(request),
    )


def _max_tokens(
    request: ChatCompletionRequest | CompletionRequest,
    context_length: int,
    prompt_len: int,
    prompt_field: str,
) -> int:
    name, max_tokens = "max_tokens", request.max_tokens
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        name, max_tokens = "max_completion_tokens", request.max_completion_tokens
    if name == "max_tokens" and max_tokens == 0 and isinstance(request, CompletionRequest):
        max_tokens = 1
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"{name} is {max_tokens}; it must be at least 1.", param=name)
    room = context_length - prompt_len
    if room < 1:
        raise ContextLengthError(
            f"The prompt has {prompt_len} tokens, but this model's context is {context_length} "
            "tokens, of which the answer needs at least one. Shorten the prompt.",
            param=prompt_field,
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"The prompt has {prompt_len} tokens and {name} is {max_tokens}, together "
            f"{prompt_len + max_tokens}, but this model's context is {context_length} tokens. "
            f"Lower {name} to {room}, or shorten the prompt.",
            param=name,
        )
    if max_tokens is None:
        is_chat = isinstance(request, ChatCompletionRequest)
        return room if is_chat else min(room, DEFAULT_COMPLETION_TOKENS)
    return max_tokens


def _num_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs is None:
        return 0 if request.logprobs else None
    if not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if not 0 <= request.top_logprobs <= 20:
        raise RequestError(
            f"top_logprobs is {request.top_logprobs}; it must be at least 0 and at most 20.",
            param="top_logprobs",
        )
    return request.top_logprobs


def _num_generated_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    num_logprobs = _num_logprobs(request)
    # Without them nobody knows which choices are best.
    is_ranked = num_samples(request) > request.n
    return 0 if is_ranked and num_logprobs is None else num_logprobs


def _num_prompt_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError(
            "prompt_logprobs does not go with stream. With echo and logprobs the log probabilities "
            "of a completion's prompt are streamed.",
            param="prompt_logprobs",
        )
    # An echoed prompt is part of the answer, and so its tokens have log probabilities, too.
    is_echoed = isinstance(request, CompletionRequest) and request.echo
    wanted = (_num_logprobs(request) if is_echoed else None, request.prompt_logprobs)
    return max((each for each in wanted if each is not None), default=None)


def _parse_logit_bias(bias: dict[str, float]) -> dict[int, float]:
    parsed = {}
    for token_id, value in bias.items():
        # ASCII digits, and few: int() also reads "١٢" and refuses 5,000 digits with a ValueError.
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) < 10):
            raise RequestError(
                f"logit_bias has the key {token_id[:40]!r}, which is no token id.",
                param="logit_bias",
            )
        parsed[int(token_id)] = value
    return parsed


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{field} has the token id {token_id}; ids run from 0 to {vocab_size - 1}.",
                param=field,
            )
