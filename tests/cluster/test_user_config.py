"""A user_config laid over the args: what may change while a deployment runs, and what is said."""

from typing import Any

import pytest

from cluster.user_config import ENGINE_SETTINGS, ROUTER_SETTINGS, lay_over
from engine.config import parse_config
from engine.errors import ConfigError

ARGS = {"model_path": "m", "max_queued_requests": 100, "max_queued_tokens": 5000}


def lay_over_router(user_config: object) -> Any:
    return lay_over(parse_config(ARGS), user_config, deployment="Router", settings=ROUTER_SETTINGS)


def test_what_a_user_config_leaves_out_is_as_the_args_have_it() -> None:
    changed = lay_over_router({"max_queued_requests": 7, "log_level": "debug"})
    assert (changed.max_queued_requests, changed.max_queued_tokens) == (7, 5000)
    assert changed.log_level == "debug"
    back = lay_over_router({"api_keys_revision": 2})
    assert (back.max_queued_requests, back.log_level) == (100, "info")


@pytest.mark.parametrize(
    ("user_config", "message"),
    [
        ({"max_queued_request": 7}, r"unknown name max_queued_request\. Did you mean max_queued_"),
        ({"max_queued_requests": 0}, r"user_config of Router: --max-queued-requests=0: .* 1"),
        ({"log_level": "loud"}, r"--log-level='loud'"),
        ({"tp_size": 2}, r"tp_size cannot be changed while .* Set it in the args"),
        ({"max_queued_requests": 101}, r"max_queued_requests=101 is above the args' 100"),
        (["log_level"], r"it has to be a mapping"),
    ],
)
def test_a_user_config_at_fault_names_what_is_wrong_with_it(
    user_config: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_over_router(user_config)


def test_each_deployment_has_settings_of_its_own() -> None:
    config = parse_config(ARGS)
    changed = lay_over(
        config, {"log_level": "warning"}, deployment="Engine", settings=ENGINE_SETTINGS
    )
    assert changed.log_level == "warning"
    with pytest.raises(ConfigError, match=r"user_config of Engine: max_queued_requests cannot"):
        lay_over(config, {"max_queued_requests": 7}, deployment="Engine", settings=ENGINE_SETTINGS)
