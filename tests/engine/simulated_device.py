"""An executor whose device is a table of token ids: pages hold tokens in place of keys and values.

The next token is a hash of all tokens that the request's pages hold, so one wrong page, one stale
entry or one token written too early changes what is generated.
"""

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np

from engine.errors import EngineDiedError
from engine.step import EngineLimits, ProgressCallback, StepMasks, StepPlan, StepResult

VOCAB_SIZE = 50


def next_token(token_ids: Sequence[int], allowed: Sequence[int] = range(VOCAB_SIZE)) -> int:
    """The token that the simulated model generates after these, one of those that are allowed."""
    digest = hashlib.blake2b(np.array(token_ids, np.int32).tobytes(), digest_size=4).digest()
    return allowed[int.from_bytes(digest, "little") % len(allowed)]


def expected_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What a request must get, whatever else runs."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class SimulatedDevice:
    """Implements Executor; garbage fills every page before it is written."""

    def __init__(self, limits: EngineLimits, *, dies_at_step: int | None = None) -> None:
        self.limits = limits
        self.plans: list[StepPlan] = []
        self._dies_at_step = dies_at_step
        self._pages = np.full((limits.num_pages, limits.page_size), -7, np.int32)
        self._tables: dict[int, list[int]] = {}
        self._last_tokens: dict[int, int] = {}
        self._unsampled: tuple[asyncio.Future[StepResult], list[list[int]]] | None = None

    async def start(self, on_progress: ProgressCallback) -> EngineLimits:
        del on_progress
        return self.limits

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if self._dies_at_step is not None and plan.step >= self._dies_at_step:
            future.set_exception(EngineDiedError("the simulated host died"))
        else:
            self._run(plan, future)
        return future

    def mask(self, masks: StepMasks) -> None:
        if self._unsampled is None:
            assert self._dies_at_step is not None
            return
        future, contexts = self._unsampled
        plan = self.plans[-1]
        assert masks.step == plan.step
        allowed = {
            row: np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
            for row, words in zip(plan.masked_rows.tolist(), masks.words, strict=True)
            if len(words)
        }
        self._unsampled = None
        self._sample(plan, contexts, allowed, future)

    async def stop(self) -> None:
        pass

    def _run(self, plan: StepPlan, future: asyncio.Future[StepResult]) -> None:
        assert plan.step == len(self.plans), "steps must come in order"
        assert self._unsampled is None, "a step lacks its masks"
        self.plans.append(plan)
        for params in plan.admissions:
            self._tables[params.slot] = []
            self._last_tokens[params.slot] = -1
        for update in plan.page_updates:
            table = self._tables[update.slot]
            assert len(table) == update.first, "a page table has a hole"
            table.extend(update.pages.tolist())
        rows = [
            (slot, position, [self._last_tokens[slot]])
            for slot, position in zip(
                plan.decode_slots.tolist(), plan.decode_positions.tolist(), strict=True
            )
        ]
        rows += [(chunk.slot, chunk.start, chunk.token_ids.tolist()) for chunk in plan.chunks]
        assert len({slot for slot, _, _ in rows}) == len(rows), "a slot has two rows"
        # As on a device: all rows read their prefix pages before any row's writes are seen by
        # the others, so a plan that shares a page within the step is caught.
        prefixes = [self._read(slot, start) for slot, start, _ in rows]
        for slot, start, token_ids in rows:
            for position, token_id in enumerate(token_ids, start):
                page = self._tables[slot][position // self.limits.page_size]
                assert page != 0, "a real token was written to the padding page"
                self._pages[page, position % self.limits.page_size] = token_id
        contexts = [
            prefix + token_ids for prefix, (_, _, token_ids) in zip(prefixes, rows, strict=True)
        ]
        if len(plan.masked_rows):
            self._unsampled = future, contexts
        else:
            self._sample(plan, contexts, {}, future)

    def _sample(
        self,
        plan: StepPlan,
        contexts: list[list[int]],
        allowed: dict[int, list[int]],
        future: asyncio.Future[StepResult],
    ) -> None:
        sampled = [
            next_token(context, allowed.get(row, range(VOCAB_SIZE)))
            for row, context in enumerate(contexts)
        ]
        is_last = [True] * len(plan.decode_slots) + [chunk.is_last for chunk in plan.chunks]
        for row, (token_id, last) in enumerate(zip(sampled, is_last, strict=True)):
            if last:
                self._last_tokens[plan.slot_and_end(row)[0]] = token_id
        future.set_result(StepResult(step=plan.step, token_ids=np.array(sampled, np.int32)))

    def _read(self, slot: int, stop: int) -> list[int]:
        size = self.limits.page_size
        table = self._tables[slot]
        return [int(self._pages[table[i // size], i % size]) for i in range(stop)]
