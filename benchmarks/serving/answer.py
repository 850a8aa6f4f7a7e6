"""One answer of an OpenAI server: its JSON, whole or as server-sent events, without pydantic."""

from typing import Any

import msgspec

from benchmarks.serving.results import Arrival, deal_tokens

MAX_ERROR_CHARS = 300


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None


class Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Message | None = None
    message: Message | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | str | None = None


decode_event = msgspec.json.Decoder(Event).decode


class Answer:
    """Takes in the bytes of one answer, as they come.

    Tokens are counted by the server's usage, never by counting events: an event may hold several
    tokens. Which event held how many is known where the server sends usage with each (vLLM and
    SGLang do for `"stream_options": {"continuous_usage_stats": true}`); elsewhere the tokens are
    dealt to the events by the length of their text, which is exact if each held one.
    """

    def __init__(self, *, keeps_text: bool = False) -> None:
        self.usage: Usage | None = None
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.is_done = False
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._keeps_text = keeps_text
        self._rest = b""
        self._chunks: list[tuple[float, int]] = []
        self._running_counts: list[int] = []

    def feed(self, part: bytes, at_s: float) -> None:
        """Take in what was read at once of server-sent events; its tokens arrived at `at_s`."""
        lines = (self._rest + part).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), at_s)

    def take_whole(self, body: bytes) -> None:
        """Take in an answer that was not streamed."""
        self._take_event(decode_event(body), at_s=None)

    @property
    def text(self) -> str:
        """What came without thoughts, if it is kept."""
        return "".join(self._texts)

    @property
    def thoughts(self) -> str:
        return "".join(self._thoughts)

    def arrivals(self) -> tuple[Arrival, ...]:
        """Say when how many tokens came, once the answer has ended."""
        num_tokens = (self.usage.completion_tokens or 0) if self.usage else 0
        if not num_tokens or not self._chunks:
            return ()
        running = self._running_counts
        if len(running) == len(self._chunks) and running[-1] == num_tokens:
            shares = [after - before for before, after in zip([0, *running], running, strict=False)]
        else:
            shares = deal_tokens([size for _, size in self._chunks], num_tokens)
        counts: dict[float, int] = {}
        for (at_s, _), share in zip(self._chunks, shares, strict=True):
            counts[at_s] = counts.get(at_s, 0) + share
        return tuple(Arrival(at_s, count) for at_s, count in counts.items() if count)

    def _take(self, data: bytes, at_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        self._take_event(decode_event(data), at_s)

    def _take_event(self, event: Event, at_s: float | None) -> None:
        if event.error is not None:
            self.error = error_message(event.error)
            return
        usage = event.usage
        if usage is not None:
            self.usage = usage
        size = 0
        for choice in event.choices:
            thoughts, text = choice_texts(choice)
            size += len(thoughts.encode()) + len(text.encode())
            if self._keeps_text:
                self._thoughts.append(thoughts)
                self._texts.append(text)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if size and at_s is not None:
            self._chunks.append((at_s, size))
            if usage is not None and usage.completion_tokens is not None:
                self._running_counts.append(usage.completion_tokens)


def choice_texts(choice: Choice) -> tuple[str, str]:
    """Thoughts, and what is not thoughts."""
    message = choice.delta or choice.message
    if choice.text is not None or message is None:
        return "", choice.text or ""
    return message.reasoning_content or message.reasoning or "", message.content or ""


def explain(body: bytes) -> str:
    """The message in an error's JSON, else the beginning of what was sent."""
    try:
        error = decode_event(body).error
    except msgspec.DecodeError:
        error = None
    text = error_message(error) if error else body.decode(errors="replace").strip()
    return text[:MAX_ERROR_CHARS] or "no explanation"


def error_message(error: dict[str, Any] | str) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
