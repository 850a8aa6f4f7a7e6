"""What one request asked for and what came of it: token counts, and when tokens arrived.

Knows neither HTTP nor the engine: both fill in a `RequestResult`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request to send.

    Attributes:
        prompt: Text, or token ids.
        prompt_len: In tokens; None where there is no tokenizer to count a text with.
        output_len: Most tokens to generate; exactly as many where end tokens are ignored.
        history: Messages of the chat before this one.
        headers: Sent beside those that all requests have.
    """

    prompt: str | list[int]
    prompt_len: int | None
    output_len: int
    history: Sequence[Mapping[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that became visible together, `at_s` seconds after the request was sent."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """One request's figures.

    Attributes:
        start_s: When it was sent, by `time.perf_counter`.
        latency_s: From then to the end of the answer.
        prompt_len, output_len: As the server counted them.
        arrivals: In order of time; empty if the answer was not streamed.
        text, thoughts: What was generated, if it was to be kept.
        finish_reason: Why the server ended the answer.
        error: Why it failed, else None.
    """

    request: BenchRequest
    start_s: float
    latency_s: float
    prompt_len: int = 0
    output_len: int = 0
    num_cached_tokens: int = 0
    arrivals: tuple[Arrival, ...] = ()
    text: str = ""
    thoughts: str = ""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None if the answer was not streamed."""
        return self.arrivals[0].at_s if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None without a stream or a second token."""
        if not self.arrivals or self.output_len < 2:
            return None
        return (self.latency_s - self.arrivals[0].at_s) / (self.output_len - 1)

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies, one sample per token: k tokens after g seconds give k of g / k.

        So a server that sends tokens in bursts has the mean of one that sends them singly, and no
        fewer samples. What arrives first is TTFT's, however many tokens it holds.
        """
        samples = []
        previous_s = self.arrivals[0].at_s if self.arrivals else 0.0
        for arrival in self.arrivals[1:]:
            gap_s = arrival.at_s - previous_s
            samples += [gap_s / arrival.num_tokens] * arrival.num_tokens
            previous_s = arrival.at_s
        return samples


def deal_tokens(sizes: Sequence[int], num_tokens: int) -> list[int]:
    """Say how many of `num_tokens` each chunk of a text held, from the chunks' sizes.

    Every chunk gets one, and the rest go by size; so where there are as many tokens as chunks, the
    answer is exact. If there are fewer, chunks share them by size, and some get none.
    """
    sure = 1 if num_tokens >= len(sizes) else 0
    remaining = num_tokens - sure * len(sizes)
    total, passed, dealt, shares = sum(sizes), 0, 0, []
    for size in sizes:
        passed += size
        due = round(remaining * passed / total)
        shares.append(sure + due - dealt)
        dealt = due
    return shares
