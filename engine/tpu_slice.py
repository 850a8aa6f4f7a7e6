"""TPU slices by name: generations, shapes, and how many chips, devices and hosts a slice has.

Must not import JAX: the configuration and the leader ask, too. `engine.topology` has the devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engine.errors import ConfigError

_CHIPS_PER_HOST = 4
"""Of a slice with several hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One kind of TPU.

    Attributes:
        prefix: Of the names of its topologies, as the compiler has them.
        version: As Pallas names it: a member of its `ChipVersion`.
        pod_type: What Ray's names of its slices begin with, before the devices: v6e-16.
        devices_per_chip: As JAX counts devices.
        num_dimensions: Of its interconnect.
        max_chips_of_one_host: The largest slice that is a single host.
        device_kinds: Its names in JAX.
        hbm_bytes: That programs may use of a device's memory, as the compiler enforces it.
        clock_hz: At which its compiler's cycles are turned into time: its published rate of
            products over what its product units do in a cycle.
        link_bytes_per_second: Of one port, one way (docs.cloud.google.com/tpu/docs, the page of
            each generation: a chip's rate over its ports and both ways).
    """

    prefix: str
    version: str
    pod_type: str
    devices_per_chip: int
    num_dimensions: int
    max_chips_of_one_host: int
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    clock_hz: float
    link_bytes_per_second: float


GENERATIONS = {
    "v5e": Generation(
        prefix="v5e",
        version="TPU_V5E",
        pod_type="v5litepod",
        devices_per_chip=1,
        num_dimensions=2,
        max_chips_of_one_host=8,
        device_kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=int(15.75 * 2**30),
        clock_hz=1.5e9,
        link_bytes_per_second=50e9,
    ),
    "v6e": Generation(
        prefix="v6e",
        version="TPU_V6E",
        pod_type="v6e",
        devices_per_chip=1,
        num_dimensions=2,
        max_chips_of_one_host=8,
        device_kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=int(31.24 * 2**30),
        clock_hz=1.75e9,
        link_bytes_per_second=100e9,
    ),
    "v7x": Generation(
        prefix="tpu7x",
        version="TPU_7X",
        pod_type="v7x",
        devices_per_chip=2,
        num_dimensions=3,
        max_chips_of_one_host=4,
        device_kinds=("TPU7x",),
        hbm_bytes=int(94.74 * 2**30),
        clock_hz=2.2e9,
        link_bytes_per_second=100e9,
    ),
}


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
        if not _is_shape(shape, kind):
            raise ConfigError(
                f"{text!r} names no TPU slice: after {generation}: come the chips along each of "
                f"its {kind.num_dimensions} axes, as in {generation}:{_example(kind)}. More than "
                f"{_CHIPS_PER_HOST} chips are a multiple of {_CHIPS_PER_HOST}."
            )
        return cls(generation, shape)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read {"generation": "v6e", "topology": "2x2"}.

        Raises:
            ConfigError: Other keys, or values that name no slice.
        """
        if set(fields) != {"generation", "topology"}:
            raise ConfigError(
                f"a TPU slice has the keys generation and topology, got {', '.join(fields)}; "
                'as in {generation: v6e, topology: 2x2}, or "v6e:2x2"'
            )
        return cls.parse(f"{fields['generation']}:{fields['topology']}")

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
    def kind(self) -> Generation:
        return chip_kind(self.generation)

    @property
    def num_chips(self) -> int:
        return num_chips_of(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.kind.devices_per_chip

    @property
    def host_counts(self) -> tuple[int, ...]:
        """Over how many hosts it can be had, the usual number first.

        Eight chips of v5e or v6e are one large host, or two of four chips (GKE's machine types
        ct6e-standard-8t and ct6e-standard-4t); all other slices come in one form.
        """
        num_hosts = -(-self.num_chips // _CHIPS_PER_HOST)
        is_one = self.num_chips <= self.kind.max_chips_of_one_host
        return tuple(dict.fromkeys([1, num_hosts] if is_one else [num_hosts]))

    @property
    def num_hosts(self) -> int:
        return self.host_counts[0]

    @property
    def pod_type(self) -> str:
        """As Ray calls slices of its size, as in "v6e-16"."""
        return f"{self.kind.pod_type}-{self.num_devices}"

    def __str__(self) -> str:
        return f"{self.generation}:{self.shape}"


def num_chips_of(shape: str) -> int:
    """Chips of a shape such as "2x4"."""
    return math.prod(map(int, shape.split("x")))


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


def _is_shape(shape: str, kind: Generation) -> bool:
    sizes = shape.split("x")
    if len(sizes) != kind.num_dimensions or not all(size.isdigit() and int(size) for size in sizes):
        return False
    num_chips = num_chips_of(shape)
    return num_chips <= _CHIPS_PER_HOST or num_chips % _CHIPS_PER_HOST == 0
