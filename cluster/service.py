"""An OpenAI endpoint over any `EngineClient`: what the routes call, and all that they share."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from cluster.entrance import Entrance, Entry
from cluster.exposition import Exposition
from cluster.fleet_page import FleetState, describe_fleet
from cluster.openai.answer_form import AnswerForm
from cluster.openai.chat import answer_chat
from cluster.openai.completions import answer_completion, encode_prompts, make_echoes
from cluster.openai.embeddings import as_completion, collect_embeddings, embedding_choices
from cluster.openai.engine_client import (
    Caller,
    ChoiceRequest,
    EngineClient,
    EngineInfo,
    GenerateRequest,
)
from cluster.openai.errors import ErrorReply, describe_error, internal_error
from cluster.openai.event_id import parse_event_id
from cluster.openai.generation import (
    ChoiceUpdate,
    Generation,
    PartsOf,
    Resumption,
    of_prompt,
    token_by_token,
    whole,
)
from cluster.openai.heading import Heading, make_heading
from cluster.openai.model_text import ModelText
from cluster.openai.origin import Origin
from cluster.openai.response_answer import ResponseAnswer
from cluster.openai.responses import ResponseCall
from cluster.openai.sampling import num_samples
from cluster.openai.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ModelCard,
    ModelList,
    ProfileStatus,
)
from cluster.openai.sse import encode_error_event
from cluster.request_watch import RequestWatch
from cluster.router_stats import RouterStats
from engine.config import EngineConfig
from engine.errors import ModelNotFoundError, QwenOnRayError, RequestError
from engine.grammar import Grammar
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_THREADS = 4
_ANYBODY = Caller()

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Recalled:
    """A request that was begun elsewhere, as far as it has come.

    Attributes:
        body: The request; of a response, the chat that it is.
        response: What the response was asked with, if it is one.
    """

    body: ChatCompletionRequest | CompletionRequest
    heading: Heading
    resumption: Resumption
    response: ResponseCall | None


class OpenAIService:
    """Answers OpenAI requests with one engine. Belongs to one event loop.

    Args:
        template: None for a model that knows no conversations.
        router_id: Tells this router's metrics from those of others.

    Attributes:
        engine: The way to the engine.
        entrance: What lets requests in.
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
        self._text = ModelText(
            tokenizer,
            template,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )
        self.entrance = Entrance(config)
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._started_at = int(time.time())

    @property
    def config(self) -> EngineConfig:
        """What the router was started with."""
        return self._config

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def chat(
        self,
        body: ChatCompletionRequest,
        request_id: str,
        caller: Caller = _ANYBODY,
        response: ResponseAnswer | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Answer a chat request: the stream's events without its end, or the whole object.

        Args:
            body: The request.
            request_id: As the client sees it.
            caller: Who sends it.
            response: Makes the answer, if it is to be a response.

        Raises:
            RequestError, EngineError: Before the first part, or amid a stream.
        """
        self._check_model(body.model)
        with self.entrance.enter(body, 1, caller) as entry:
            info = await self._ready_info()
            prompt = await self.in_thread(partial(self._text.encode_chat, body))
            self._stats.special_tokens_in_messages_total += prompt.has_special_tokens
            grammar = await self.in_thread(partial(self._text.grammar, body, prompt.form))
            heading = make_heading(request_id, body.model, info.fingerprint)
            origin = Origin.of(body if response is None else response.call, heading)
            request = self._make_request(
                body, origin, [prompt.token_ids], info, entry, caller, grammar
            )
            answer = self._answer(
                body, heading, request, entry, response=response, form=prompt.form
            )
            async with aclosing(answer) as parts:
                async for part in parts:
                    yield part

    async def complete(
        self, body: CompletionRequest, request_id: str, caller: Caller = _ANYBODY
    ) -> AsyncGenerator[bytes, None]:
        """Answer a completion request, as `chat` does."""
        self._check_model(body.model)
        with self.entrance.enter(body, len(body.prompt), caller) as entry:
            info = await self._ready_info()
            prompts = await self._encode_prompts(body.prompt, info, param="prompt")
            grammar = await self.in_thread(partial(self._text.grammar, body))
            heading = make_heading(request_id, body.model, info.fingerprint)
            origin = Origin.of(body, heading)
            request = self._make_request(body, origin, prompts, info, entry, caller, grammar)
            async with aclosing(self._answer(body, heading, request, entry)) as parts:
                async for part in parts:
                    yield part

    async def embed(
        self, body: EmbeddingRequest, request_id: str, caller: Caller = _ANYBODY
    ) -> AsyncGenerator[bytes, None]:
        """Answer an embedding request: the whole object; raises as `chat`."""
        self._check_model(body.model)
        completion = as_completion(body)
        with self.entrance.enter(completion, len(body.input), caller, param="input") as entry:
            info = await self._ready_info()
            prompts = await self._encode_prompts(body.input, info, param="input")
            heading = make_heading(request_id, body.model, info.fingerprint)
            choices = embedding_choices(prompts, info)
            origin = Origin.of(completion, heading)
            request = self._request(completion, origin, choices, entry, caller, None)
            with RequestWatch(
                request, entry.ticket, entry.key_use, self._stats, entry.arrival_s
            ) as watch:
                generation = self._generation(completion, request, watch.take, None)
                embeddings = await collect_embeddings(body, generation, heading)
                yield await self.in_thread(lambda: embeddings.model_dump_json().encode())

    async def recall(
        self, request_id: str, last_event_id: str | None, caller: Caller = _ANYBODY
    ) -> Recalled:
        """Find a request that this router or another one began, to go on with its answer.

        Args:
            request_id: As the client saw it.
            last_event_id: Of the last event that the client has; None if it has none.
            caller: Who asks: the request's own sender.

        Raises:
            RequestError: Nobody knows the request any longer, or the event's id is none of it.
        """
        position = parse_event_id(last_event_id) if last_event_id else None
        engine_id = position.engine_id if position else None
        record = await self.engine.recall(request_id, engine_id=engine_id, tenant=caller.tenant)
        origin = Origin.decode(record.request.origin)
        body = origin.body()
        response = body if isinstance(body, ResponseCall) else None
        return Recalled(
            body.chat if isinstance(body, ResponseCall) else body,
            origin.heading,
            Resumption(record, position),
            response,
        )

    async def resume(
        self,
        recalled: Recalled,
        caller: Caller = _ANYBODY,
        response: ResponseAnswer | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Go on with an answer, as `chat` would have done: what the client has is left out."""
        request = recalled.resumption.record.request
        num_prompts = len(request.choices) // num_samples(recalled.body)
        with self.entrance.enter(recalled.body, num_prompts, caller) as entry:
            entry.ticket.add_tokens(sum(len(each.prompt_token_ids) for each in request.choices))
            answer = self._answer(
                recalled.body, recalled.heading, request, entry, recalled.resumption, response
            )
            async with aclosing(answer) as parts:
                async for part in parts:
                    yield part

    def replay(self, recalled: Recalled, response: ResponseAnswer) -> AsyncGenerator[bytes, None]:
        """What has come of a response, as an answer of its own: no engine is asked for more."""
        record = recalled.resumption.record
        past = [
            msgspec.structs.replace(came, finish_reason=came.finish_reason or "stop")
            for came in record.past
        ]
        ended = Resumption(msgspec.structs.replace(record, past=past), None)
        assert isinstance(recalled.body, ChatCompletionRequest), "a response is a chat"
        return self._chat_parts(
            recalled.body, recalled.heading, record.request, ended, response=response
        )

    async def _answer(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        heading: Heading,
        request: GenerateRequest,
        entry: Entry,
        resumption: Resumption | None = None,
        response: ResponseAnswer | None = None,
        form: AnswerForm | None = None,
    ) -> AsyncGenerator[bytes, None]:
        with RequestWatch(
            request, entry.ticket, entry.key_use, self._stats, entry.arrival_s
        ) as watch:
            if isinstance(body, ChatCompletionRequest):
                parts = self._chat_parts(
                    body,
                    heading,
                    request,
                    resumption,
                    response=response,
                    form=form,
                    on_update=watch.take,
                )
            else:
                generation = self._generation(
                    body,
                    request,
                    watch.take,
                    resumption,
                    parts_of=of_prompt if body.max_tokens == 0 else whole,
                )
                prompts = [
                    choice.prompt_token_ids
                    for choice in request.choices
                    if choice.sample_index == 0
                ]
                echoes = await self.in_thread(
                    partial(make_echoes, body, prompts, self._text.tokenizer)
                )
                parts = answer_completion(body, generation, heading, self._text.tokenizer, echoes)
            async with aclosing(parts):
                async for part in parts:
                    yield part

    def _chat_parts(
        self,
        body: ChatCompletionRequest,
        heading: Heading,
        request: GenerateRequest,
        resumption: Resumption | None,
        *,
        response: ResponseAnswer | None,
        form: AnswerForm | None = None,
        on_update: Callable[[ChoiceUpdate], None] = lambda update: None,
    ) -> AsyncGenerator[bytes, None]:
        form = form or self._text.form(body, request.choices[0].prompt_token_ids)
        generation = self._generation(
            body,
            request,
            on_update,
            resumption,
            form.stop,
            token_by_token if response is not None and response.has_same_events else whole,
        )
        if response is not None:
            return response.parts(generation, heading, self._text.tokenizer, form)
        return answer_chat(body, generation, heading, self._text.tokenizer, form)

    async def shorten(self, call: ResponseCall) -> ChatCompletionRequest:
        """The chat of a response, without the first turns of one that is too long.

        Raises:
            RequestError, EngineNotReadyError: It cannot be a chat; no engine has said what it can.
        """
        info = await self._ready_info()
        room = info.context_length - (call.body.max_output_tokens or 1)

        def fits(chat: ChatCompletionRequest) -> bool:
            return len(self._text.encode_chat(chat).token_ids) <= room

        return await self.in_thread(partial(call.fitting_chat, fits))

    async def count_tokens(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(await self.in_thread(partial(self._text.tokenizer.encode, text)))

    async def inspect_text(
        self, work: Callable[[ModelText], _T], model: str | None, caller: Caller
    ) -> _T:
        """Do something with the model's text that asks no engine, as one request of a key.

        Raises:
            RequestError, EngineBusyError: There is no such model, or the key may not, or not yet.
        """
        if model is not None:
            self._check_model(model)
        with self.entrance.enter_briefly(caller):
            return await self.in_thread(partial(work, self._text))

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

    async def _ready_info(self) -> EngineInfo:
        info = await self.engine.engine_info()
        if info.is_ready:
            return info
        return await self.engine.wait_until_ready(self._config.hold_timeout_s)

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Do what takes milliseconds, in one of a few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _encode_prompts(
        self, given: Sequence[str | list[int]], info: EngineInfo, *, param: str
    ) -> list[list[int]]:
        return await self.in_thread(
            partial(
                encode_prompts,
                given,
                self._text.tokenizer,
                vocab_size=info.vocab_size,
                param=param,
            )
        )

    def _make_request(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        origin: Origin,
        prompts: list[list[int]],
        info: EngineInfo,
        entry: Entry,
        caller: Caller,
        grammar: Grammar | None,
    ) -> GenerateRequest:
        choices = self._text.make_choices(body, prompts, info)
        return self._request(body, origin, choices, entry, caller, grammar)

    def _request(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        origin: Origin,
        choices: tuple[ChoiceRequest, ...],
        entry: Entry,
        caller: Caller,
        grammar: Grammar | None,
    ) -> GenerateRequest:
        entry.ticket.add_tokens(sum(len(choice.prompt_token_ids) for choice in choices))
        firsts = (choice for choice in choices if choice.sample_index == 0)
        entry.key_use.take_tokens(sum(len(choice.prompt_token_ids) for choice in firsts))
        return GenerateRequest(
            request_id=origin.heading.id,
            choices=choices,
            cache_salt=caller.tenant + (body.cache_salt or "").encode(),
            session=caller.session,
            tenant=caller.tenant,
            origin=origin.encode(),
            weights=self._config.weights_name,
            grammar=grammar,
        )

    def _generation(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        request: GenerateRequest,
        on_update: Callable[[ChoiceUpdate], None],
        resumption: Resumption | None,
        stop: Sequence[str] = (),
        parts_of: PartsOf = whole,
    ) -> Generation:
        return Generation(
            self.engine,
            request,
            make_detokenizer=partial(self._text.detokenizer, body, stop),
            own_stop_token_ids=frozenset(body.stop_token_ids),
            on_update=on_update,
            resumption=resumption,
            parts_of=parts_of,
        )

    def describe_stream_failure(self, error: Exception) -> bytes:
        """The event that ends a stream whose status is long sent."""
        return encode_error_event(self.count_failure(error))

    def count_failure(self, error: Exception) -> ErrorReply:
        """What to tell of an error amid a stream; counts the request."""
        if isinstance(error, QwenOnRayError):
            reply = describe_error(error)
        else:
            logger.error("a stream failed", exc_info=error)
            reply = internal_error()
        self._stats.count_request(reply.status)
        return reply

    def count_request(self, status: int) -> None:
        """Count a request that was refused, or failed, with this HTTP status."""
        self._stats.count_request(status)

    def stats(self) -> RouterStats:
        """What this router has counted, and how it is."""
        self._stats.num_waiting = self.entrance.num_waiting
        return self._stats

    async def fleet(self) -> FleetState:
        """How each engine is, and what happened to them lately."""
        info, fleet = await self.engine.engine_info(), await self.engine.fleet()
        return describe_fleet(self._config.model_names[0], info, fleet, self.stats())

    async def exposition(self) -> bytes:
        """The engines' metrics and this router's in Prometheus' text format."""
        fleet, engines = await self.engine.engine_info(), await self.engine.engines()
        # Some milliseconds an engine, which streams should not stand still for.
        return await self.in_thread(partial(self._exposition.text, fleet, engines, self.stats()))
