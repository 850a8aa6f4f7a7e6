"""What serving a model on a TPU slice would take and give, before there is one.

Memory is exact: the compiler's own figures for the very programs that serving runs, through the
code that sizes the pool when it serves. Times are estimates between two bounds. The faster one
takes the compiler's cycles at the chip's clock, attention at what the memory and the product unit
allow, and collectives as free. The slower one takes kernels at the efficiency that their static
profiles show at worst, collectives one after another at half the links' rate with a wait each, and
the host's work between steps. None of it has run on a TPU.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.compile_ahead import CompiledEngine
from engine.compile_worker import ProgramFacts, ProgramShape
from engine.config import EngineConfig
from engine.topology import chip_of

READING_EFFICIENCY = 0.7
"""Of the memory's rate, what the kernel for decodes reaches at worst with pages of 16 or more."""

CHUNK_EFFICIENCY = 0.4
MOST_CHUNK_EFFICIENCY = 0.67
"""Of the product unit's rate, what the kernel for chunks reaches: at worst by its static profile
(`benchmarks/tpu_static.py`), and at best, because heads of 128 fill half of the unit."""

EXPERTS_EFFICIENCY = 0.2
"""Of the product unit's rate, what the kernel for experts reaches at worst: half of the rows that
go through a weight are other experts', and a device's part of it may fill a third of the unit."""

COLLECTIVE_WAIT_S = 10e-6
"""Of one collective at worst, beside its bytes."""

