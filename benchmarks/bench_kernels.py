"""Measures the parts of a step by themselves: attention, matrix products, sampling.

    python benchmarks/bench_kernels.py
    python benchmarks/bench_kernels.py --config qwen3-0.6b --rows 1 8 32 --context 128 1024 8192

Times are minima over the runs, of one call on the default device. For attention and matrices the
bytes that must be read (keys and values, weights) give a rate, to hold against the memory's: that
of a plain copy, printed first.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from engine.kernels.attention import AttentionMetadata, make_attention, zeroed_cache
from engine.kernels.packed_weight import PackedWeight, can_pack, pack_weights, products
from engine.models.quantization import dequantize, quantized_product
from engine.runner.likeliest import BY_SORT
from engine.runner.sampler import SamplingInputs, sample
from engine.runner.slot_state import init_slot_state
from engine.sharding import make_mesh, named_sharding

PAGE_SIZE = 16
COPY_BYTES = 512 * 2**20


class Shape(NamedTuple):
    """A model's sizes, as far as a step's time depends on them."""

    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151936),
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151936),
    "qwen-7b": Shape(4096, 11008, 32, 32, 128, 151936),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 32], help="decoding rows")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument(
        "--chunk", type=int, nargs="*", default=[512], help="tokens of a prompt's chunk"
    )
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.config]
    print(f"{arguments.config} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    show("read memory", COPY_BYTES, best_s(jax.jit(jnp.sum), (source,), arguments.runs))
    for rows in arguments.rows:
        for context in arguments.context:
            measure_decodes(shape, rows, context, arguments.runs)
    for tokens in arguments.chunk:
        for context in arguments.context:
            measure_chunk(shape, tokens, max(context, tokens), arguments.runs)
    for rows in arguments.rows:
        measure_matrices(shape, rows, arguments.runs)
    for rows in arguments.rows:
        measure_sampling(shape, rows, arguments.runs)
    return 0


def measure_decodes(shape: Shape, rows: int, context: int, runs: int) -> None:
    """One layer's decode attention, every row at the same context length."""
    num_rows = max(2, rows)
    lens = np.where(np.arange(num_rows) < rows, context, 0).astype(np.int32)
    metadata = AttentionMetadata(
        position_T=jnp.asarray(lens - 1),
        row_T=jnp.arange(num_rows, dtype=jnp.int32),
        page_indices=page_table(num_rows, rows, context),
        kv_lens=jnp.asarray(lens),
        cu_chunk_lens=jnp.zeros(1, jnp.int32),
        num_decodes=jnp.int32(rows),
        page_size=PAGE_SIZE,
        num_decode_rows=num_rows,
    )
    num_bytes = 2 * 2 * rows * context * shape.num_kv_heads * shape.head_dim
    seconds = attention_s(shape, metadata, runs)
    show(f"attention, {rows} rows at {context} tokens", num_bytes, seconds)


def measure_chunk(shape: Shape, tokens: int, context: int, runs: int) -> None:
    """One layer's attention of a prompt's chunk, the last of that many tokens."""
    metadata = AttentionMetadata(
        position_T=jnp.arange(context - tokens, context, dtype=jnp.int32),
        row_T=jnp.zeros(tokens, jnp.int32),
        page_indices=page_table(1, 1, context),
        kv_lens=jnp.full(1, context, jnp.int32),
        cu_chunk_lens=jnp.array([0, tokens], jnp.int32),
        num_decodes=jnp.int32(0),
        page_size=PAGE_SIZE,
        num_decode_rows=0,
    )
    seen = tokens * (context - (tokens - 1) / 2)
    num_flops = 2 * 2 * seen * shape.num_heads * shape.head_dim
    seconds = attention_s(shape, metadata, runs)
    what = f"attention, last {tokens} of {context} tokens"
    print(f"{what:<46} {seconds * 1e3:8.3f} ms {num_flops / seconds / 1e9:8.0f} GFLOP/s")


def page_table(num_rows: int, rows: int, context: int) -> jax.Array:
    """Pages of `rows` sequences, one behind the other; rows beyond them repeat the first ones'."""
    pages_per_seq = context // PAGE_SIZE + 1
    pages = 1 + np.arange(num_rows * pages_per_seq, dtype=np.int32) % (rows * pages_per_seq)
    return jnp.asarray(pages.reshape(num_rows, pages_per_seq))


def attention_s(shape: Shape, metadata: AttentionMetadata, runs: int) -> float:
    """Seconds of one layer's attention by the implementation that would serve here."""
    attention = make_attention(
        jax.default_backend(),
        "auto",
        make_mesh(1, jax.devices()[:1]),
        dtype=jnp.bfloat16,
        head_dim=shape.head_dim,
        page_size=PAGE_SIZE,
    )
    shapes = attention.cache_shapes(
        num_layers=1,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_pages=int(metadata.page_indices.max()) + 1,
        page_size=PAGE_SIZE,
        dtype=jnp.bfloat16,
    )
    cache = zeroed_cache(shapes)
    num_tokens = metadata.position_T.shape[0]
    query = jnp.ones((num_tokens, shape.num_heads, shape.head_dim), jnp.bfloat16)
    key = jnp.ones((num_tokens, shape.num_kv_heads, shape.head_dim), jnp.bfloat16)

    def attend(cache: Any) -> tuple[jax.Array, Any]:
        return attention.attend(query, key, key, cache, 0, metadata, sm_scale=shape.head_dim**-0.5)

    program = jax.jit(attend, donate_argnums=0)
    _, cache = program(cache)
    best = float("inf")
    for _ in range(runs):
        started_s = time.perf_counter()
        out, cache = program(cache)
        out.block_until_ready()
        best = min(best, time.perf_counter() - started_s)
    return best


