"""The devices of TPU slices to compile for where there are none, and what Pallas knows of them.

XLA's TPU compiler comes with libtpu (the extra "tpu") and compiles without a TPU. It reads its
environment once, when JAX first asks for it, so that who compiles does so in a process of its own,
begun with `compile_environment`. Must not know models.
"""

import os
from collections.abc import Mapping
from typing import Any

from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from engine.errors import ConfigError
from engine.tpu_slice import Slice, chip_kind

_COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    # There is no metadata server to ask which TPU this is.
    "TPU_SKIP_MDS_QUERY": "1",
    # Else a second process dies on the first one's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else logs of gigabytes gather in /tmp.
    "TPU_LOG_DIR": "disabled",
}


def compile_environment(libtpu_flags: str = "") -> dict[str, str]:
    """The environment of a process that compiles for TPUs.

    Args:
        libtpu_flags: As in "--xla_jf_dump_to=DIR".
    """
    return os.environ | _COMPILE_ONLY | {"LIBTPU_INIT_ARGS": libtpu_flags}


def topology_devices(tpu: Slice, *, num_hosts: int | None = None) -> list[Any]:
    """Devices of a slice to compile for; they cannot run anything.

    Args:
        tpu: The slice.
        num_hosts: That hold its chips; by default the usual number.

    Raises:
        ConfigError: There is no such slice, or no compiler for it.
    """
    options: Mapping[str, Any] = {}
    if (num_hosts or tpu.num_hosts) == 1:
        sizes = [int(size) for size in tpu.shape.split("x")]
        options = {"chips_per_host_bounds": (*sizes, 1)[:3]}
    name = f"{tpu.kind.prefix}:{tpu.shape}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        raise ConfigError(
            f"TPU {tpu} cannot be compiled for: {error}. The compiler comes with the extra tpu: "
            "scripts/setup --tpu."
        ) from error
    return list(found.devices)


def chip_of(generation: str) -> pltpu.TpuInfo:
    """What is known of a generation's chip: its memories, its bandwidth, its arithmetic."""
    version = pltpu.ChipVersion[chip_kind(generation).version]
    return pltpu.get_tpu_info_for_chip(version, 1)