HOST_S = 0.5e-3
"""Of the host between two steps at worst; most of it is hidden behind the device's work."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A figure's estimate: between the hardware's best and what can be said to be reached."""

    best: float
    worst: float

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(self.best + other.best, self.worst + other.worst)

    def times(self, factor: float) -> "Bounds":
        return Bounds(self.best * factor, self.worst * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that are alike, so many at a time.

    Attributes:
        input_len: Prompt tokens.
        output_len: Generated tokens.
        concurrency: Requests at a time; a new one begins when one ends.
    """

    input_len: int
    output_len: int
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step's program.

    Attributes:
        shape: Which one it is.
        time_s: Of a step whose sequences have the workload's mean length.
        floor_s: What the hardware would take: reading the weights and keys, or the products.
        bound: "memory" or "products", whichever the floor is.
        facts: The compiler's.
    """

    shape: ProgramShape
    time_s: Bounds
    floor_s: float
    bound: str
    facts: ProgramFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """What one slice would take and give; bytes are a device's.

    Attributes:
        tpu: The slice.
        num_chips: Of it.
        capacity_bytes: That programs may use.
        weight_bytes: Parameters and the state of slots.
        kv_bytes: Pages.
        temporary_bytes: Scratch memory of the largest program.
        code_bytes: Of all programs.
        num_pages: Usable ones.
        page_size: Tokens in a page.
        longest_context: Prompt plus output of one request.
        most_sequences: Of the workload's length that run at once.
        steps: All steps' programs, cheapest first.
        compile_s: Seconds of one processor that all programs took to compile.
        workload: That the following are for.
        ttft_s: From a request to its first token.
        tpot_s: Between two tokens of a request.
        output_tokens_per_s: Of all requests.
    """

    tpu: str
    num_chips: int
    capacity_bytes: int
    weight_bytes: int
    kv_bytes: int
    temporary_bytes: int
    code_bytes: int
    num_pages: int
    page_size: int
    longest_context: int
    most_sequences: int
    steps: tuple[StepPlan, ...]
    compile_s: float
    workload: Workload
    ttft_s: Bounds
    tpot_s: Bounds
    output_tokens_per_s: Bounds

    @property
    def num_tokens(self) -> int:
        """That the pages hold."""
        return self.num_pages * self.page_size

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {
            "num_tokens": self.num_tokens,
            "steps": [
                step.shape.model_dump()
                | {
                    "time_s": asdict(step.time_s),
                    "floor_s": step.floor_s,
                    "bound": step.bound,
                    "facts": step.facts.model_dump(exclude={"shape"}),
                }
                for step in self.steps
            ],
        }


def make_plan(config: EngineConfig, compiled: CompiledEngine, workload: Workload) -> ServingPlan:
    """Read a plan out of an engine's compiled programs.

    Args:
        config: The engine's.
        compiled: Its programs.
        workload: Whose times are estimated; more of it at a time than fits waits.
    """
    engine = compiled.engine
    clock = _Clock(config, compiled, workload)
    steps = sorted(
        (clock.step(facts) for facts in compiled.programs if facts.shape.num_seqs),
        key=lambda step: step.time_s.worst,
    )
    num_pages = compiled.num_pages - 1
    num_tokens = num_pages * config.page_size
    pages_of_request = -(-(workload.input_len + workload.output_len) // config.page_size)
    most_sequences = min(config.max_running_requests, num_pages // pages_of_request)
    at_once = max(1, min(workload.concurrency, most_sequences))
    ttft_s, tpot_s = clock.request(steps, at_once)
    rate = {
        bound: at_once
        * workload.output_len
        / (getattr(ttft_s, bound) + (workload.output_len - 1) * getattr(tpot_s, bound))
        for bound in ("best", "worst")
    }
    return ServingPlan(
        tpu=str(compiled.tpu),
        num_chips=compiled.tpu.num_chips,
        capacity_bytes=engine.capacity_bytes,
        weight_bytes=engine.weight_bytes,
        kv_bytes=compiled.num_pages * engine.page_bytes,
        temporary_bytes=max(program.temporary_bytes for program in compiled.programs),
        code_bytes=sum(program.code_bytes for program in compiled.programs),
        num_pages=num_pages,
        page_size=config.page_size,
        longest_context=min(engine.context_length, num_tokens),
        most_sequences=most_sequences,
        steps=tuple(steps),
        compile_s=sum(program.seconds for program in compiled.programs),
        workload=workload,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        output_tokens_per_s=Bounds(**rate),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpertsTime:
    """What a step's experts take of the memory and of the product unit."""

    read_s: float
    product_s: float


class _Clock:
    """Times of steps and requests, of the compiler's figures and the chip's rates."""

    def __init__(self, config: EngineConfig, compiled: CompiledEngine, workload: Workload) -> None:
        self._chip = chip_of(compiled.tpu.generation)
        self._kind = compiled.tpu.kind
        self._engine = compiled.engine
        self._tp_size = config.tp_size
        self._page_size = config.page_size
        self._workload = workload

    def step(self, facts: ProgramFacts) -> StepPlan:
        """Time one step with as many decodes as the workload has, as far as they fit."""
        num_seqs, num_chunk_tokens = facts.shape.num_seqs, facts.shape.num_chunk_tokens
        num_decodes = min(num_seqs, self._workload.concurrency)
        mean_len = self._workload.input_len + self._workload.output_len / 2
        key_bytes = num_decodes * mean_len * self._engine.page_bytes / self._page_size
        # Each token of a chunk meets those before it, half of the chunk on average.
        chunk_len = min(num_chunk_tokens, self._workload.input_len)
        pairs = num_chunk_tokens * chunk_len / 2
        attention_ops = 4 * pairs * self._engine.num_heads * self._engine.head_dim
        attention_ops *= self._engine.num_layers
        bandwidth = self._chip.mem_bw_bytes_per_second
        peak = self._chip.bf16_ops_per_second
        experts = self._experts(num_decodes + num_chunk_tokens)
        dense_bytes = self._engine.streamed_bytes - self._engine.expert_bytes
        read_s = (dense_bytes + key_bytes) / bandwidth + experts.read_s
        # Two bytes a weight, two operations a weight and token.
        product_s = dense_bytes * (num_seqs + num_chunk_tokens) / peak
        product_s += attention_ops / peak + experts.product_s
        decodes_s, chunks_s = key_bytes / bandwidth, attention_ops / peak
        computed_s = facts.cycles / self._kind.clock_hz
        floor_s = max(read_s, product_s)
        time_s = Bounds(
            max(
                floor_s,
                computed_s
                + decodes_s
                + chunks_s / MOST_CHUNK_EFFICIENCY
                + max(experts.read_s, experts.product_s),
            ),
            computed_s
            + decodes_s / READING_EFFICIENCY
            + chunks_s / CHUNK_EFFICIENCY
            + max(experts.read_s / READING_EFFICIENCY, experts.product_s / EXPERTS_EFFICIENCY)
            + self._collectives_s(facts)
            + HOST_S,
        )
        return StepPlan(
            shape=facts.shape,
            time_s=time_s,
            floor_s=floor_s,
            bound="memory" if read_s >= product_s else "products",
            facts=facts,
        )

    def request(self, steps: Iterable[StepPlan], at_once: int) -> tuple[Bounds, Bounds]:
        """Time to first token, and per output token, of requests so many at a time.

        While a request decodes, the others' prompts are computed in its steps: as many steps with
        chunks as they have, out of as many as it has tokens.
        """
        shapes = {(step.shape.num_seqs, step.shape.num_chunk_tokens): step for step in steps}
        decode = min(
            (shape for shape in shapes if shape[1] == 0 and shape[0] >= at_once), default=None
        ) or max(shape for shape in shapes if shape[1] == 0)
        largest = max(tokens for _, tokens in shapes)
        whole, rest = divmod(self._workload.input_len, largest)
        chunks = [largest] * whole + ([rest] if rest else [])
        prefill = Bounds(0, 0)
        for chunk in chunks:
            fitting = min(
                (shape for shape in shapes if shape[1] >= chunk and shape[0] >= at_once),
                key=lambda shape: (shape[1], shape[0]),
                default=max(shapes, key=lambda shape: shape[1]),
            )
            prefill += shapes[fitting].time_s
        decode_s = shapes[decode].time_s
        # A prompt waits for half a step that is under way, at worst for other prompts, too.
        ttft_s = prefill + Bounds(0, decode_s.worst)
        num_mixed = min((at_once - 1) * len(chunks), self._workload.output_len)
        mixed_s = prefill.times(1 / len(chunks))
        share = num_mixed / self._workload.output_len
        return ttft_s, mixed_s.times(share) + decode_s.times(1 - share)

    def _experts(self, num_tokens: int) -> "_ExpertsTime":
        """Of a step's tokens, as if each chose evenly among the experts and by itself."""
        engine = self._engine
        if engine.num_experts == 0:
            return _ExpertsTime(read_s=0.0, product_s=0.0)
        chosen = engine.experts_per_token / engine.num_experts
        read_bytes = engine.expert_bytes * (1 - (1 - chosen) ** num_tokens)
        return _ExpertsTime(
            read_s=read_bytes / self._chip.mem_bw_bytes_per_second,
            product_s=engine.expert_bytes * chosen * num_tokens / self._chip.bf16_ops_per_second,
        )

    def _collectives_s(self, facts: ProgramFacts) -> float:
        """One after another, around a ring both ways, at half the links' rate."""
        if self._tp_size == 1:
            return 0.0
        sent = facts.sent_bytes * (self._tp_size - 1) / self._tp_size
        num_collectives = sum(facts.collectives.values())
        return sent / self._kind.link_bytes_per_second + num_collectives * COLLECTIVE_WAIT_S
