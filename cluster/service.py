"""An OpenAI endpoint over any `EngineClient`: what the routes call, and all that they share."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.admission import Admission, Ticket
from cluster.api_keys import ApiKeys, KeyUse, KeyUses
from cluster.exposition import Exposition
from cluster.fleet_page import FleetState, describe_fleet
from cluster.openai.chat import collect_chat, render_messages, stream_chat
from cluster.openai.completions import (
    collect_completion,
    encode_prompts,
    make_echoes,
    stream_completion,
)
from cluster.openai.engine_client import (
    Caller,
    ChoiceRequest,
    EngineClient,
    EngineInfo,
    GenerateRequest,
)
from cluster.openai.errors import describe_error, internal_error
from cluster.openai.generation import Generation
from cluster.openai.heading import make_heading
from cluster.openai.sampling import make_sampling_params
from cluster.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    ProfileStatus,
)
from cluster.openai.sse import encode_error_event
from cluster.request_watch import RequestWatch
from cluster.router_stats import RouterStats
from engine.config import EngineConfig
from engine.errors import ModelNotFoundError, QwenOnRayError, RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_THREADS = 4
_ANYBODY = Caller()

_T = TypeVar("_T")


class OpenAIService:
    """Answers OpenAI requests with one engine. Belongs to one event loop.

    Args:
        template: None for a model that knows no conversations.
        router_id: Tells this router's metrics from those of others.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        engine: EngineClient,
        router_id: str = "",
    ) -> None:
        self.engine = engine
        self._stats = RouterStats()
        self._exposition = Exposition(config.model_names[0], router_id)
        self._config = config
        self._tokenizer = tokenizer
        self._template = template
        self._keys = (
            ApiKeys.from_file(Path(config.api_key_file)) if config.api_key_file else ApiKeys()
        )
        self._key_uses = KeyUses(self._keys)
        self._admission = Admission(config.max_queued_requests, config.max_queued_tokens)
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._started_at = int(time.time())

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_key(self, authorization: str | None, *, is_admin_needed: bool) -> bytes:
        """Check a request's Authorization header, and say whose it is; see `ApiKeys.check`."""
        return self._keys.check(authorization, is_admin_needed=is_admin_needed)

    async def chat(
        self, body: ChatCompletionRequest, request_id: str, caller: Caller = _ANYBODY
    ) -> AsyncGenerator[bytes, None]:
        """Answer a chat request: the stream's events without its end, or the whole object.

        Args:
            body: The request.
            request_id: As the client sees it.
            caller: Who sends it.

        Raises:
            RequestError, EngineError: Before the first part, or amid a stream.
        """
        self._check_model(body.model)
        with (
            self._key_uses.enter(caller.tenant) as key_use,
            self._admit(body, num_prompts=1) as ticket,
        ):
            arrival_s = time.monotonic()
            info = await self._ready_info()
            prompt, has_special = await self._in_thread(partial(self._encode_chat, body))
            self._stats.special_tokens_in_messages_total += has_special
            request = self._make_request(
                body, request_id, [prompt], "messages", info, ticket, caller, key_use
            )
            heading = make_heading(request_id, body.model, info.fingerprint)
            with RequestWatch(request, ticket, key_use, self._stats, arrival_s) as watch:
                generation = self._generation(body, request, watch)
                if body.stream:
                    events = stream_chat(
                        generation,
                        heading,
                        tokenizer=self._tokenizer,
                        include_usage=_includes_usage(body),
                    )
                    async with aclosing(events):
                        async for event in events:
                            yield event
                else:
                    completion = await collect_chat(
                        generation,
                        heading,
                        tokenizer=self._tokenizer,
                        has_logprobs=body.logprobs,
                    )
                    yield completion.model_dump_json().encode()

    async def complete(
        self, body: CompletionRequest, request_id: str, caller: Caller = _ANYBODY
    ) -> AsyncGenerator[bytes, None]:
        """Answer a completion request, as `chat` does."""
        self._check_model(body.model)
        with (
            self._key_uses.enter(caller.tenant) as key_use,
            self._admit(body, num_prompts=len(body.prompt)) as ticket,
        ):
            arrival_s = time.monotonic()
            info = await self._ready_info()
            prompts = await self._in_thread(
                partial(encode_prompts, body, self._tokenizer, vocab_size=info.vocab_size)
            )
            request = self._make_request(
                body, request_id, prompts, "prompt", info, ticket, caller, key_use
            )
            heading = make_heading(request_id, body.model, info.fingerprint)
            echoes = await self._in_thread(partial(make_echoes, body, prompts, self._tokenizer))
            has_logprobs = body.logprobs is not None
            with RequestWatch(request, ticket, key_use, self._stats, arrival_s) as watch:
                generation = self._generation(body, request, watch)
                if body.stream:
                    events = stream_completion(
                        generation,
                        heading,
                        echoes=echoes,
                        tokenizer=self._tokenizer,
                        has_logprobs=has_logprobs,
                        include_usage=_includes_usage(body),
                    )
                    async with aclosing(events):
                        async for event in events:
                            yield event
                else:
                    completion = await collect_completion(
                        generation,
                        heading,
                        echoes=echoes,
                        tokenizer=self._tokenizer,
                        has_logprobs=has_logprobs,
                    )
                    yield completion.model_dump_json().encode()

    async def models(self) -> ModelList:
        """List the one model, by the name that clients should use."""
        return ModelList(data=[await self.model(self._config.model_names[0])])

    async def model(self, name: str) -> ModelCard:
        """Describe the model by any name that it is known by.

        Raises:
            ModelNotFoundError: It is known by no such name.
        """
        self._check_model(name)
        info = await self.engine.engine_info()
        return ModelCard(
            id=name,
            created=self._started_at,
            owned_by="qwen-on-ray",
            root=self._config.model_path,
            max_model_len=info.context_length or None,
        )

    async def profile(self, num_steps: int) -> ProfileStatus:
        """Have one engine trace its next steps; 0 ends a trace early.

        Raises:
            RequestError: The server was started without --profile-dir.
            EngineNotReadyError: No engine is there.
        """
        directory = self._config.profile_dir
        if directory is None:
            raise RequestError(
                "Profiling is off. Start the server with --profile-dir=DIR to write traces there."
            )
        await self.engine.profile(num_steps)
        return ProfileStatus(num_steps=num_steps, directory=directory)

    def _check_model(self, name: str) -> None:
        names = self._config.model_names
        if name not in names:
            known = " or ".join(names)
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist; here is {known}.")

    def _admit(self, body: ChatCompletionRequest | CompletionRequest, num_prompts: int) -> Ticket:
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        num_choices = num_prompts * body.n
        if num_choices > self._admission.max_waiting:
            raise RequestError(
                f"The request asks for {num_choices} choices; at most "
                f"{self._admission.max_waiting} may wait here. Send fewer prompts at a time.",
                param="n" if num_prompts == 1 else "prompt",
            )
        return self._admission.admit(num_choices)

    async def _ready_info(self) -> EngineInfo:
        info = await self.engine.engine_info()
        if info.is_ready:
            return info
        return await self.engine.wait_until_ready(self._config.hold_timeout_s)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _encode_chat(self, body: ChatCompletionRequest) -> tuple[list[int], bool]:
        """The prompt, and whether a message spells out a control token; runs in a thread."""
        prompt = self._tokenizer.encode(render_messages(body, self._template))
        if not prompt:
            raise RequestError("The chat template made an empty prompt.", param="messages")
        contents = (message.content or "" for message in body.messages)
        return prompt, any(self._tokenizer.find_special(content) for content in contents)

    def _make_request(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        request_id: str,
        prompts: list[list[int]],
        prompt_field: str,
        info: EngineInfo,
        ticket: Ticket,
        caller: Caller,
        key_use: KeyUse,
    ) -> GenerateRequest:
        choices = []
        for prompt in prompts:
            sampling = make_sampling_params(
                body,
                info=info,
                prompt_len=len(prompt),
                prompt_field=prompt_field,
                stop_token_ids=self._format_stop_token_ids(prompt_field),
            )
            prompt_token_ids = tuple(prompt)
            choices += [
                ChoiceRequest(
                    prompt_token_ids=prompt_token_ids, sampling=sampling, sample_index=index
                )
                for index in range(body.n)
            ]
        ticket.add_tokens(body.n * sum(map(len, prompts)))
        key_use.take_tokens(sum(map(len, prompts)))
        return GenerateRequest(
            request_id=request_id,
            choices=tuple(choices),
            cache_salt=caller.tenant + (body.cache_salt or "").encode(),
            session=caller.session,
        )

    def _generation(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        request: GenerateRequest,
        watch: RequestWatch,
    ) -> Generation:
        return Generation(
            self.engine,
            request,
            make_detokenizer=lambda: Detokenizer(
                self._tokenizer,
                stop=body.stop,
                include_stop=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
                min_tokens=body.min_tokens,
            ),
            own_stop_token_ids=frozenset(body.stop_token_ids),
            on_update=watch.take,
        )

    def _format_stop_token_ids(self, prompt_field: str) -> list[int]:
        """End tokens that the checkpoint's config may not name: the tokenizer's, the format's."""
        tokens = [self._tokenizer.eos_token]
        if prompt_field == "messages" and self._template is not None:
            tokens += self._template.stop_tokens
        ids = [self._tokenizer.token_id(token) for token in tokens if token]
        return [token_id for token_id in ids if token_id is not None]

    def describe_stream_failure(self, error: Exception) -> bytes:
        """The event that ends a stream whose status is long sent."""
        if isinstance(error, QwenOnRayError):
            reply = describe_error(error)
        else:
            logger.error("a stream failed", exc_info=error)
            reply = internal_error()
        self._stats.count_request(reply.status)
        return encode_error_event(reply)

    def count_request(self, status: int) -> None:
        """Count a request that was refused, or failed, with this HTTP status."""
        self._stats.count_request(status)

    def stats(self) -> RouterStats:
        """What this router has counted, and how it is."""
        self._stats.num_waiting = self._admission.num_waiting
        return self._stats

    async def fleet(self) -> FleetState:
        """How each engine is, and what happened to them lately."""
        info, fleet = await self.engine.engine_info(), await self.engine.fleet()
        return describe_fleet(self._config.model_names[0], info, fleet, self.stats())

    async def exposition(self) -> bytes:
        """The engines' metrics and this router's in Prometheus' text format."""
        fleet, engines = await self.engine.engine_info(), await self.engine.engines()
        # Some milliseconds an engine, which streams should not stand still for.
        return await self._in_thread(partial(self._exposition.text, fleet, engines, self.stats()))


def _includes_usage(body: ChatCompletionRequest | CompletionRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
