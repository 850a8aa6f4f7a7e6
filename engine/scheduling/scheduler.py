"""Queues → plans: which requests run in the next step, on which pages.

Every step, all running requests decode one token, and what is left of the token budget goes to
chunks of prompts. When pages run out, the request that came last gives its own back and is computed
anew later. Knows no arrays and no processes; runs the same whether its plans are executed or not.
"""

import time
from collections import deque

import msgspec
import numpy as np

from engine.errors import ContextLengthError
from engine.request import FinishReason, Request, RequestOutput, RequestState, TokenLogprobs
from engine.scheduling.page_pool import PagePool
from engine.scheduling.prefix_cache import PrefixCache, page_key, root_key
from engine.scheduling.step_builder import ScheduledStep, StepBuilder
from engine.step import MAX_TOP_LOGPROBS, NO_INTS, EngineLimits, StepLogprobs, StepMasks, StepResult


class Scheduler:
    """Owns every request from `add` until it is finished and no step computes it any longer.

    At most two steps may be scheduled and not applied: results of step N may come after step N+1
    was scheduled. What N+1 does with a request that turns out to have ended in N is dropped, and
    its pages are kept until N+1's result.

    Invariants:
        running is ordered by admission, and the first of it is never preempted: it always ends.
        A request holds a slot exactly while it is in running.
        KV of positions below num_computed_tokens is written, or will be before any later step.
    """

    def __init__(
        self,
        limits: EngineLimits,
        *,
        max_chunk_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.limits = limits
        self.page_size = limits.page_size
        self.pool = PagePool(limits.num_pages, PrefixCache())
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._enable_prefix_caching = enable_prefix_caching
        self._max_chunk_tokens = min(
            max_chunk_tokens, max(bucket.num_chunk_tokens for bucket in limits.buckets)
        )
        self._max_chunks = max(bucket.num_chunks for bucket in limits.buckets)
        self._free_slots = list(range(limits.max_running_requests - 1, -1, -1))
        self._next_step = 0
        # Ended requests whose pages a step under way still writes to.
        self._ending: dict[str, Request] = {}
        # Whether the step that is being planned has met a request without pages.
        self._is_short = False

    @property
    def max_len(self) -> int:
        """Longest prompt plus output: the context, or all of a small pool."""
        return min(self.limits.context_length, self.pool.num_usable * self.page_size)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextLengthError: The prompt leaves no room for a single token.
        """
        prompt_len = len(request.prompt_token_ids)
        if prompt_len >= self.max_len:
            raise ContextLengthError(
                f"The prompt has {prompt_len} tokens; the context has room for {self.max_len}, "
                "output included."
            )
        output_start = prompt_len - request.num_prompt_output_tokens
        max_tokens = request.sampling.max_tokens
        wanted = self.max_len if max_tokens is None else output_start + max_tokens
        request.max_len = min(self.max_len, wanted)
        # Computed with the prompt, they cost no step of their own; one token has to be sampled.
        self._skip_ahead(request, request.max_len - request.num_tokens - 1)
        request.queued_s = time.monotonic()
        self.waiting.append(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request at once; no step planned from here on computes it."""
        if request.state is not RequestState.FINISHED:
            self._finish(request, reason)

    def plan(self) -> ScheduledStep | None:
        """Schedule the next step, or return None if nothing can run before a result is applied."""
        builder = StepBuilder()
        self._is_short = False
        self._plan_running(builder)
        if not self._is_short:
            # Else whoever is admitted would take the very pages that others lack.
            self._plan_admissions(builder)
        if builder.is_empty:
            return None
        step = builder.build(self._next_step, self.limits.buckets)
        self._next_step += 1
        for row in step.rows:
            row.request.num_inflight_steps += 1
            row.request.num_inflight_tokens += row.samples
        return step

    def masks(self, step: ScheduledStep) -> StepMasks:
        """What the masked rows of a step may sample, once all steps before it are applied."""
        words = []
        for row in step.plan.masked_rows.tolist():
            request, end = step.rows[row].request, step.rows[row].end
            allowed = None
            is_open = request.state is not RequestState.FINISHED and end == request.num_tokens
            if request.constraint is not None and is_open:
                allowed = request.constraint.allowed_tokens()
            words.append(NO_INTS if allowed is None else allowed.view(np.int32))
        return StepMasks(step=step.plan.step, words=tuple(words))

    def apply(self, step: ScheduledStep, result: StepResult) -> list[RequestOutput]:
        """Take in a step's tokens: what each request got, and which have ended."""
        outputs = []
        token_ids = result.token_ids.tolist()
        embeddings = _embeddings(step, result)
        if result.prompt_logprobs is not None:
            self._take_prompt_logprobs(step, result.prompt_logprobs)
        for index, row in enumerate(step.rows):
            request = row.request
            request.num_inflight_steps -= 1
            request.num_inflight_tokens -= row.samples
            if request.state is RequestState.FINISHED:
                self._release_if_idle(request)
                continue
            # Else it was skipped ahead while this step was under way.
            is_next = row.samples and row.end == request.num_tokens
            if is_next:
                request.output_token_ids.append(token_ids[index])
            if request.state is RequestState.RUNNING:
                # Preempted and admitted anew meanwhile, it may hold less than this row wrote.
                self._publish(request, min(row.end, request.num_computed_tokens))
            if is_next:
                num_top = request.sampling.logprobs
                logprobs: tuple[TokenLogprobs, ...] = ()
                if result.logprobs is not None and num_top is not None:
                    logprobs = (_logprobs_at(result.logprobs, index, num_top),)
                output = self._take_token(request, token_ids[index], logprobs)
                if index in embeddings:
                    output = msgspec.structs.replace(output, embedding=embeddings[index])
                outputs.append(output)
        return outputs

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        holders = [*self.running, *self._ending.values()]
        self.pool.check_integrity(request.pages for request in holders)
        slots = [request.slot for request in self.running] + self._free_slots
        assert sorted(slots) == list(range(self.limits.max_running_requests)), "a slot leaked"
        for request in self.waiting:
            assert not request.pages, f"{request.request_id} waits with pages"

    # Planning ----------------------------------------------------------------------------------

    def _plan_running(self, builder: StepBuilder) -> None:
        # Oldest first, while pages are taken from the latest: no row that stands is ever undone.
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if not request.is_decoding:
                self._plan_chunk(request, builder)
            elif request.num_computed_tokens + 1 < request.max_len:
                # Else its last token is under way already.
                self._plan_decode(request, builder)
            # A request that was preempted itself has left its index to its successor.
            index += request.state is RequestState.RUNNING

    def _plan_admissions(self, builder: StepBuilder) -> None:
        while builder.num_chunk_tokens < self._max_chunk_tokens:
            if len(builder.chunks) == self._max_chunks:
                return
            request = self._admit(builder)
            if request is None:
                return
            self._plan_chunk(request, builder)

    def _plan_decode(self, request: Request, builder: StepBuilder) -> None:
        position = request.num_computed_tokens
        if self._grow(request, position + 1, builder):
            builder.add_decode(request, position)
            request.num_computed_tokens += 1

    def _plan_chunk(self, request: Request, builder: StepBuilder) -> None:
        budget = self._max_chunk_tokens - builder.num_chunk_tokens
        if budget == 0 or len(builder.chunks) == self._max_chunks:
            return
        start = request.num_computed_tokens
        end = min(request.num_tokens, start + budget)
        if not self._grow(request, end, builder):
            return
        is_last = end == request.num_tokens
        builder.add_chunk(request, start, request.token_ids_from(start, end), end, is_last)
        request.num_computed_tokens = end
        request.is_decoding = is_last
        # A later step runs after this one, so it may read these pages; this same step may not.
        first = request.num_published_pages
        self._publish(request, end)
        builder.keys_computed.update(request.page_keys[first : request.num_published_pages])

    def _admit(self, builder: StepBuilder) -> Request | None:
        if not self.waiting or not self._free_slots:
            return None
        request = self.waiting[0]
        if request.num_inflight_tokens:
            return None  # Preempted a moment ago: its last token is not known yet.
        pages = self._find_prefix(request)
        if builder.keys_computed.intersection(request.page_keys[: len(pages)]):
            return None  # Its prefix is computed in this very step: one step later it is a hit.
        for page in pages:
            self.pool.acquire(page)
        num_cached = len(pages) * self.page_size
        first_chunk = min(request.num_tokens - num_cached, self._max_chunk_tokens)
        if self._num_pages(num_cached + first_chunk) - len(pages) > self.pool.num_available:
            self.pool.release(pages)
            return None
        self.waiting.popleft()
        request.state = RequestState.RUNNING
        request.slot = self._free_slots.pop()
        request.pages, request.num_published_pages = pages, len(pages)
        request.num_computed_tokens = num_cached
        if not request.num_preemptions:
            request.admitted_s = time.monotonic()
            # What an earlier attempt generated is no part of the prompt that the client sent.
            output_start = len(request.prompt_token_ids) - request.num_prompt_output_tokens
            request.num_cached_tokens = min(num_cached, output_start)
        self.running.append(request)
        builder.admit(request)
        return request

    def _find_prefix(self, request: Request) -> list[int]:
        """Published pages of the request's tokens; at least one token is left to compute."""
        pages: list[int] = []
        if not self._enable_prefix_caching or request.wants_prompt_logprobs:
            return pages
        for index in range((request.num_tokens - 1) // self.page_size):
            page = self.pool.prefix_cache.find(self._page_key(request, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def _publish(self, request: Request, end: int) -> None:
        """Offer the pages that are full of known tokens below `end` to other requests."""
        if not self._enable_prefix_caching:
            return
        num_full = min(end, request.num_tokens) // self.page_size
        for index in range(request.num_published_pages, num_full):
            self.pool.prefix_cache.publish(self._page_key(request, index), request.pages[index])
            request.num_published_pages = index + 1

    def _page_key(self, request: Request, index: int) -> bytes:
        """The key of a full page of known tokens, each computed once in a request's life."""
        keys = request.page_keys
        size = self.page_size
        while len(keys) <= index:
            start = len(keys) * size
            previous = keys[-1] if keys else root_key(request.cache_salt, request.rope_alpha)
            keys.append(page_key(previous, request.token_ids_from(start, start + size)))
        return keys[index]

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _grow(self, request: Request, end: int, builder: StepBuilder) -> bool:
        """Give a request pages up to position `end`, taking them from later ones if need be.

        Returns:
            False if the request has no part in this step: it had to give its own pages back, or
            those of ended requests, which a step under way still writes to, will do.
        """
        missing = self._num_pages(end) - len(request.pages)
        if missing <= 0:
            return True
        while (pages := self.pool.allocate(missing)) is None:
            self._is_short = True
            num_ending = sum(len(ended.pages) for ended in self._ending.values())
            if self.pool.num_available + num_ending >= missing:
                return False
            latest = self.running[-1]
            self._preempt(latest)
            if latest is request:
                return False
        builder.add_pages(request, len(request.pages), pages)
        request.pages.extend(pages)
        return True

    def _preempt(self, request: Request) -> None:
        # Steps run in order, so the next step may already overwrite these pages: a step under way
        # has read them by then.
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self.pool.release(request.pages)
        request.state = RequestState.WAITING
        request.slot = -1
        request.pages, request.num_published_pages = [], 0
        request.num_computed_tokens = 0
        request.is_decoding = False
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    # Results -----------------------------------------------------------------------------------

    def _take_prompt_logprobs(self, step: ScheduledStep, logprobs: StepLogprobs) -> None:
        offset = 0
        num_decodes = len(step.plan.decode_slots)
        for row, chunk in zip(step.rows[num_decodes:], step.plan.chunks, strict=True):
            request = row.request
            count = request.sampling.prompt_logprobs
            for place in range(len(chunk.token_ids) if count is not None else 0):
                # Of the token behind this place; a preempted request computes some twice.
                is_next = chunk.start + place == len(request.prompt_logprobs)
                if is_next and request.wants_prompt_logprobs:
                    request.prompt_logprobs.append(
                        _logprobs_at(logprobs, offset + place, count or 0)
                    )
            offset += len(chunk.token_ids)

    def _take_token(
        self, request: Request, token_id: int, logprobs: tuple[TokenLogprobs, ...]
    ) -> RequestOutput:
        """See what a request's latest token makes of it, and what its owner is to be told."""
        index = request.num_prompt_output_tokens + len(request.output_token_ids) - 1
        constraint = request.constraint
        if constraint is not None:
            constraint.accept(token_id)
        if constraint is not None and constraint.error is not None:
            self._finish(request, "error")
        elif self._is_end(request, token_id) and index >= request.sampling.min_tokens:
            self._finish(request, "stop")
        elif request.state is RequestState.RUNNING:
            # Those that were preempted go on token by token: they are rare.
            self._skip_ahead(request, request.max_len - request.num_tokens)
        if request.finish_reason is None and request.num_tokens >= request.max_len:
            self._finish(request, "length")
        first = request.num_reported_tokens
        request.num_reported_tokens = len(request.output_token_ids)
        first_index = request.num_prompt_output_tokens + first
        return RequestOutput(
            request_id=request.request_id,
            first_index=first_index,
            token_ids=tuple(request.output_token_ids[first:]),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_token_id=token_id if request.finish_reason == "stop" else None,
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=tuple(request.prompt_logprobs) if first_index == 0 else (),
        )

    def _is_end(self, request: Request, token_id: int) -> bool:
        sampling = request.sampling
        is_own = token_id in request.eos_token_ids and not sampling.ignore_eos
        return is_own or token_id in sampling.stop_token_ids

    def _skip_ahead(self, request: Request, limit: int) -> None:
        """Append the tokens that must come next, so that one chunk computes them all.

        What the device counts and reports of tokens, it does of those that it sampled: with
        penalties or log probabilities they are sampled one by one.

        Args:
            limit: Tokens at most.
        """
        sampling = request.sampling
        if request.constraint is None or sampling.has_penalties or sampling.logprobs is not None:
            return
        forced = request.constraint.forced_tokens()[: max(0, limit)]
        ends = (index for index, each in enumerate(forced) if self._is_end(request, each))
        forced = forced[: next(ends, len(forced))]
        if request.is_decoding and len(forced) < self._min_forced:
            return
        for token_id in forced:
            request.constraint.accept(token_id)
        request.output_token_ids.extend(forced)
        # A step under way may sample the first of them again, which is dropped.
        request.is_decoding = request.is_decoding and not forced

    @property
    def _min_forced(self) -> int:
        """Forced tokens that are worth a chunk, with which a step takes longer for all who run."""
        return max(2, round(self.limits.chunk_cost * len(self.running)))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._free_slots.append(request.slot)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        self._ending[request.request_id] = request
        self._release_if_idle(request)

    def _release_if_idle(self, request: Request) -> None:
        if request.num_inflight_steps == 0 and self._ending.pop(request.request_id, None):
            self.pool.release(request.pages)
            request.pages = []


def _embeddings(step: ScheduledStep, result: StepResult) -> dict[int, bytes]:
    rows = step.plan.embedded_rows.tolist()
    if not rows:
        return {}
    values = result.embeddings.astype("<f4").reshape(len(rows), -1)
    return {row: of_row.tobytes() for row, of_row in zip(rows, values, strict=True)}


def _logprobs_at(logprobs: StepLogprobs, index: int, num_top: int) -> TokenLogprobs:
    top = slice(index * MAX_TOP_LOGPROBS, index * MAX_TOP_LOGPROBS + num_top)
    return TokenLogprobs(
        logprob=float(logprobs.logprobs[index]),
        rank=int(logprobs.ranks[index]),
        top_token_ids=tuple(logprobs.top_token_ids[top].tolist()),
        top_logprobs=tuple(logprobs.top_logprobs[top].tolist()),
    )
