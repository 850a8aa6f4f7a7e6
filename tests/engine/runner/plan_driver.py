"""Makes step plans by hand: slots, pages and chunks for a few sequences, without a scheduler."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.request import SamplingParams
from engine.runner.model_runner import ModelRunner, PendingStep
from engine.scheduling.buckets import choose_bucket
from engine.step import (
    Chunk,
    EngineLimits,
    PageUpdate,
    SlotParams,
    StepMasks,
    StepPlan,
    StepResult,
)

GREEDY = SamplingParams(temperature=0)


@dataclass
class Sequence:
    """One sequence in a slot. `tokens` holds what results have told so far."""

    slot: int
    tokens: list[int]
    prompt_len: int
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    is_decoding: bool = False
    results: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


def start_runner(**config: Any) -> tuple[ModelRunner, EngineLimits]:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "page_size": 4,
        "max_running_requests": 4,
        "chunked_prefill_size": 32,
        "mem_fraction_static": 0.5,
        "context_length": 128,
    }
    runner = ModelRunner(EngineConfig(**(defaults | config)))
    return runner, runner.start(lambda progress: None)


class PlanDriver:
    """Drives a started runner. Pages are handed out in a shuffled order and never come back."""

    def __init__(self, runner: ModelRunner, limits: EngineLimits, seed: int = 0) -> None:
        self._runner = runner
        self._limits = limits
        self._free_pages = (
            1 + np.random.default_rng(seed).permutation(limits.num_pages - 1)
        ).tolist()
        self._admissions: list[SlotParams] = []
        self._next_step = 0

    def admit(
        self,
        slot: int,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        *,
        num_output_tokens: int = 0,
        end_token_ids: tuple[int, ...] = (),
        rope_alpha: float = 1.0,
    ) -> Sequence:
        """Let a sequence into a slot with the next step; the last tokens may be earlier output."""
        self._admissions.append(
            SlotParams(
                slot=slot,
                output_start=len(prompt) - num_output_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
                seed=sampling.seed or 0,
                choice_index=0,
                min_tokens=sampling.min_tokens,
                end_token_ids=np.array(end_token_ids, np.int32),
                logit_bias_ids=np.array(list(sampling.logit_bias), np.int32),
                logit_bias=tuple(sampling.logit_bias.values()),
                token_ids=np.array(prompt if sampling.has_penalties else [], np.int32),
                rope_alpha=rope_alpha,
            )
        )
        return Sequence(slot=slot, tokens=list(prompt), prompt_len=len(prompt) - num_output_tokens)

    def dispatch(
        self,
        decodes: list[Sequence],
        chunks: list[tuple[Sequence, int]] = [],  # noqa: B006
        has_logprobs: bool = False,
        masks: dict[int, np.ndarray] | None = None,
    ) -> PendingStep:
        """Plan one step and start it; `masks` is what some rows may sample."""
        updates = []
        decode_positions = []
        for sequence in decodes:
            decode_positions.append(sequence.num_computed)
            updates += self._extend(sequence, 1)
        made = []
        for sequence, length in chunks:
            start = sequence.num_computed
            updates += self._extend(sequence, length)
            sequence.is_decoding = sequence.num_computed == len(sequence.tokens)
            token_ids = np.array(sequence.tokens[start : start + length], np.int32)
            made.append(Chunk(sequence.slot, start, token_ids, sequence.is_decoding))
        plan = StepPlan(
            step=self._next_step,
            bucket=choose_bucket(
                self._limits.buckets, len(decodes), sum(n for _, n in chunks), len(chunks)
            ),
            admissions=tuple(self._admissions),
            page_updates=tuple(updates),
            decode_slots=np.array([sequence.slot for sequence in decodes], np.int32),
            decode_positions=np.array(decode_positions, np.int32),
            chunks=tuple(made),
            has_logprobs=has_logprobs,
            masked_rows=np.array(sorted(masks or {}), np.int32),
        )
        self._admissions = []
        self._next_step += 1
        pending = self._runner.dispatch(plan)
        if masks:
            words = tuple(masks[row] for row in sorted(masks))
            self._runner.sample_masked(StepMasks(step=plan.step, words=words))
        return pending

    def step(
        self,
        decodes: list[Sequence],
        chunks: list[tuple[Sequence, int]] = [],  # noqa: B006
        has_logprobs: bool = False,
        masks: dict[int, np.ndarray] | None = None,
    ) -> StepResult:
        """Plan one step, run it to its end and append its tokens to their sequences."""
        result = self.dispatch(decodes, chunks, has_logprobs, masks).wait()
        rows = decodes + [sequence for sequence, _ in chunks]
        assert len(result.token_ids) == len(rows)
        for row, sequence in enumerate(rows):
            if sequence.is_decoding:
                sequence.tokens.append(int(result.token_ids[row]))
                if has_logprobs:
                    assert result.logprobs is not None
                    top = slice(row * 20, (row + 1) * 20)
                    sequence.results.append(
                        (
                            float(result.logprobs.logprobs[row]),
                            result.logprobs.top_token_ids[top],
                            result.logprobs.top_logprobs[top],
                        )
                    )
        return result

    def generate(self, sequence: Sequence, num_tokens: int, chunk: int = 32) -> list[int]:
        """Prefill what is not computed yet in chunks, then decode, alone."""
        while not sequence.is_decoding:
            self.step([], [(sequence, min(chunk, len(sequence.tokens) - sequence.num_computed))])
        while len(sequence.output) < num_tokens:
            self.step([sequence])
        return sequence.output

    def _extend(self, sequence: Sequence, num_tokens: int) -> list[PageUpdate]:
        sequence.num_computed += num_tokens
        first = len(sequence.pages)
        missing = -(-sequence.num_computed // self._limits.page_size) - first
        if missing <= 0:
            return []
        pages = [self._free_pages.pop() for _ in range(missing)]
        sequence.pages += pages
        return [PageUpdate(sequence.slot, first, np.array(pages, np.int32))]
