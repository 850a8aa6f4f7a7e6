from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.runner import kv_cache
from engine.runner.kv_cache import MemoryUse, num_pages

GIB = 2**30


def make_config(**changes: Any) -> EngineConfig:
    return EngineConfig(**({"model_path": "model", "mem_fraction_static": 0.5} | changes))


def make_memory(**changes: int) -> MemoryUse:
    return MemoryUse(
        **({"capacity": 16 * GIB, "weights": 4 * GIB, "page": 2**20, "temporaries": GIB} | changes)
    )


def pages_on_tpu(config: EngineConfig, memory: MemoryUse) -> int:
    return num_pages(config, memory, context_length=2048, platform="tpu")


def test_the_fraction_bounds_weights_and_pages_together():
    assert pages_on_tpu(make_config(), make_memory()) == 4096


def test_temporaries_and_a_reserve_are_left_free_whatever_the_fraction_says():
    pages = pages_on_tpu(make_config(mem_fraction_static=1.0), make_memory())
    room = 16 * 1024 - 4 * 1024 - 1024 - 512
    assert 0.9 * room < pages <= room


def test_small_changes_of_memory_do_not_change_the_pool():
    sizes = {
        pages_on_tpu(make_config(), make_memory(weights=4 * GIB + megabytes * 2**20))
        for megabytes in range(1, 100)
    }
    assert len(sizes) == 1


def test_max_total_tokens_is_the_pool_where_it_fits():
    assert pages_on_tpu(make_config(max_total_tokens=1000), make_memory()) == 1 + 63


def test_max_total_tokens_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(CapacityError, match=r"--max-total-tokens=1000000 .* to 65520"):
        pages_on_tpu(make_config(max_total_tokens=1_000_000), make_memory())


def test_a_cpu_pool_is_no_larger_than_requests_can_fill():
    pages = num_pages(
        make_config(max_running_requests=3), make_memory(), context_length=100, platform="cpu"
    )
    assert pages == 1 + 3 * 7


def test_no_room_is_an_error_that_names_the_flags():
    with pytest.raises(CapacityError, match=r"room for 0 pages.*--mem-fraction-static, shard"):
        pages_on_tpu(make_config(mem_fraction_static=0.2), make_memory())


def test_a_pool_below_the_context_is_warned_about(caplog):
    pages_on_tpu(make_config(max_total_tokens=64), make_memory())
    assert "--context-length" in caplog.text


def test_cpu_devices_share_their_hosts_memory():
    device = jax.devices()[0]
    whole = kv_cache.host_memory_bytes()
    assert kv_cache.device_capacity(device, devices_per_host=2, ranks_on_host=3) == whole // 3 // 2


def test_bytes_are_counted_per_device():
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = NamedSharding(mesh, PartitionSpec(None, "tp"))
    whole = NamedSharding(mesh, PartitionSpec())
    arrays = {
        "sharded": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=sharded),
        "whole": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole),
    }
    assert kv_cache.bytes_per_device(arrays) == 3 * 2 * 2 + 5 * 4
