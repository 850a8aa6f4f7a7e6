"""Applications built for a cluster that there is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import serve_app
from engine.errors import CapacityError, ConfigError

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def read_args(path: Path) -> dict[str, Any]:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    return application["args"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_for_chips_that_the_cluster_lacks_says_so_before_anything_is_deployed(
    path: Path,
) -> None:
    args = read_args(path)
    if args["device"] == "cpu":
        assert serve_app.build(args)
        return
    with pytest.raises(CapacityError) as refusal:
        serve_app.build(args)
    message = str(refusal.value)
    assert f"{args['tp_size'] // args.get('nnodes', 1)} TPU chips" in message
    assert "this cluster has 0 TPU chips on 1 node" in message
    assert "`ray up`" in message
    assert "--device=cpu" in message


def test_an_http_address_among_the_args_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"port .* http_options"):
        serve_app.build({"model_path": "m", "port": 8000})
