"""TPU slices by name, and their devices to compile for where there are none.

XLA's TPU compiler comes with libtpu (the extra "tpu") and compiles without a TPU. It reads its
environment once, when JAX first asks for it, so that who compiles does so in a process of its own,
begun with `compile_environment`. Must not know models.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from engine.errors import ConfigError

_COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    # There is no metadata server to ask which TPU this is.
    "TPU_SKIP_MDS_QUERY": "1",
    # Else a second process dies on the first one's lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Else logs of gigabytes gather in /tmp.
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One kind of TPU.

    Attributes:
        prefix: Of the names of its topologies, as the compiler has them.
        version: As Pallas names it.
        devices_per_chip: As JAX counts devices.
        num_dimensions: Of its interconnect.
    """

    prefix: str
    version: pltpu.ChipVersion
    devices_per_chip: int
    num_dimensions: int


GENERATIONS = {
    "v5e": Generation(
        prefix="v5e",
        version=pltpu.ChipVersion.TPU_V5E,
        devices_per_chip=1,
        num_dimensions=2,
    ),
    "v6e": Generation(
        prefix="v6e",
        version=pltpu.ChipVersion.TPU_V6E,
        devices_per_chip=1,
        num_dimensions=2,
    ),
    "v7x": Generation(
        prefix="tpu7x",
        version=pltpu.ChipVersion.TPU_7X,
        devices_per_chip=2,
        num_dimensions=3,
    ),
}


def compile_environment(libtpu_flags: str = "") -> dict[str, str]:
    """The environment of a process that compiles for TPUs.

    Args:
        libtpu_flags: As in "--xla_jf_dump_to=DIR".
    """
    return os.environ | _COMPILE_ONLY | {"LIBTPU_INIT_ARGS": libtpu_flags}


def topology_devices(generation: str, shape: str) -> list[Any]:
    """Devices of a slice to compile for; they cannot run anything.

    Args:
        generation: A key of `GENERATIONS`.
        shape: Chips along each axis, as in "2x2".

    Raises:
        ConfigError: There is no such slice, or no compiler for it.
    """
    kind = chip_kind(generation)
    if not _is_shape(shape, kind.num_dimensions):
        example = "x".join(["2"] * kind.num_dimensions)
        raise ConfigError(
            f"{shape!r} is no topology of TPU {generation}; give chips along each of its "
            f"{kind.num_dimensions} axes, as in {example}."
        )
    options: Mapping[str, Any] = {}
    if set(shape.split("x")) == {"1"}:
        options = {"chips_per_host_bounds": (1, 1, 1)}
    name = f"{kind.prefix}:{shape}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        raise ConfigError(
            f"TPU {generation} {shape} cannot be compiled for: {error}. The compiler comes with "
            "the extra tpu: scripts/setup --tpu."
        ) from error
    return list(found.devices)


def chip_kind(generation: str) -> Generation:
    """Look a generation up.

    Raises:
        ConfigError: There is none of that name.
    """
    if generation not in GENERATIONS:
        raise ConfigError(
            f"{generation!r} is no TPU that is known here. Known are {', '.join(GENERATIONS)}."
        )
    return GENERATIONS[generation]


def chip_of(generation: str) -> pltpu.TpuInfo:
    """What is known of a generation's chip: its memories, its bandwidth, its arithmetic."""
    return pltpu.get_tpu_info_for_chip(chip_kind(generation).version, 1)


def _is_shape(shape: str, num_dimensions: int) -> bool:
    sizes = shape.split("x")
    return len(sizes) == num_dimensions and all(size.isdigit() and int(size) for size in sizes)
