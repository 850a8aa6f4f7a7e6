"""A configuration that names its TPU slice: what that fills in, and what it refuses."""

from typing import Any

import pytest

from engine.config import EngineConfig, parse_config
from engine.errors import ConfigError


def config(**fields: Any) -> EngineConfig:
    return parse_config({"model_path": "m", **fields})


@pytest.mark.parametrize("tpu", ["v6e:4x4", {"generation": "v6e", "topology": "4x4"}])
def test_slice_says_device_devices_and_hosts(tpu: object) -> None:
    named = config(tpu=tpu)
    assert (named.device, named.tp_size, named.nnodes, named.chips_per_host) == ("tpu", 16, 4, 4)
    assert named == config(tpu=tpu, device="tpu", tp_size=16, nnodes=4)


def test_chip_of_two_devices_is_one_chip() -> None:
    named = config(tpu="v7x:2x2x2")
    assert (named.tp_size, named.nnodes, named.devices_per_host) == (16, 2, 8)
    assert named.chips_per_host == 4


def test_eight_chips_may_be_one_host_or_two() -> None:
    assert config(tpu="v6e:2x4").nnodes == 1
    assert config(tpu="v6e:2x4").chips_per_host == 8
    assert config(tpu="v6e:2x4", nnodes=2).chips_per_host == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tp_size": 8}, r"--tp-size=8 does not go with --tpu=v6e:4x4, which has 16 devices\."),
        ({"nnodes": 2}, r"--nnodes=2 does not go with --tpu=v6e:4x4, which has 4 hosts\. Leave"),
        ({"device": "cpu"}, r"--device=cpu does not go with --tpu=v6e:4x4, which is for TPUs"),
        ({"tpu": "v6e:2x4", "nnodes": 4}, r"which has 1 or 2 hosts"),
        ({"tpu": "v6e"}, r"--tpu: 'v6e' names no TPU slice.*as in v6e:2x2"),
        ({"tpu": {"topology": "4x4"}}, r"--tpu: a TPU slice has the keys generation and topology"),
    ],
)
def test_what_does_not_go_with_the_slice_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**{"tpu": "v6e:4x4", **fields})


def test_fields_that_were_set_make_the_same_configuration_again() -> None:
    named = config(tpu="v6e:4x4")
    assert parse_config(named.model_dump(exclude_unset=True)) == named
