"""How many pages the KV pool gets: computed from the device's capacity, never from free memory.

So planning, compiling ahead and serving all come to the same number, and a compiled program, whose
shape contains it, is found again in the compilation cache.
"""

import logging
import math
import socket
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from engine.config import EngineConfig
from engine.errors import CapacityError
from engine.tpu_slice import known_capacity

logger = logging.getLogger(__name__)

RESERVE_SHARE = 1 / 32
"""Of the device, for what nobody counts: allocator gaps, the runtime's own buffers."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on one device.

    Attributes:
        capacity: What the device has, whoever uses it.
        weights: Parameters and the slots' state.
        page: One page, all layers.
        temporaries: The largest program's scratch memory, and the code of all programs.
    """

    capacity: int
    weights: int
    page: int
    temporaries: int


def num_pages(
    config: EngineConfig, memory: MemoryUse, *, context_length: int, platform: str
) -> int:
    """Size the pool, page 0 included.

    The smaller of what --mem-fraction-static leaves beside the weights, and of what the device
    leaves beside weights, temporaries and a reserve; rounded down to five binary digits, so that
    small changes of either do not change the programs' shapes.

    Raises:
        CapacityError: There is no room for a single usable page, or for --max-total-tokens.
    """
    pages_per_seq = -(-context_length // config.page_size)
    static_bytes = int(config.mem_fraction_static * memory.capacity) - memory.weights
    reserve = int(RESERVE_SHARE * memory.capacity)
    room_bytes = memory.capacity - memory.weights - memory.temporaries - reserve
    pages = max(0, min(static_bytes, room_bytes) // memory.page)
    if config.max_total_tokens is not None:
        wanted = 1 + -(-config.max_total_tokens // config.page_size)
        if wanted > pages:
            raise CapacityError(
                f"--max-total-tokens={config.max_total_tokens} needs {_gib(wanted * memory.page)} "
                f"of KV cache on each device; {_explain(config, memory)}. Lower "
                f"--max-total-tokens to {max(0, pages - 1) * config.page_size}, raise "
                "--mem-fraction-static, or shard over more devices with --tp-size."
            )
        pages = wanted
    else:
        pages = _round_down(pages)
    if platform == "cpu":
        # The host has other uses for memory that no request could ever fill.
        pages = min(pages, 1 + config.max_running_requests * pages_per_seq)
    if pages < 2:
        raise CapacityError(
            f"KV cache has room for {max(0, pages - 1)} pages: {_explain(config, memory)}. Raise "
            "--mem-fraction-static, shard over more devices with --tp-size, or lower --page-size."
        )
    if pages - 1 < pages_per_seq:
        logger.warning(
            "KV cache has room for %d tokens, less than the context of %d: longer requests are "
            "refused. Raise --mem-fraction-static or --tp-size, or lower --context-length.",
            (pages - 1) * config.page_size,
            context_length,
        )
    return pages


def gang_capacity(device: Any, devices_per_host: int) -> int:
    """Bytes that the least of the gang's devices has; every rank must call it.

    Programs have one shape on all hosts, so that the host with the least memory decides.
    """
    if jax.process_count() == 1:
        return device_capacity(device, devices_per_host=devices_per_host, ranks_on_host=1)
    machines = multihost_utils.process_allgather(np.uint32(zlib.crc32(_machine_id())))
    ranks_on_host = int(np.sum(machines == zlib.crc32(_machine_id())))
    capacity = device_capacity(
        device, devices_per_host=devices_per_host, ranks_on_host=ranks_on_host
    )
    mebibytes = multihost_utils.process_allgather(np.uint32(capacity // 2**20))
    return int(np.min(mebibytes)) * 2**20


def device_capacity(device: Any, *, devices_per_host: int, ranks_on_host: int) -> int:
    """Bytes that one device has; a CPU device has its share of the host's memory.

    Args:
        device: A JAX device.
        devices_per_host: Devices that one rank uses.
        ranks_on_host: Ranks that share the host's memory.

    Raises:
        CapacityError: The device does not say.
    """
    if device.platform == "cpu":
        return host_memory_bytes() // ranks_on_host // devices_per_host
    stats = device.memory_stats() or {}
    if device.platform == "tpu" and (known := known_capacity(device.device_kind)) is not None:
        # What plans are made with, so that they find the same programs.
        given = int(stats.get("bytes_limit", known))
        if given < known:
            logger.warning(
                "%s has %s, less than the %s that its kind has: programs that were compiled ahead "
                "for it are not found.",
                device.device_kind,
                _gib(given),
                _gib(known),
            )
        return min(given, known)
    if "bytes_limit" not in stats:
        raise CapacityError(
            f"{device.device_kind} does not say how much memory it has, so that the KV cache "
            "cannot be sized. Use --device=cpu or another driver version."
        )
    return int(stats["bytes_limit"])


def bytes_per_device(arrays: Any) -> int:
    """Bytes that one device holds of a pytree of sharded arrays, or of their descriptions."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
    )


def temporary_bytes(largest: jax.stages.Compiled, num_programs: int) -> int:
    """Bytes that programs take on each device beside their arguments and results.

    Args:
        largest: Of which one at a time has its scratch memory.
        num_programs: Whose code lies on the device all the while, none larger than that one's.
    """
    used = largest.memory_analysis()
    assert used is not None, "CPUs, GPUs and TPUs all tell"
    return used.temp_size_in_bytes + num_programs * used.generated_code_size_in_bytes


def host_memory_bytes() -> int:
    """Memory of this host, or of this container where it is limited."""
    total = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _machine_id() -> bytes:
    """What ranks on one machine have in common, even in namespaces with their own host names."""
    try:
        return _BOOT_ID.read_bytes()
    except OSError:
        return socket.gethostname().encode()


def _round_down(pages: int) -> int:
    step = 1 << max(0, pages.bit_length() - 5)
    return pages // step * step


def _explain(config: EngineConfig, memory: MemoryUse) -> str:
    return (
        f"of {_gib(memory.capacity)} a device, weights take {_gib(memory.weights)}, temporaries "
        f"{_gib(memory.temporaries)}, and --mem-fraction-static={config.mem_fraction_static} "
        "bounds weights and KV cache together"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
