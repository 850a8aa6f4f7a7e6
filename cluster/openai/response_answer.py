"""A response as it is generated: its events or the whole object, and how it ends.

The same from every router that goes on with it. Knows neither HTTP nor where responses are kept.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from cluster.openai.answer_form import AnswerForm
from cluster.openai.errors import ErrorReply
from cluster.openai.generation import Generation
from cluster.openai.heading import Heading
from cluster.openai.response_output import EventLog, ResponseOutput, TextTokens
from cluster.openai.responses import ResponseCall
from cluster.openai.responses_schema import (
    INCLUDE_LOGPROBS,
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseFailure,
    ResponseStatus,
    ResponseUsage,
    TextConfig,
    TextFormat,
)
from cluster.openai.schema import StopReason
from engine.errors import EngineNotReadyError
from engine.text.tokenizer import Tokenizer

Store = Callable[[Response], Awaitable[bool]]
"""Keeps a response, if it can, and says whether it did; never raises."""

Renew = Callable[[str], Awaitable[bool]]
"""Says that the response of this id is still under way; False if it should be stored again."""

CountTokens = Callable[[str], Awaitable[int]]

_PLAIN_TEXT = TextConfig(format=TextFormat(type="text"))


class ResponseAnswer:
    """Makes one response of a generation; used once.

    Attributes:
        call: What was asked.
        is_stream: Whether events are wanted, or the whole object.
        has_same_events: Whoever tells them: updates are to come token by token.

    Args:
        call: What was asked.
        is_stream: Whether events are wanted, or the whole object.
        store: Called with the response when it has ended, if the client wants it kept; with one in
            the background before, too, when it begins and when its status changes.
        renew: Called while it runs in the background and its status does not change.
        count_tokens: How many tokens a text has.
        last_number: Of the last event that the client has, where it has some. What runs in the
            background has the same events from whoever tells them, from the first on.
        is_cancelled: It was cut by its client.
    """

    def __init__(
        self,
        call: ResponseCall,
        *,
        is_stream: bool,
        store: Store,
        renew: Renew,
        count_tokens: CountTokens,
        last_number: int | None = None,
        is_cancelled: bool = False,
    ) -> None:
        self.call = call
        self.is_stream = is_stream
        self._store = store
        self._renew = renew
        self._count_tokens = count_tokens
        self._last_number = last_number
        self._is_cancelled = is_cancelled
        self.has_same_events = call.body.background and is_stream
        self._log = EventLog(
            is_kept=is_stream, last_number=last_number if self.has_same_events else None
        )
        self._begun: tuple[Generation, Response, ResponseOutput] | None = None
        self._status: ResponseStatus = "queued" if call.body.background else "in_progress"
        self._stored_status: ResponseStatus | None = None

    async def parts(
        self, generation: Generation, heading: Heading, tokenizer: Tokenizer, form: AnswerForm
    ) -> AsyncGenerator[bytes, None]:
        """Yield the stream's events, or the whole object; in the background, as it begins, first.

        Raises:
            RequestError, EngineError: As `Generation.updates`. If events were sent before, `fail`
                has the last ones.
        """
        output, response = self._begin(generation, heading, tokenizer, form)
        if self.call.body.background and not self._is_cancelled:
            if not await self.renew():
                raise EngineNotReadyError("No engine keeps responses now. Try again.")
            events = self._log.take(generation.event_id())
            yield events if self.is_stream else _json(response)
        finish_reason: StopReason | None = None
        was_sent = False
        async with aclosing(generation.updates()) as updates:
            async for update in updates:
                if self._status == "queued":
                    self._status = "in_progress"
                    begun = response.model_copy(update={"status": self._status})
                    self._log.add("response.in_progress", response=begun)
                finish_reason, was_sent = update.finish_reason, update.was_sent
                output.take(update.text, update.tokens, is_last=finish_reason is not None)
                if was_sent:
                    self._log.skip(self._last_number)
                # The end goes with the last item's, so that who has read either has read both.
                elif finish_reason is None and (events := self._log.take(generation.event_id())):
                    yield events
        if was_sent and self.is_stream:
            return
        status: ResponseStatus = "incomplete" if finish_reason == "length" else "completed"
        if self._is_cancelled:
            status = "cancelled"
        response = await self._ended(status)
        self._log.add(f"response.{status}", response=response)
        yield self._log.take(generation.event_id()) if self.is_stream else _json(response)

    async def renew(self) -> bool:
        """Have it kept that the response is under way; False if nobody keeps it."""
        assert self._begun is not None, "it was begun"
        _, response, _ = self._begun
        status = self._status
        # A word that comes late does not bring back what its client has had deleted.
        if status == self._stored_status and await self._renew(response.id):
            return True
        if not await self._store(response.model_copy(update={"status": status})):
            return False
        self._stored_status = status
        return True

    async def fail(self, reply: ErrorReply) -> bytes:
        """The events that end a stream after an error."""
        assert self._begun is not None, "events were sent"
        code = "server_error"
        if reply.status < 500:
            code = "rate_limit_exceeded" if reply.status == 429 else "invalid_prompt"
        failure = ResponseFailure(code=code, message=reply.error.message)
        generation, _, _ = self._begun
        response = await self._ended("failed", failure)
        self._log.add("response.failed", response=response)
        return self._log.take(generation.event_id())

    def give_up(self, reply: ErrorReply) -> bytes:
        """The event that ends a stream whose response goes on or has ended elsewhere."""
        assert self._begun is not None, "events were sent"
        error = reply.error
        self._log.add("error", code=error.code, message=error.message, param=error.param)
        return self._log.take(self._begun[0].event_id())

    def _begin(
        self, generation: Generation, heading: Heading, tokenizer: Tokenizer, form: AnswerForm
    ) -> tuple[ResponseOutput, Response]:
        body = self.call.body
        tokens = TextTokens(tokenizer) if INCLUDE_LOGPROBS in body.include else None
        output = ResponseOutput(heading.id, form.reader(), self._log, tokens)
        sampling = generation.request.choices[0].sampling
        response = Response(
            id=heading.id,
            created_at=heading.created,
            status=self._status,
            background=body.background,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            model=heading.model,
            output=[],
            parallel_tool_calls=body.parallel_tool_calls,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning,
            store=body.store,
            temperature=sampling.temperature,
            text=body.text if body.text.format is not None else _PLAIN_TEXT,
            tool_choice=body.tool_choice,
            tools=body.tools,
            top_logprobs=body.top_logprobs or 0,
            top_p=sampling.top_p,
            truncation=body.truncation,
            user=body.user,
        )
        self._log.add("response.created", response=response)
        if self._status == "queued":
            self._log.add("response.queued", response=response)
        else:
            self._log.add("response.in_progress", response=response)
        self._begun = generation, response, output
        return output, response

    async def _ended(
        self, status: ResponseStatus, failure: ResponseFailure | None = None
    ) -> Response:
        """The response at its end, kept if that was wanted and can be done."""
        assert self._begun is not None, "it was begun"
        generation, begun, output = self._begun
        is_complete = status == "completed"
        output.end("completed" if is_complete else "incomplete")
        is_cut = status == "incomplete"
        response = begun.model_copy(
            update={
                "status": status,
                "output": output.items,
                "completed_at": int(time.time()) if is_complete else None,
                "incomplete_details": (
                    IncompleteDetails(reason="max_output_tokens") if is_cut else None
                ),
                "error": failure,
                "usage": await self._usage(generation, output),
            }
        )
        if response.store and not await self._store(response):
            response.store = False
        return response

    async def _usage(self, generation: Generation, output: ResponseOutput) -> ResponseUsage:
        usage = generation.usage()
        thoughts = output.thoughts
        reasoning_tokens = await self._count_tokens(thoughts) if thoughts else 0
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.prompt_tokens_details.cached_tokens
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=min(reasoning_tokens, usage.completion_tokens)
            ),
            total_tokens=usage.total_tokens,
        )


def _json(response: Response) -> bytes:
    return response.model_dump_json(by_alias=True).encode()
