"""Clients that ask in all the ways there are, and know each answer before they ask."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from tests.e2e.patient_client import PatientClient, asking

SHARE_THAT_LEAVES = 0.25
LONGEST_STAY_S = 1.5
# Rounding depends on which requests share a step.
LOGPROB_TOLERANCE = 1e-3
MAX_ERRORS = 50


@dataclass(slots=True)
class Choice:
    """One choice of an answer; tokens and their log probabilities if they were asked for."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def equals(self, other: "Choice") -> bool:
        return (
            (self.text, self.finish_reason, self.tokens)
            == (other.text, other.finish_reason, other.tokens)
        ) and self._is_close(other)

    def begins(self, other: "Choice") -> bool:
        """Whether the other goes on from here."""
        return (
            other.text.startswith(self.text)
            and other.tokens[: len(self.tokens)] == self.tokens
            and self._is_close(other)
        )

    def _is_close(self, other: "Choice") -> bool:
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return all(abs(one - two) < LOGPROB_TOLERANCE for one, two in pairs)


Answer = dict[int, Choice]


@dataclass(frozen=True, slots=True)
class Work:
    """A request: the fields of its body that differ from those of others."""

    name: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Tally:
    """What came of all requests.

    Attributes:
        whole: Answers that came to their end, by the work's name.
        left: Requests that their client left on purpose.
        breaks: How often a connection broke, and the client asked again.
        errors: Why requests were lost, the first ones.
    """

    whole: Counter[str] = field(default_factory=Counter)
    left: int = 0
    breaks: int = 0
    lost: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)

    def add_error(self, error: str) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)


def make_works(num_tokens: int, *, num_sentences: int) -> list[Work]:
    """Make requests of all kinds but those with stop strings, which need a known answer.

    Args:
        num_tokens: Of each answer.
        num_sentences: Of a long prompt.
    """

    def work(name: str, prompt: str, **fields: Any) -> Work:
        message = {"role": "user", "content": prompt}
        return Work(name, {"messages": [message], "max_tokens": num_tokens, **fields})

    greedy = {"temperature": 0.0}
    sky, ship = "Why is the sky blue?", "Tell me a story about a lighthouse."
    long = " ".join(f"{ship} Part {number}." for number in range(num_sentences))
    return [
        work("greedy", sky, **greedy),
        work("seeded", sky, seed=11),
        work("greedy", ship, **greedy),
        work("long prompt", long, **greedy),
        work("long prompt", long + sky, seed=5),
        work("short answer", ship, seed=3, max_tokens=2),
        work("three choices", sky, seed=7, n=3),
        work("logprobs", ship, logprobs=True, top_logprobs=3, **greedy),
        work("penalties", ship, seed=9, presence_penalty=0.5, frequency_penalty=0.25, top_p=0.9),
    ]


class MixedLoad:
    """Clients that ask for one answer after another, streamed or whole, and some of them leave."""

    def __init__(self, base_url: str, model: str, works: Sequence[Work]) -> None:
        self._client = PatientClient(base_url)
        self._model = model
        self._works = list(works)
        self._answers: list[Answer] = []
        self.tally = Tally()

    async def learn_answers(self) -> None:
        """Ask for each answer while nothing breaks, and add work with a stop string to each."""
        for work in self._works:
            answer: Answer = {}
            await self._ask(work, answer, is_stream=False)
            self._answers.append(answer)
        for work, answer in list(zip(self._works, self._answers, strict=True)):
            text = answer[0].text
            stop = text[len(text) // 2 :][:4]
            if len(answer) > 1 or answer[0].tokens or not stop:
                continue
            self._works.append(Work("stop string", {**work.body, "stop": [stop]}))
            stopped = replace(answer[0], text=text[: text.find(stop)], finish_reason="stop")
            self._answers.append({0: stopped})

    def asking(self, num_clients: int) -> AbstractAsyncContextManager[None]:
        """Keep so many requests under way; at the end all are brought to their ends."""
        return asking(num_clients, self._ask_at_random)

    async def close(self) -> None:
        await self._client.close()

    async def _ask_at_random(self, _: int) -> None:
        number = random.randrange(len(self._works))
        is_leaving = random.random() < SHARE_THAT_LEAVES
        stay_s = random.uniform(0, LONGEST_STAY_S) if is_leaving else None
        await self._ask_one(number, is_stream=random.random() < 0.7, stay_s=stay_s)

    async def _ask_one(self, number: int, *, is_stream: bool, stay_s: float | None) -> None:
        work, expected, tally = self._works[number], self._answers[number], self.tally
        answer: Answer = {}
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(stay_s):
                await self._ask(work, answer, is_stream=is_stream)
        except TimeoutError:
            if stay_s is None:
                tally.lost += 1
                tally.add_error(f"{work.name}: nothing after {time.monotonic() - started_s:.0f} s")
                return
            tally.left += 1
            is_right = all(choice.begins(expected[index]) for index, choice in answer.items())
        except (aiohttp.ClientError, ValueError) as error:
            tally.lost += 1
            tally.add_error(f"{work.name}: {error!r}")
            return
        else:
            tally.whole[work.name] += 1
            is_right = answer.keys() == expected.keys() and all(
                choice.equals(expected[index]) for index, choice in answer.items()
            )
        if not is_right:
            tally.wrong += 1
            tally.add_error(f"{work.name}: {answer} and not {expected}")

    async def _ask(self, work: Work, answer: Answer, *, is_stream: bool) -> None:
        """Ask, and put into `answer` what has come; ValueError if it is no whole answer."""
        body = {"model": self._model, "ignore_eos": True, **work.body}
        if is_stream:
            async with aclosing(self._client.events(body, self._count_break)) as events:
                async for event in events:
                    _take(answer, event, "delta")
        else:
            _take(answer, await self._client.whole(body, self._count_break), "message")
        if not answer or any(choice.finish_reason is None for choice in answer.values()):
            raise ValueError("the answer ended without a finish reason")

    def _count_break(self) -> None:
        self.tally.breaks += 1


def leftovers_of(fleet: dict[str, Any]) -> list[str]:
    """Figures of `GET /fleet` that are 0 where all is at rest."""
    router = fleet["router"]
    found = {"the router": {name: router[name] for name in ("num_running", "num_waiting")}}
    for engine in fleet["engines"]:
        names = ("num_running", "num_waiting", "num_pages_used", "compiles_total")
        found[f"engine {engine['id']}"] = {name: engine[name] for name in names}
    return [
        f"{who}: {name} {figure}"
        for who, figures in found.items()
        for name, figure in figures.items()
        if figure
    ]


def _take(answer: Answer, event: Mapping[str, Any], key: str) -> None:
    for part in event["choices"]:
        choice = answer.setdefault(part["index"], Choice())
        choice.text += part[key].get("content") or ""
        choice.finish_reason = part["finish_reason"] or choice.finish_reason
        for token in (part.get("logprobs") or {}).get("content") or ():
            choice.tokens.append(token["token"])
            choice.logprobs.append(token["logprob"])
