"""What an engine's steps and requests come to: the counting of its core, and nothing else.

Runs once per step, and looks at each new token once: what costs more is kept to a request's first
token and to its end. Knows neither where the figures are shown nor who asked.
"""

import time

import msgspec

from engine.request import FinishReason, Request, RequestOutput, RequestTiming
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_builder import ScheduledStep
from engine.stats import EngineStats, count
from engine.step import StepResult


class Accounting:
    """Keeps an engine's `stats`. Belongs to its event loop."""

    def __init__(self, *, num_pages: int) -> None:
        self.stats = EngineStats(num_pages=num_pages)

    def arrived(self, request: Request) -> None:
        """A request was queued."""
        stats = self.stats
        stats.requests_total += 1
        if not request.num_prompt_output_tokens:
            # Another engine has counted the prompt of a request that it left to this one.
            stats.prompt_tokens_total += len(request.prompt_token_ids)
            stats.prompt_len.observe(len(request.prompt_token_ids))

    def planned(self, step: ScheduledStep | None, scheduler: Scheduler) -> None:
        """A turn's plan was made, or there was nothing to plan."""
        stats = self.stats
        if step is not None:
            bucket = step.plan.bucket
            num_tokens = len(step.plan.decode_slots) + sum(
                len(chunk.token_ids) for chunk in step.plan.chunks
            )
            stats.steps_total += 1
            stats.scheduled_tokens_total += num_tokens
            stats.padding_tokens_total += bucket.num_seqs + bucket.num_chunk_tokens - num_tokens
            stats.step_tokens.observe(num_tokens)
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.num_pages_used = scheduler.pool.num_used
        stats.preemptions_total = scheduler.num_preemptions

    def delivered(
        self, result: StepResult, outputs: list[RequestOutput], requests: dict[str, Request]
    ) -> None:
        """A step's tokens were taken in; first and last outputs get their `timing`.

        Args:
            requests: By id; those that have ended in this step are among them.
        """
        stats = self.stats
        stats.device_ms_total += result.device_ms
        stats.compiles_total = result.num_compiles
        stats.generated_tokens_total += sum(len(output.token_ids) for output in outputs)
        now_s = time.monotonic()
        # Most requests had their last token in the step before, and so the same time between.
        before_s, num_alike = 0.0, 0
        for index, output in enumerate(outputs):
            request = requests[output.request_id]
            is_first = not request.last_token_s
            if is_first:
                self._began(request, output, now_s)
            elif request.last_token_s == before_s:
                num_alike += 1
            else:
                if num_alike:
                    stats.inter_token_latency_s.observe(now_s - before_s, num_alike)
                before_s, num_alike = request.last_token_s, 1
            request.last_token_s = now_s
            if output.finish_reason is not None:
                self._ended(request, output.finish_reason)
            if is_first or output.finish_reason is not None:
                outputs[index] = msgspec.structs.replace(output, timing=_timing(request))
        if num_alike:
            stats.inter_token_latency_s.observe(now_s - before_s, num_alike)

    def aborted(self, request: Request, reason: FinishReason) -> None:
        """A request was ended before its last token."""
        self._ended(request, reason)

    def _began(self, request: Request, output: RequestOutput, now_s: float) -> None:
        stats = self.stats
        request.first_token_s = now_s
        stats.queue_time_s.observe(request.admitted_s - request.queued_s)
        stats.prefill_time_s.observe(now_s - request.admitted_s)
        if output.first_index == 0:
            stats.cached_tokens_total += output.num_cached_tokens
            stats.time_to_first_token_s.observe(now_s - request.queued_s)

    def _ended(self, request: Request, reason: FinishReason) -> None:
        stats = self.stats
        count(stats.finished_total, reason)
        if request.admitted_s:
            stats.served_total += 1
            stats.service_s_total += time.monotonic() - request.admitted_s
        if reason == "abort" or not request.last_token_s:
            return  # Its latency would say how patient its client was.
        num_tokens = len(request.output_token_ids)
        decode_s = request.last_token_s - request.first_token_s
        stats.decode_time_s.observe(decode_s)
        stats.latency_s.observe(request.last_token_s - request.queued_s)
        stats.output_len.observe(num_tokens)
        if num_tokens > 1:
            stats.time_per_output_token_s.observe(decode_s / (num_tokens - 1))


def _timing(request: Request) -> RequestTiming:
    return RequestTiming(
        queue_s=request.admitted_s - request.queued_s,
        prefill_s=request.first_token_s - request.admitted_s,
        decode_s=request.last_token_s - request.first_token_s,
        num_preemptions=request.num_preemptions,
    )
