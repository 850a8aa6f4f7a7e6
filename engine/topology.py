"""TPU slices by name, and their devices to compile for where there are none.

XLA's TPU compiler comes with libtpu (the extra "tpu") and compiles without a TPU. It reads its
environment once, when JAX first asks for it, so that who compiles does so in a process of its own,
begun with `compile_environment`. Must not know models.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

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
        device_kinds: Its names in JAX.
        hbm_bytes: That programs may use of a device's memory, as the compiler enforces it.
        clock_hz: At which its compiler's cycles are turned into time: its published rate of
            products over what its product units do in a cycle.
        link_bytes_per_second: Of one port, one way (docs.cloud.google.com/tpu/docs, the page of
            each generation: a chip's rate over its ports and both ways).
    """

    prefix: str
    version: pltpu.ChipVersion
    devices_per_chip: int
    num_dimensions: int
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    clock_hz: float
    link_bytes_per_second: float


GENERATIONS = {
    "v5e": Generation(
        prefix="v5e",
        version=pltpu.ChipVersion.TPU_V5E,
        devices_per_chip=1,
        num_dimensions=2,
        device_kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=int(15.75 * 2**30),
        clock_hz=1.5e9,
        link_bytes_per_second=50e9,
    ),
    "v6e": Generation(
        prefix="v6e",
        version=pltpu.ChipVersion.TPU_V6E,
        devices_per_chip=1,
        num_dimensions=2,
        device_kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=int(31.24 * 2**30),
        clock_hz=1.75e9,
        link_bytes_per_second=100e9,
    ),
    "v7x": Generation(
        prefix="tpu7x",
        version=pltpu.ChipVersion.TPU_7X,
        devices_per_chip=2,
        num_dimensions=3,
        device_kinds=("TPU7x",),
        hbm_bytes=int(94.74 * 2**30),
        clock_hz=2.2e9,
        link_bytes_per_second=100e9,
    ),
}

# A host holds four chips, save where a slice is smaller.
_CHIPS_PER_HOST = 4


@dataclass(frozen=True, slots=True)
class Slice:
    """A TPU slice by name, as in "v6e:2x2".

    Attributes:
        generation: A key of `GENERATIONS`.
        shape: Chips along each axis.
    """

    generation: str
    shape: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "v6e:2x2".

        Raises:
            ConfigError: It names no generation, or no shape of one.
        """
        generation, _, shape = text.partition(":")
        kind = chip_kind(generation)
        if not _is_shape(shape, kind.num_dimensions):
            raise ConfigError(
                f"{text!r} names no TPU slice: after {generation}: come the chips along each of "
                f"its {kind.num_dimensions} axes, as in {generation}:{_example(kind)}."
            )
        return cls(generation, shape)

    @classmethod
    def of_devices(cls, generation: str, num_devices: int) -> Self:
        """The usual slice with so many devices.

        Raises:
            ConfigError: There is none.
        """
        kind = chip_kind(generation)
        num_chips, rest = divmod(num_devices, kind.devices_per_chip)
        if rest or num_chips == 0 or num_chips & (num_chips - 1):
            raise ConfigError(
                f"No TPU {generation} slice has {num_devices} devices: slices have "
                f"{kind.devices_per_chip}, {2 * kind.devices_per_chip}, "
                f"{4 * kind.devices_per_chip} and so on. Change --tp-size, or name a slice with "
                "--topology."
            )
        # As even as powers of two can be, the longer axes last.
        exponent = num_chips.bit_length() - 1
        sizes = [
            2 ** ((exponent + axis) // kind.num_dimensions) for axis in range(kind.num_dimensions)
        ]
        if kind.num_dimensions == 3:
            sizes.reverse()
        return cls(generation, "x".join(map(str, sizes)))

    @property
    def num_chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def num_devices(self) -> int:
        return self.num_chips * chip_kind(self.generation).devices_per_chip

    @property
    def num_hosts(self) -> int:
        return -(-self.num_chips // _CHIPS_PER_HOST)

    def __str__(self) -> str:
        return f"{self.generation}:{self.shape}"


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
        num_hosts: That hold its chips; by default one for each four.

    Raises:
        ConfigError: There is no such slice, or no compiler for it.
    """
    kind = chip_kind(tpu.generation)
    options: Mapping[str, Any] = {}
    if tpu.num_chips < _CHIPS_PER_HOST or num_hosts == 1:
        sizes = [int(size) for size in tpu.shape.split("x")]
        options = {"chips_per_host_bounds": (*sizes, 1)[:3]}
    name = f"{kind.prefix}:{tpu.shape}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        raise ConfigError(
            f"TPU {tpu} cannot be compiled for: {error}. The compiler comes with the extra tpu: "
            "scripts/setup --tpu."
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


def known_capacity(device_kind: str) -> int | None:
    """Bytes of a device's memory that programs may use; None for what is not known here.

    Args:
        device_kind: As JAX names it, as in "TPU v6 lite".
    """
    for generation in GENERATIONS.values():
        if device_kind in generation.device_kinds:
            return generation.hbm_bytes
    return None


def _example(kind: Generation) -> str:
    return "x".join(["2"] * min(kind.num_dimensions, 2) + ["1"] * (kind.num_dimensions - 2))


def _is_shape(shape: str, num_dimensions: int) -> bool:
    sizes = shape.split("x")
    return len(sizes) == num_dimensions and all(size.isdigit() and int(size) for size in sizes)
