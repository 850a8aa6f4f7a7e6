import pytest

from engine.errors import ConfigError
from engine.topology import Slice


@pytest.mark.parametrize(
    ("name", "said"),
    [("v9:2x2", "v9"), ("v6e:4", "v6e:2x2"), ("v7x:2x2", "v7x:2x2x1"), ("v6e", "v6e:2x2")],
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
