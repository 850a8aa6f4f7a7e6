"""A plan out of figures that are made up, so that each can be worked out by hand."""

from engine.compile_ahead import CompiledEngine
from engine.compile_worker import EngineFacts, ProgramFacts, ProgramShape
from engine.config import EngineConfig
from engine.planner import ServingPlan, Workload, make_plan
from engine.tpu_slice import Slice

GIB = 2**30
PAGE_SIZE = 16
STEPS = {(8, 0): 2_000_000, (64, 0): 2_100_000, (64, 128): 3_000_000, (64, 512): 8_000_000}


def program(num_seqs: int, num_chunk_tokens: int, cycles: int) -> ProgramFacts:
    return ProgramFacts(
        shape=ProgramShape(
            name=f"{num_seqs} decodes, {num_chunk_tokens} prefill tokens",
            num_seqs=num_seqs,
            num_chunk_tokens=num_chunk_tokens,
        ),
        seconds=10,
        cycles=cycles,
        attention_cycles=0,
        collectives={"all-reduce": 65},
        collective_bytes=65 * (num_seqs + num_chunk_tokens) * 4096 * 2,
        sent_bytes=2 * 65 * (num_seqs + num_chunk_tokens) * 4096 * 2,
        idle_bytes=0,
        num_kernels=32,
        alias_bytes=0,
        temporary_bytes=(num_seqs + num_chunk_tokens) * 2**18,
        code_bytes=2**26,
        fitting_pages=1001,
    )


def plan_for(
    num_pages: int = 1001, experts: dict[str, int] | None = None, **workload: int
) -> ServingPlan:
    programs = tuple(program(*shape, cycles) for shape, cycles in STEPS.items())
    engine = EngineFacts(
        programs=[each.shape for each in programs],
        num_pages=num_pages,
        page_bytes=2**21,
        weight_bytes=4 * GIB,
        streamed_bytes=int(3.5e9),
        capacity_bytes=30 * GIB,
        context_length=8192,
        num_layers=32,
        num_heads=8,
        head_dim=128,
        parts={},
        **(experts or {}),
    )
    config = EngineConfig(model_path="m", device="tpu", tp_size=4, page_size=PAGE_SIZE)
    compiled = CompiledEngine(
        tpu=Slice.parse("v6e:2x2"), engine=engine, num_pages=num_pages, programs=programs
    )
    fields = {"input_len": 512, "output_len": 128, "concurrency": 8} | workload
    return make_plan(config, compiled, Workload(**fields))
