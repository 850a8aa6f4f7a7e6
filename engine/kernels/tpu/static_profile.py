"""Cycles of the attention kernels by the TPU compiler's static profile, which needs no TPU.

The profile executes a program's own instructions in the abstract, with a model of its copies. It
knows no length that is read from memory, so kernels are built for constant ones. The compiler reads
its flags once: each profile is taken in a process of its own.

Its model of copies lets several that are in flight each have the memory's whole rate: a kernel can
come out faster than the memory, but not one whose instructions are the limit.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.errors import CapacityError
from engine.kernels.tpu.block_sizes import choose_blocks
from engine.kernels.tpu.chunks import ChunkBlocks, ConstantChunk, attend_chunks
from engine.kernels.tpu.decode import DecodeBlocks, attend_decodes
from engine.kernels.tpu.kv_rows import LANES, RowLayout
from engine.topology import chip_of, compile_environment, topology_devices
from engine.tpu_slice import GENERATIONS, Slice

TIMEOUT_S = 900
MAX_LEN = 8192
"""Of a decoding sequence: what its blocks are chosen for."""

POOL_TOKENS = 2**17
"""Of the pages at least: the compiler would move fewer of them to the vector memory as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeProfile:
    """A batch of decoding sequences, all of one length.

    Attributes:
        generation: Of TPUs.
        layout: Of one chip's cache rows.
        page_size: Tokens in a page.
        context: Cached tokens of each sequence.
        rounds: The batch: how often each of the kernel's buffers has its turn.
        blocks: Sizes of the kernel; None = as they are chosen.
    """

    generation: str
    layout: RowLayout
    page_size: int
    context: int
    rounds: int
    blocks: DecodeBlocks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkProfile:
    """One chunk of a prompt.

    Attributes:
        generation, layout, page_size: As for `DecodeProfile`.
        start: Tokens cached before it.
        length: Its tokens.
        blocks: Sizes of the kernel; None = as they are chosen.
    """

    generation: str
    layout: RowLayout
    page_size: int
    start: int
    length: int
    blocks: ChunkBlocks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycles:
    """What a profile says.

    Attributes:
        cycles: Of the kernel.
        batch: Sequences that they were counted for.
    """

    cycles: int
    batch: int


def profile(case: DecodeProfile | ChunkProfile) -> Cycles:
    """Profile a kernel, in a process of its own.

    Raises:
        CapacityError: The compiler does not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [*(sys.executable, "-m", __name__), type(case).__name__, json.dumps(asdict(case))],
            env=compile_environment(f"--xla_jf_dump_static_llo_profile_to={folder}"),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    if process.returncode:
        raise CapacityError(f"{case} does not compile: {process.stderr[-3000:]}")
    return Cycles(**json.loads(process.stdout))


# In the process that compiles ---------------------------------------------------------------------


def profile_decode(case: DecodeProfile) -> Cycles:
    layout, page_size = case.layout, case.page_size
    chosen = choose_blocks(
        layout,
        page_size=page_size,
        max_len=max(MAX_LEN, 2 * case.context),
        num_chunk_tokens=0,
        chip=chip_of(case.generation),
    )
    blocks = case.blocks or chosen.decode
    turn = blocks.num_buffers * blocks.group
    batch = case.rounds * turn // -(-case.context // blocks.num_keys)
    pages_per_seq = case.context // page_size + 1
    queries = layout.num_query_tiles * layout.queries_in_tile
    cycles = _cycles(
        case.generation,
        lambda *arrays: attend_decodes(
            *arrays,
            layout=layout,
            blocks=blocks,
            sm_scale=layout.head_dim**-0.5,
            constant_len=case.context,
            vmem_limit_bytes=chosen.vmem_limit_bytes,
        ),
        ((batch, queries, LANES), _computed_dtype(layout)),
        ((batch, layout.num_stored_rows, LANES), layout.stored_dtype),
        (_pages(layout, batch * pages_per_seq, page_size), layout.stored_dtype),
        ((batch,), jnp.int32),
        ((batch, pages_per_seq), jnp.int32),
        ((), jnp.int32),
        ((), jnp.int32),
    )
    return Cycles(cycles=cycles, batch=batch)


def profile_chunk(case: ChunkProfile) -> Cycles:
    layout, page_size = case.layout, case.page_size
    stop = case.start + case.length
    chosen = choose_blocks(
        layout,
        page_size=page_size,
        max_len=stop,
        num_chunk_tokens=case.length,
        chip=chip_of(case.generation),
    )
    pages_per_seq = -(-stop // page_size)
    cycles = _cycles(
        case.generation,
        # Queries come out of an operation, as in a step: of a program's own argument the profile
        # gives up.
        lambda q, *arrays: attend_chunks(
            2 * q,
            *arrays,
            first_token=0,
            layout=layout,
            blocks=case.blocks or chosen.chunk,
            sm_scale=layout.head_dim**-0.5,
            constant=ConstantChunk(start=case.start, length=case.length),
            vmem_limit_bytes=chosen.vmem_limit_bytes,
        ),
        (
            (layout.num_rows, layout.queries_per_row, case.length, LANES),
            _computed_dtype(layout),
        ),
        ((layout.num_stored_rows, case.length, LANES), layout.stored_dtype),
        (_pages(layout, pages_per_seq, page_size), layout.stored_dtype),
        ((1,), jnp.int32),
        ((1, pages_per_seq), jnp.int32),
        ((2,), jnp.int32),
        ((), jnp.int32),
    )
    return Cycles(cycles=cycles, batch=1)


def _pages(layout: RowLayout, num_pages: int, page_size: int) -> tuple[int, ...]:
    num_pages = max(num_pages, POOL_TOKENS // page_size)
    return num_pages, layout.num_stored_rows, page_size, LANES


def _computed_dtype(layout: RowLayout) -> Any:
    return jnp.float32 if layout.is_float32 else jnp.bfloat16


def _cycles(generation: str, attend: Callable, *arrays: tuple[tuple[int, ...], Any]) -> int:
    """Compile for one device; the third array, the pages, is donated."""
    devices = topology_devices(
        Slice.of_devices(generation, GENERATIONS[generation].devices_per_chip)
    )
    devices = devices[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("tp",)), PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for size, dtype in arrays]
    text = jax.jit(attend, donate_argnums=2).lower(*shapes).compile().as_text()
    assert text is not None
    (line,) = (line for line in text.splitlines() if '"tpu_custom_call"' in line)
    found = re.search(r'"estimated_cycles":"(\d+)"', line)
    assert found is not None, "the profile was asked for"
    return int(found[1])


def _case(kind: str, fields: dict[str, Any]) -> DecodeProfile | ChunkProfile:
    fields["layout"] = RowLayout(**fields["layout"])
    sizes = fields.pop("blocks")
    if kind == DecodeProfile.__name__:
        case = DecodeProfile(**fields)
        return replace(case, blocks=DecodeBlocks(**sizes)) if sizes else case
    case = ChunkProfile(**fields)
    return replace(case, blocks=ChunkBlocks(**sizes)) if sizes else case


def main() -> None:
    case = _case(sys.argv[1], json.loads(sys.argv[2]))
    found = profile_decode(case) if isinstance(case, DecodeProfile) else profile_chunk(case)
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
