"""Parts of an answer to the items of a response, and to the events that tell of them.

One after the other: an item is done before the next one begins, so that a stream's items are those
of the whole object. Knows no requests and no ends; see `response_answer.py`.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import BaseModel

from cluster.openai.chat import token_logprob
from cluster.openai.event_id import with_number
from cluster.openai.generation import ShownToken
from cluster.openai.response_items import (
    ItemStatus,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    TextLogprob,
)
from cluster.openai.tools import call_id
from engine.text.answer_parts import AnswerReader, CallArguments, CallStart, Content, Reasoning
from engine.text.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class EventLog:
    """Events that are to be sent, numbered from 0 in the order in which they come.

    Args:
        is_kept: False where nobody reads events: then none are made.
        last_number: Their reader has all up to the one of this number, which are not sent.
    """

    def __init__(self, *, is_kept: bool, last_number: int | None = None) -> None:
        self._is_kept = is_kept
        self._last_number = -1 if last_number is None else last_number
        self._events: list[bytes] = []
        self._next_number = 0

    def add(self, kind: str, **fields: Any) -> None:
        """Add an event."""
        if not self._is_kept:
            return
        number = self._next_number
        self._next_number += 1
        if number <= self._last_number:
            return
        for name, value in fields.items():
            if isinstance(value, BaseModel):
                fields[name] = msgspec.Raw(value.model_dump_json(by_alias=True).encode())
        event = _encode({"type": kind, "sequence_number": number, **fields})
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + event + b"\n\n")

    def skip(self, last_number: int | None) -> None:
        """Forget the events so far: their reader has them, up to the one of that number."""
        self._events.clear()
        if last_number is not None:
            self._next_number = last_number + 1

    def take(self, event_id: str) -> bytes:
        """Encode the events that were not taken yet; nothing if there are none.

        Args:
            event_id: How far a client is that has read all of them; only the last one has it.
        """
        if not self._events:
            return b""
        *before, last = self._events
        self._events = []
        own_id = with_number(event_id, self._next_number - 1)
        return b"".join((*before, b"id: " + own_id.encode() + b"\n", last))


class TextTokens:
    """Finds the tokens that a piece of an answer was made of.

    Tokens come beside the text, before it or after: what may be a mark is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[ShownToken] = []

    def push(self, tokens: Sequence[ShownToken]) -> None:
        """Take tokens in, in their order."""
        self._pending += tokens

    def take(self, text: str) -> list[TextLogprob] | None:
        """Give the tokens of the next piece, and forget those before; None if it is not there."""
        spelled = [self._tokenizer.token_bytes(token.token_id) for token in self._pending]
        piece = text.encode()
        start = b"".join(spelled).find(piece)
        if start < 0:
            return None
        taken, rest, place = [], [], 0
        for token, token_bytes in zip(self._pending, spelled, strict=True):
            if place >= start + len(piece):
                rest.append(token)
            elif place + len(token_bytes) > start:
                taken.append(token)
            place += len(token_bytes)
        self._pending = rest
        return self._describe(taken)

    def take_all(self) -> list[TextLogprob]:
        """Give all tokens that are there."""
        taken, self._pending = self._pending, []
        return self._describe(taken)

    def _describe(self, tokens: Sequence[ShownToken]) -> list[TextLogprob]:
        described = (token_logprob(token, self._tokenizer) for token in tokens)
        return [TextLogprob.model_validate(each.model_dump()) for each in described]


class _OpenItem:
    """An item of which more may come: what it was begun as, and what came since."""

    def __init__(self, item: OutputItem) -> None:
        self.begun = item
        self.texts: list[str] = []
        self.logprobs: list[TextLogprob] = []

    def closed(self, status: ItemStatus) -> OutputItem:
        """The item with all that came."""
        text = "".join(self.texts)
        item = self.begun
        if isinstance(item, OutputFunctionCall):
            return item.model_copy(update={"status": status, "arguments": text})
        if isinstance(item, OutputReasoning):
            content = [ReasoningText(text=text)]
        else:
            content = [OutputText(text=text, logprobs=self.logprobs)]
        return item.model_copy(update={"status": status, "content": content})


