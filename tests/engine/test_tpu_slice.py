import re
import subprocess
import sys

import pytest

from engine.errors import ConfigError
from engine.tpu_slice import GENERATIONS, Slice


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "v9"),
        ("v6e:4", "v6e:2x2"),
        ("v7x:2x2", "v7x:2x2x1"),
        ("v6e", "v6e:2x2"),
        ("v6e:2x3", "multiple of 4"),
    ],
)
def test_what_is_no_slice_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Slice.parse(name)


@pytest.mark.parametrize(
    ("generation", "num_devices", "name"),
    [("v6e", 1, "v6e:1x1"), ("v6e", 8, "v6e:2x4"), ("v6e", 16, "v6e:4x4"), ("v7x", 8, "v7x:2x2x1")],
)
def test_a_number_of_devices_has_its_usual_slice(
    generation: str, num_devices: int, name: str
) -> None:
    tpu = Slice.of_devices(generation, num_devices)
    assert str(tpu) == name
    assert tpu.num_devices == num_devices
    with pytest.raises(ConfigError, match="--tp-size"):
        Slice.of_devices(generation, 3 * num_devices)


@pytest.mark.parametrize(
    ("name", "host_counts"),
    [
        ("v6e:1x1", (1,)),
        ("v6e:2x2", (1,)),
        ("v6e:2x4", (1, 2)),
        ("v5e:2x4", (1, 2)),
        ("v6e:4x4", (4,)),
        ("v5e:16x16", (64,)),
        ("v7x:2x2x1", (1,)),
        ("v7x:2x2x2", (2,)),
    ],
)
def test_hosts_hold_four_chips_save_large_single_ones(
    name: str, host_counts: tuple[int, ...]
) -> None:
    assert Slice.parse(name).host_counts == host_counts


@pytest.mark.parametrize(
    ("name", "pod_type"),
    [("v5e:4x4", "v5litepod-16"), ("v6e:2x4", "v6e-8"), ("v7x:2x2x2", "v7x-16")],
)
def test_slices_are_called_what_ray_calls_them(name: str, pod_type: str) -> None:
    tpu = pytest.importorskip("ray._private.accelerators.tpu")
    generation, _, shape = name.partition(":")
    ray_name = {"v5e": "v5litepod"}.get(generation, generation)
    assert Slice.parse(name).pod_type == pod_type
    assert pod_type == tpu.infer_tpu_pod_type_from_topology(shape, f"TPU-{ray_name.upper()}")


def test_every_generation_is_one_that_pallas_knows() -> None:
    pallas = pytest.importorskip("jax.experimental.pallas.tpu")
    assert all(kind.version in pallas.ChipVersion.__members__ for kind in GENERATIONS.values())


def test_slices_are_known_without_jax() -> None:
    check = "import sys, engine.tpu_slice, engine.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_fields_of_a_slice_are_named_where_one_is_missing() -> None:
    assert str(Slice.of_fields({"generation": "v6e", "topology": "4x4"})) == "v6e:4x4"
    with pytest.raises(ConfigError, match=re.escape("got generation; as in {generation: v6e")):
        Slice.of_fields({"generation": "v6e"})
