"""A plan while it grows: requests in, columns out. Decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from engine.request import Request
from engine.scheduling.buckets import choose_bucket
from engine.step import NO_INTS, Bucket, Chunk, PageUpdate, SlotParams, StepPlan


class ScheduledRow(msgspec.Struct, frozen=True):
    """One row of a plan: which request, and what its result means.

    Attributes:
        end: Position after the row's last token: KV is written up to here.
        samples: Whether the row's sampled token is the request's next one.
    """

    request: Request
    end: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan and the requests behind its rows, in the order of the rows."""

    plan: StepPlan
    rows: list[ScheduledRow]


class StepBuilder:
    """Collects the rows of one plan.

    Attributes:
        keys_computed: Keys of the pages that this step fills.
    """

    def __init__(self) -> None:
        self.decode_rows: list[ScheduledRow] = []
        self.chunk_rows: list[ScheduledRow] = []
        self.admissions: list[SlotParams] = []
        self.page_updates: list[PageUpdate] = []
        self.decode_slots: list[int] = []
        self.decode_positions: list[int] = []
        self.chunks: list[Chunk] = []
        self.num_chunk_tokens = 0
        self.keys_computed: set[bytes] = set()
        self.has_logprobs = False
        self.has_prompt_logprobs = False
        self.masked_decodes: list[int] = []
        self.masked_chunks: list[int] = []
        self.embedded_chunks: list[int] = []

    @property
    def is_empty(self) -> bool:
        return not self.decode_rows and not self.chunk_rows

    def build(self, step: int, buckets: Sequence[Bucket]) -> ScheduledStep:
        """Close the plan; the builder is of no more use."""
        first_chunk = len(self.decode_rows)
        masked = [*self.masked_decodes, *(first_chunk + index for index in self.masked_chunks)]
        embedded = [first_chunk + index for index in self.embedded_chunks]
        plan = StepPlan(
            step=step,
            bucket=choose_bucket(
                buckets, len(self.decode_slots), self.num_chunk_tokens, len(self.chunks)
            ),
            admissions=tuple(self.admissions),
            page_updates=tuple(self.page_updates),
            decode_slots=np.array(self.decode_slots, np.int32),
            decode_positions=np.array(self.decode_positions, np.int32),
            chunks=tuple(self.chunks),
            has_logprobs=self.has_logprobs,
            has_prompt_logprobs=self.has_prompt_logprobs,
            masked_rows=np.array(masked, np.int32) if masked else NO_INTS,
            embedded_rows=np.array(embedded, np.int32) if embedded else NO_INTS,
        )
        return ScheduledStep(plan, self.decode_rows + self.chunk_rows)

    def admit(self, request: Request) -> None:
        self.admissions.append(_slot_params(request))
        if request.pages:
            self.add_pages(request, 0, request.pages)

    def add_pages(self, request: Request, first: int, pages: list[int]) -> None:
        self.page_updates.append(PageUpdate(request.slot, first, np.array(pages, np.int32)))

    def add_decode(self, request: Request, position: int) -> None:
        self.decode_slots.append(request.slot)
        self.decode_positions.append(position)
        if request.constraint is not None:
            self.masked_decodes.append(len(self.decode_rows))
        self.decode_rows.append(ScheduledRow(request, position + 1, True))
        self.has_logprobs |= request.sampling.logprobs is not None

    def add_chunk(
        self, request: Request, start: int, token_ids: list[int], end: int, is_last: bool
    ) -> None:
        next_token_id = -1
        if request.wants_prompt_logprobs:
            self.has_prompt_logprobs = True
            next_token_id = next(iter(request.token_ids_from(end, end + 1)), -1)
        self.chunks.append(
            Chunk(request.slot, start, np.array(token_ids, np.int32), is_last, next_token_id)
        )
        self.num_chunk_tokens += len(token_ids)
        if is_last:
            self.has_logprobs |= request.sampling.logprobs is not None
            if request.constraint is not None:
                self.masked_chunks.append(len(self.chunk_rows))
            if request.wants_embedding:
                self.embedded_chunks.append(len(self.chunk_rows))
        self.chunk_rows.append(ScheduledRow(request, end, is_last))


def _slot_params(request: Request) -> SlotParams:
    sampling = request.sampling
    ends = sampling.stop_token_ids + (() if sampling.ignore_eos else request.eos_token_ids)
    return SlotParams(
        slot=request.slot,
        output_start=len(request.prompt_token_ids) - request.num_prompt_output_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=(sampling.seed or 0) & (2**64 - 1),
        choice_index=request.choice_index,
        min_tokens=sampling.min_tokens,
        end_token_ids=np.array(sorted(set(ends)) if sampling.min_tokens else (), np.int32),
        logit_bias_ids=np.array(list(sampling.logit_bias), np.int32),
        logit_bias=tuple(sampling.logit_bias.values()),
        token_ids=np.array(request.token_ids_from(0, request.num_tokens), np.int32)
        if sampling.has_penalties
        else NO_INTS,
        rope_alpha=request.rope_alpha,
    )