class ResponseOutput:
    """The items of one response as they come.

    Args:
        response_id: Ids of items are made of it, the same by every router.
        reader: Of the answer; used by nobody else.
        log: Where events go.
        tokens: Where log probabilities are wanted.

    Attributes:
        items: Those that are done.
    """

    def __init__(
        self, response_id: str, reader: AnswerReader, log: EventLog, tokens: TextTokens | None
    ) -> None:
        self.items: list[OutputItem] = []
        self._response_id = response_id
        self._reader = reader
        self._log = log
        self._tokens = tokens
        self._open: _OpenItem | None = None

    def take(self, text: str, tokens: Sequence[ShownToken], *, is_last: bool) -> None:
        """Take more of the answer's text, and the tokens that came out with it."""
        if self._tokens is not None:
            self._tokens.push(tokens)
        parts = self._reader.push(text) if text else []
        if is_last:
            parts = [*parts, *self._reader.finish()]
        for part in parts:
            if isinstance(part, Content):
                self._take_text(part.text)
            elif isinstance(part, Reasoning):
                self._take_thoughts(part.text)
            elif isinstance(part, CallStart):
                self._begin_call(part)
            else:
                self._take_arguments(part)

    def end(self, status: ItemStatus) -> None:
        """No more comes. A complete answer of which nothing came is a message without text."""
        if status == "completed" and self._open is None and not self.items:
            self._begin_message()
        self._close(status)

    @property
    def thoughts(self) -> str:
        """All text of the thoughts that are done."""
        return "".join(
            part.text
            for item in self.items
            if isinstance(item, OutputReasoning)
            for part in item.content
        )

    def _take_text(self, text: str) -> None:
        is_begun = self._open is not None and isinstance(self._open.begun, OutputMessage)
        item = self._open if self._open is not None and is_begun else self._begin_message()
        item.texts.append(text)
        logprobs: list[TextLogprob] = []
        if self._tokens is not None:
            found = self._tokens.take(text)
            # Bytes that are no text have become other ones.
            logprobs = self._tokens.take_all() if found is None else found
            item.logprobs += logprobs
        self._log.add(
            "response.output_text.delta",
            **self._place(item, has_content=True),
            delta=text,
            logprobs=[each.model_dump() for each in logprobs],
        )

    def _take_thoughts(self, text: str) -> None:
        item = self._open
        if item is None or not isinstance(item.begun, OutputReasoning):
            item = self._begin(OutputReasoning(id=self._id("rs"), status="in_progress", content=[]))
            place = self._place(item, has_content=True)
            self._log.add("response.content_part.added", **place, part=ReasoningText(text=""))
        item.texts.append(text)
        self._pass_over(text)
        place = self._place(item, has_content=True)
        self._log.add("response.reasoning_text.delta", **place, delta=text)

    def _begin_message(self) -> _OpenItem:
        item = self._begin(OutputMessage(id=self._id("msg"), status="in_progress", content=[]))
        place = self._place(item, has_content=True)
        self._log.add("response.content_part.added", **place, part=OutputText(text=""))
        return item

    def _begin_call(self, start: CallStart) -> None:
        self._begin(
            OutputFunctionCall(
                id=self._id("fc"),
                status="in_progress",
                call_id=call_id(self._response_id, 0, start.index),
                name=start.name,
                arguments="",
            )
        )

    def _take_arguments(self, arguments: CallArguments) -> None:
        item = self._open
        assert item is not None, "arguments follow their call's start"
        item.texts.append(arguments.text)
        self._pass_over(arguments.text)
        place = self._place(item)
        self._log.add("response.function_call_arguments.delta", **place, delta=arguments.text)

    def _begin(self, begun: OutputItem) -> _OpenItem:
        self._close("completed")
        self._open = _OpenItem(begun)
        index = len(self.items)
        self._log.add("response.output_item.added", output_index=index, item=begun)
        return self._open

    def _close(self, status: ItemStatus) -> None:
        if self._open is None:
            return
        item = self._open.closed(status)
        place = self._place(self._open, has_content=not isinstance(item, OutputFunctionCall))
        if isinstance(item, OutputFunctionCall):
            self._log.add(
                "response.function_call_arguments.done",
                **place,
                name=item.name,
                arguments=item.arguments,
            )
        elif isinstance(item, OutputReasoning):
            [part] = item.content
            self._log.add("response.reasoning_text.done", **place, text=part.text)
            self._log.add("response.content_part.done", **place, part=part)
        else:
            [part] = item.content
            logprobs = [each.model_dump() for each in part.logprobs]
            self._log.add("response.output_text.done", **place, text=part.text, logprobs=logprobs)
            self._log.add("response.content_part.done", **place, part=part)
        index = len(self.items)
        self._log.add("response.output_item.done", output_index=index, item=item)
        self.items.append(item)
        self._open = None

    def _pass_over(self, text: str) -> None:
        if self._tokens is not None:
            self._tokens.take(text)

    def _place(self, item: _OpenItem, *, has_content: bool = False) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": item.begun.id, "output_index": len(self.items)}
        return {**place, "content_index": 0} if has_content else place

    def _id(self, kind: str) -> str:
        # The item that is open is about to be done.
        index = len(self.items) + (self._open is not None)
        return item_id(kind, self._response_id, index)


def item_id(kind: str, response_id: str, index: int | str) -> str:
    """The id of an item: the same from every router that goes on with the answer."""
    digest = hashlib.sha256(f"{response_id}/{index}".encode()).hexdigest()
    return f"{kind}_{digest[:32]}"
