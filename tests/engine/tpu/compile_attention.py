"""Compiles decode attention for a TPU in a process of its own; prints the bytes updated in place.

python compile_attention.py GENERATION NUM_KV_HEADS NUM_SEQS MAX_LEN PAGE_SIZE
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.kernels.attention_pallas import PallasAttention
from engine.kernels.metadata import AttentionMetadata
from engine.topology import chip_of, topology_devices
from engine.tpu_slice import Slice

generation = sys.argv[1]
num_kv_heads, num_seqs, max_len, page_size = map(int, sys.argv[2:])
mesh = Mesh(topology_devices(Slice(generation, "1x1")), ("tp",))
replicated = NamedSharding(mesh, PartitionSpec())


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)


attention = PallasAttention(mesh, chip_of(generation))
cache = attention.cache_shapes(
    num_layers=1,
    num_kv_heads=num_kv_heads,
    head_dim=128,
    num_pages=2**18 // page_size,
    page_size=page_size,
    dtype=jnp.bfloat16,
)
metadata = AttentionMetadata(
    position_T=array((num_seqs,), jnp.int32),
    row_T=array((num_seqs,), jnp.int32),
    page_indices=array((num_seqs, max_len // page_size), jnp.int32),
    kv_lens=array((num_seqs,), jnp.int32),
    cu_chunk_lens=array((1,), jnp.int32),
    num_decodes=array((), jnp.int32),
    page_size=page_size,
    num_decode_rows=num_seqs,
)
heads = array((num_seqs, num_kv_heads, 128), jnp.bfloat16)
attend = jax.jit(partial(attention.attend, sm_scale=128**-0.5), donate_argnums=3)
memory = attend.lower(heads, heads, heads, cache, 0, metadata).compile().memory_analysis()
assert memory is not None
print(memory.alias_size_in_bytes)
