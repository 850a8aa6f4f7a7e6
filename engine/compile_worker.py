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
from engine.topology import Slice, chip_kind, chip_of, topology_devices


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


class EngineFacts(_Message):
    """What is known before anything is compiled; bytes are a device's.

    Attributes:
        programs: Names of all, the largest first.
        num_seqs: Decode rows of each, 0 of those that are no steps.
        num_chunk_tokens: Prefill tokens of each.
        num_pages: Of the pool, if programs needed no memory.
        page_bytes: One page, all layers.
        weight_bytes: Parameters and the state of slots.
        streamed_bytes: Parameters that every step reads: all but the embedding table.
        capacity_bytes: That programs may use.
        context_length: Longest prompt plus output.
        num_layers: Of the model.
        num_heads: Query heads of one device.
        head_dim: Of a head.
        parts: What the keys of stored programs are made of.
    """

    programs: list[str]
    num_seqs: list[int]
    num_chunk_tokens: list[int]
    num_pages: int
    page_bytes: int
    weight_bytes: int
    streamed_bytes: int
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
        name: For people.
        key: Of its file in the store; "" without one.
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

    name: str
    key: str
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
        self._capacity = chip_kind(tpu.generation).hbm_bytes
        self._programs = EnginePrograms(
            config, self._model_config, mesh, chip=chip_of(tpu.generation)
        )
        self._params = self._programs.param_shapes()
        # Without a folder of its own a store would leave one behind; its keys are wanted anyway.
        self._store = None if job.store is None else self._programs.open_store(Path(job.store))

    def describe(self) -> EngineFacts:
        """What is known before anything is compiled."""
        programs = self._programs
        memory = programs.memory(self._params, self._capacity)
        steps = [name if isinstance(name, Bucket) else Bucket(0) for name in programs.names]
        embedding = bytes_per_device(self._params["embed_tokens"])
        is_tied = self._model_config.tie_word_embeddings
        return EngineFacts(
            programs=[describe_program(name) for name in programs.names],
            num_seqs=[step.num_seqs for step in steps],
            num_chunk_tokens=[step.num_chunk_tokens for step in steps],
            num_pages=programs.num_pages(memory),
            page_bytes=memory.page,
            weight_bytes=memory.weights,
            streamed_bytes=bytes_per_device(self._params) - (0 if is_tied else embedding),
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
        key = ""
        if self._store is not None:
            key = self._store.key(program.name, program.arguments)
            self._store.save(key, compiled)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None
        assert text is not None
        cost = program_cost(text)
        return ProgramFacts(
            name=describe_program(name),
            key=key,
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
