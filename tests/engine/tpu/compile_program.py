"""Compiles programs for a TPU slice in a process of its own; prints what became of them as JSON.

python compile_program.py GENERATION SHAPE CONFIG [BUCKET ...]

CONFIG is JSON of the flags; a bucket is "decodes,tokens".
"""

import json
import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.models.config import load_model_config
from engine.runner.kv_cache import bytes_per_device
from engine.runner.programs import EnginePrograms
from engine.sharding import make_mesh
from engine.topology import chip_of, topology_devices

CACHED_TOKENS = 65536

generation, shape, flags, *wanted = sys.argv[1:]
devices = topology_devices(generation, shape)
config = EngineConfig.model_validate(json.loads(flags) | {"tp_size": len(devices)})
programs = EnginePrograms(
    config,
    load_model_config(Path(config.model_path)),
    make_mesh(len(devices), devices),
    chip=chip_of(generation),
)
params = programs.param_shapes()
num_pages = CACHED_TOKENS // config.page_size
found = []
for text in wanted:
    num_seqs, num_tokens = map(int, text.split(","))
    (bucket,) = (
        bucket
        for bucket in programs.buckets
        if (bucket.num_seqs, bucket.num_chunk_tokens) == (num_seqs, num_tokens)
    )
    program = programs.program(bucket, params, num_pages)
    compiled = program.jitted.lower(*program.arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    found.append(
        {
            "cache_bytes": bytes_per_device(programs.cache_shapes(num_pages)),
            "alias_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        }
    )
json.dump(found, sys.stdout)
