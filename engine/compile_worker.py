"""Compiles an engine's programs for a TPU slice that is not there: a process of its own.

    python -m engine.compile_worker < requests

XLA's TPU compiler reads its environment once and keeps what it compiled, so that who plans or
compiles ahead starts such processes (`engine.compile_ahead`) and talks to them in lines of JSON:
first a `Job`, answered by an `EngineFacts`; then names of programs with the size of the pool, each
answered by a `ProgramFacts`. What cannot work is answered by an `error`. Decides nothing.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
from pydantic import BaseModel, ConfigDict

from engine.config import EngineConfig
from engine.errors import QwenOnRayError
from engine.hub import resolve_checkpoint
from engine.models.config import load_model_config
from engine.program_cost import program_cost
from engine.runner.kv_cache import bytes_per_device
from engine.runner.programs import EnginePrograms, describe_program
from engine.sharding import make_mesh
from engine.step import Bucket
from engine.topology import chip_of, topology_devices
from engine.tpu_slice import Slice


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """What to compile for.

    Attributes:
        config: The engine's.
        tpu: The slice, as in "v6e:2x2".
        store: Folder to keep programs in; None = they are only looked at.
    """

    config: EngineConfig
    tpu: str
    store: str | None


class ProgramShape(_Message):
    """A program before it is compiled.

    Attributes:
        name: For people.
        num_seqs: Decode rows; 0 = it is no step.
        num_chunk_tokens: Prefill tokens.
    """

    name: str
    num_seqs: int
    num_chunk_tokens: int


class EngineFacts(_Message):
    """What is known before anything is compiled; bytes are a device's.

    Attributes:
        programs: All, the largest first.
        num_pages: Of the pool, if programs needed no memory.
        page_bytes: One page, all layers.
        weight_bytes: Parameters and the state of slots.
        streamed_bytes: Parameters that a step reads: all but the embedding table.
        expert_bytes: Of these, the experts', of which it reads those that its tokens go through.
        num_experts: Of a sparse layer; 0 in a dense model.
        experts_per_token: How many of them a token goes through.
        capacity_bytes: That programs may use.
        context_length: Longest prompt plus output.
        num_layers: Of the model.
        num_heads: Query heads of one device.
        head_dim: Of a head.
        parts: What the keys of stored programs are made of.
    """

    programs: list[ProgramShape]
    num_pages: int
    page_bytes: int
    weight_bytes: int
    streamed_bytes: int
    expert_bytes: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    capacity_bytes: int
    context_length: int
    num_layers: int
    num_heads: int
    head_dim: int
    parts: dict[str, str]


class Request(_Message):
    """A program to compile.

    Attributes:
        program: Its place in `EngineFacts.programs`.
        num_pages: Of the pool that it is compiled for.
    """

    program: int
    num_pages: int


class ProgramFacts(_Message):
    """What became of a program; bytes and cycles are a device's.

    Attributes:
        shape: Which one it is.
        seconds: That tracing and compiling took.
        cycles: The compiler's estimates, summed; kernels and collectives are not among them.
        attention_cycles: Of these, what lays arrays out for attention's kernels.
        collectives: How many of each kind.
        collective_bytes: Results of those that the computation waits for.
        sent_bytes: What a device sends for these, around a ring of many.
        idle_bytes: Of `collective_bytes`, those beside which no copy is in flight.
        num_kernels: Calls of kernels.
        alias_bytes: Of its arguments that it updates in place.
        temporary_bytes: Scratch memory.
        code_bytes: Of the program itself.
        fitting_pages: Of the pool beside this program's scratch memory and the code of as many
            programs as there are.
    """

    shape: ProgramShape
    seconds: float
    cycles: int
    attention_cycles: int
    collectives: dict[str, int]
    collective_bytes: int
    sent_bytes: int
    idle_bytes: int
    num_kernels: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    fitting_pages: int


class Worker:
    """One job's programs.

    Raises:
        QwenOnRayError: The configuration, the checkpoint or the slice cannot work.
    """

    def __init__(self, job: Job) -> None:
        config = job.config
        directory = resolve_checkpoint(
            config.model_path,
            revision=config.revision,
            download_dir=config.download_dir,
            has_weights=False,
        )
        self._model_config = load_model_config(directory)
        tpu = Slice.parse(job.tpu)
        devices = topology_devices(tpu, num_hosts=config.nnodes)
        mesh = make_mesh(config.tp_size, devices)
        self._capacity = tpu.kind.hbm_bytes
        self._programs = EnginePrograms(
            config, self._model_config, mesh, chip=chip_of(tpu.generation)
        )
        self._params = self._programs.param_shapes()
        self._store = None if job.store is None else self._programs.open_store(Path(job.store))

    def describe(self) -> EngineFacts:
        """What is known before anything is compiled."""
        programs = self._programs
        memory = programs.memory(self._params, self._capacity)
        embedding = bytes_per_device(self._params["embed_tokens"])
        is_tied = self._model_config.tie_word_embeddings
        experts = self._model_config.experts
        expert_params = [layer["mlp"].get("experts", {}) for layer in self._params["layers"]]
        return EngineFacts(
            programs=[_shape(name) for name in programs.names],
            num_pages=programs.num_pages(memory),
            page_bytes=memory.page,
            weight_bytes=memory.weights,
            streamed_bytes=bytes_per_device(self._params) - (0 if is_tied else embedding),
            expert_bytes=bytes_per_device(expert_params),
            num_experts=0 if experts is None else experts.num_experts,
            experts_per_token=0 if experts is None else experts.experts_per_token,
            capacity_bytes=memory.capacity,
            context_length=programs.context_length,
            num_layers=self._model_config.num_layers,
            num_heads=programs.model.layout.num_heads // programs.replicated.mesh.size,
            head_dim=self._model_config.head_dim,
            parts={} if self._store is None else self._store.parts,
        )

    def compile(self, request: Request) -> ProgramFacts:
        """Compile a program, and keep it where there is a store."""
        name = self._programs.names[request.program]
        program = self._programs.program(name, self._params, request.num_pages)
        started_s = time.monotonic()
        compiled = program.compile()
        seconds = time.monotonic() - started_s
        if self._store is not None:
            self._store.save(self._store.key(program.name, program.arguments), compiled)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        assert text is not None
        cost = program_cost(text)
        return ProgramFacts(
            shape=_shape(name),
            seconds=seconds,
            cycles=cost.cycles,
            attention_cycles=cost.attention_cycles,
            collectives=dict(cost.collectives),
            collective_bytes=cost.collective_bytes,
            sent_bytes=cost.sent_bytes,
            idle_bytes=cost.idle_bytes,
            num_kernels=cost.num_kernels,
            alias_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            fitting_pages=self._programs.num_pages(
                self._programs.memory(self._params, self._capacity, compiled)
            ),
        )


def _shape(name: Bucket | str) -> ProgramShape:
    step = name if isinstance(name, Bucket) else Bucket(0)
    return ProgramShape(
        name=describe_program(name),
        num_seqs=step.num_seqs,
        num_chunk_tokens=step.num_chunk_tokens,
    )


def main() -> None:
    """Answer lines of stdin until it ends; all but the answers goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Every program is compiled for its figures; what JAX has cached would have cost no seconds.
    jax.config.update("jax_enable_compilation_cache", False)
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(Job.model_validate_json(line))
                answer = worker.describe().model_dump_json()
            else:
                answer = worker.compile(Request.model_validate_json(line)).model_dump_json()
        except QwenOnRayError as error:
            answer = json.dumps({"error": str(error), "kind": type(error).__name__})
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