def measure_matrices(shape: Shape, rows: int, runs: int) -> None:
    """One layer's matrices and the head, in bfloat16 and int8, as XLA multiplies and as we do."""
    query = shape.num_heads * shape.head_dim
    key = shape.num_kv_heads * shape.head_dim
    sizes = [(query, shape.hidden), (key, shape.hidden), (key, shape.hidden)]
    sizes += [(shape.hidden, query), (shape.ffn, shape.hidden), (shape.ffn, shape.hidden)]
    sizes += [(shape.hidden, shape.ffn)]
    for what, matrices in (("a layer's matrices", sizes), ("head", [(shape.vocab, shape.hidden)])):
        # Several copies, so that no cache holds them from one run to the next.
        copies = max(1, 2**28 // sum(2 * rows_ * columns for rows_, columns in matrices))
        inputs = {size[1]: jnp.ones((max(2, rows), size[1]), jnp.bfloat16) for size in matrices}
        for dtype in (jnp.bfloat16, jnp.int8):
            name = f"{what}, {rows} rows, {jnp.dtype(dtype).name}"
            num_bytes = sum(out * in_ for out, in_ in matrices) * jnp.dtype(dtype).itemsize
            for is_packed in (False, True) if can_pack(dtype) else (False,):
                weights = make_weights(matrices, copies, dtype, is_packed=is_packed)
                seconds = best_s(jax.jit(multiply), (inputs, weights), runs) / copies
                show(f"{name}, {'packed' if is_packed else 'plain'}", num_bytes, seconds)


def make_weights(
    matrices: list[tuple[int, int]], copies: int, dtype: DTypeLike, *, is_packed: bool
) -> list[Any]:
    """So many copies of each matrix, all copies of the first size first."""
    sharding = named_sharding(make_mesh(1, jax.devices()[:1]), ("ffn", "embed"))
    weights: list[Any] = []
    for size in matrices:
        same = [jnp.ones(size, dtype, device=sharding) for _ in range(copies)]
        if is_packed:
            packed = pack_weights(same)
            weights += [packed.at_layer(copy) for copy in range(copies)]
        else:
            weights += same
    return weights


def multiply(inputs: dict[int, jax.Array], weights: list[Any]) -> list[jax.Array]:
    """The products as the models' layers make them."""
    mesh = make_mesh(1, jax.devices()[:1])
    found = []
    for weight in weights:
        is_packed = isinstance(weight, PackedWeight)
        outputs, num_inputs = (weight.outputs[0], weight.num_inputs) if is_packed else weight.shape
        x = inputs[num_inputs]
        if jnp.dtype(weight.dtype) == jnp.int8:
            product, scale = quantized_product(x, weight, mesh)
            found.append(dequantize(product, scale, jnp.ones(outputs, jnp.float32), jnp.bfloat16))
        else:
            found += products(x, [weight], jnp.bfloat16, mesh)
    return found


def measure_sampling(shape: Shape, rows: int, runs: int) -> None:
    """One step's sampling: greedy, with temperature, and limited by top_k and top_p."""
    logits = jax.random.normal(jax.random.key(0), (rows, shape.vocab), jnp.float32)
    state = init_slot_state(rows, shape.vocab)
    program = jax.jit(partial(sample, likeliest=BY_SORT))
    for what, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("temperature 1", 1.0, 0, 1.0),
        ("top_k 50, top_p 0.9", 1.0, 50, 0.9),
    ):
        inputs = sampling_inputs(rows, temperature=temperature, top_k=top_k, top_p=top_p)
        seconds = best_s(program, (logits, inputs, state), runs)
        show(f"sampling, {rows} rows, {what}", logits.nbytes, seconds)


def sampling_inputs(rows: int, *, temperature: float, top_k: int, top_p: float) -> SamplingInputs:
    def floats(value: float) -> jax.Array:
        return jnp.full(rows, value, jnp.float32)

    def ints(value: int) -> jax.Array:
        return jnp.full(rows, value, jnp.int32)

    no = jnp.zeros(rows, bool)
    return SamplingInputs(
        slot=jnp.arange(rows, dtype=jnp.int32),
        temperature=floats(temperature),
        top_k=ints(top_k),
        top_p=floats(top_p),
        min_p=floats(0),
        presence_penalty=floats(0),
        frequency_penalty=floats(0),
        repetition_penalty=floats(1),
        has_penalties=no,
        has_logit_bias=no,
        bans_end_tokens=no,
        seed=jnp.zeros((rows, 2), jnp.uint32),
        choice_index=ints(0),
        position=jnp.arange(rows, dtype=jnp.int32),
        has_logprobs=jnp.bool_(False),
    )


def best_s(function: Callable[..., Any], arguments: tuple[Any, ...], runs: int) -> float:
    """Fastest of `runs` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(runs):
        started_s = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - started_s)
    return best


def show(what: str, num_bytes: float, seconds: float) -> None:
    print(f"{what:44} {seconds * 1e3:9.3f} ms {num_bytes / seconds / 1e9:8.1f} GB/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
