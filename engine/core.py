"""The engine's heart: plan a step, have it run, take its tokens in, for ever.

Read this file first. It holds no arrays, no text and no sockets: an `Executor` runs the plans,
the owner's callback gets the tokens.

    add ─► waiting ─► plan ─► Executor ─► apply ─► on_outputs
              ▲         │                   │
              └─preempt─┘◄──── running ◄────┘
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.accounting import Accounting
from engine.config import EngineConfig
from engine.errors import EngineBusyError, RequestError
from engine.request import FinishReason, Request, RequestOutput
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_builder import ScheduledStep
from engine.stats import EngineStats
from engine.step import EngineLimits, Executor, StepResult

OutputCallback = Callable[[list[RequestOutput]], None]


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    step: ScheduledStep
    result: asyncio.Future[StepResult]


class EngineCore:
    """Runs requests through an executor, all in one event loop.

    One instance lives as long as its executor: when a host dies, `run` raises, and the owner makes
    a new core for the new gang.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: EngineLimits,
        executor: Executor,
        on_outputs: OutputCallback,
    ) -> None:
        """Make an idle engine; `run` makes it serve.

        Args:
            config: The resolved configuration.
            limits: What `executor.start` returned.
            executor: Started.
            on_outputs: Called in the event loop, once per step, with what each request got.
        """
        self._accounting = Accounting(num_pages=limits.num_pages - 1)
        self._limits = limits
        self._executor = executor
        self._on_outputs = on_outputs
        self._overlaps = not config.disable_overlap_schedule
        self._max_queued = config.max_queued_requests
        self._seeds = random.Random(config.random_seed)
        self._requests: dict[str, Request] = {}
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._scheduler = Scheduler(
            limits,
            max_chunk_tokens=config.prefill_chunk_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        )

    @property
    def stats(self) -> EngineStats:
        """Counters since start, and the state after the last step."""
        return self._accounting.stats

    @property
    def num_requests(self) -> int:
        """Requests that are neither finished nor aborted."""
        return len(self._requests)

    @property
    def running_request_ids(self) -> frozenset[str]:
        """Requests that have a slot: those that a step under way may compute."""
        return frozenset(request.request_id for request in self._scheduler.running)

    @property
    def max_len(self) -> int:
        """Longest prompt plus output that this engine can hold."""
        return self._scheduler.max_len

    def queue_delay_s(self) -> float:
        """Seconds that the first request in the queue has waited for its first slot."""
        queued = (each.queued_s for each in self._scheduler.waiting if not each.num_preemptions)
        since_s = next(queued, None)
        return 0.0 if since_s is None else time.monotonic() - since_s

    def draw_seed(self) -> int:
        """A seed for a request that brought none; the same sequence for the same random_seed."""
        return self._seeds.getrandbits(63)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: It can never run here (too long, token ids out of range, id in use).
            EngineBusyError: Too many are waiting.
        """
        if request.request_id in self._requests:
            raise RequestError(f"the request id {request.request_id} is in use")
        self._check_token_ids(request)
        if len(self._scheduler.waiting) >= self._max_queued:
            raise EngineBusyError(
                f"{len(self._scheduler.waiting)} requests wait already, as many as "
                f"--max-queued-requests={self._max_queued} allows. Try again later."
            )
        self._scheduler.add(request)
        self._requests[request.request_id] = request
        self._accounting.arrived(request)
        self._has_work.set()
        self._is_idle.clear()

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request and free its pages; one that has ended already is left alone."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._scheduler.abort(request, reason)
            self._accounting.aborted(request, reason)
            self._note_if_idle()

    async def wait_until_idle(self) -> None:
        """Wait until every request has finished or was aborted; the caller bounds the wait."""
        await self._is_idle.wait()

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            EngineDiedError: A host died; what was running is lost, and so is this core.
        """
        if self._overlaps:
            await self._run_overlapped()
        else:
            await self._run_serially()

    async def _run_serially(self) -> None:
        while True:
            step = self._plan()
            if step is None:
                await self._wait_for_work()
                continue
            result = self._executor.execute(step.plan)
            self._mask(step)
            self._deliver(step, await result)

    async def _run_overlapped(self) -> None:
        under_way: _StepUnderWay | None = None
        while True:
            if under_way is not None:
                # The tokens before it are known by now, and the device has begun with the rest.
                self._mask(under_way.step)
            step = self._plan()
            if step is None and under_way is None:
                await self._wait_for_work()
                continue
            following = _StepUnderWay(step, self._executor.execute(step.plan)) if step else None
            if under_way is not None:
                # The device computes `following` while the host takes in the tokens before it.
                started_s = time.perf_counter()
                try:
                    result = await under_way.result
                except BaseException:
                    if following is not None:
                        following.result.add_done_callback(_discard)
                    raise
                self.stats.wait_ms_total += (time.perf_counter() - started_s) * 1e3
                self._deliver(under_way.step, result)
            under_way = following

    def check_integrity(self) -> None:
        """Raise AssertionError where pages or slots have leaked; for tests and debugging."""
        self._scheduler.check_integrity()

    async def _wait_for_work(self) -> None:
        # Cancelled with `run`: without requests there is nothing that could time out.
        if not self._scheduler.has_work:
            self._has_work.clear()
            await self._has_work.wait()
        else:
            await asyncio.sleep(0)

    def _plan(self) -> ScheduledStep | None:
        started_s = time.perf_counter()
        step = self._scheduler.plan()
        self._accounting.planned(step, self._scheduler)
        self.stats.host_ms_total += (time.perf_counter() - started_s) * 1e3
        return step

    def _mask(self, step: ScheduledStep) -> None:
        if len(step.plan.masked_rows):
            started_s = time.perf_counter()
            self._executor.mask(self._scheduler.masks(step))
            self.stats.host_ms_total += (time.perf_counter() - started_s) * 1e3

    def _deliver(self, step: ScheduledStep, result: StepResult) -> None:
        started_s = time.perf_counter()
        outputs = self._scheduler.apply(step, result)
        self._accounting.delivered(result, outputs, self._requests)
        for output in outputs:
            if output.finish_reason is not None:
                del self._requests[output.request_id]
        if outputs:
            self._on_outputs(outputs)
        self._note_if_idle()
        self.stats.host_ms_total += (time.perf_counter() - started_s) * 1e3

    def _note_if_idle(self) -> None:
        if not self._requests:
            self._is_idle.set()

    def _check_token_ids(self, request: Request) -> None:
        vocab_size = self._limits.vocab_size
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty; it must hold at least one token")
        wrong = [i for i in request.prompt_token_ids if not 0 <= i < vocab_size]
        wrong += [i for i in request.sampling.logit_bias if i >= vocab_size]
        if wrong:
            raise RequestError(
                f"token id {wrong[0]} is not in the vocabulary, which ends at {vocab_size - 1}"
            )


def _discard(result: "asyncio.Future[StepResult]") -> None:
    # Else asyncio reports an error that the step before has reported already.
    if not result.cancelled():
        result.exception()
