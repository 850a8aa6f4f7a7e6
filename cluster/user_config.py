"""What Serve's `user_config` may change of a deployment while it runs.

A user_config is laid over the `args:` and checked as they are, so that a name means the same in
both; what it leaves out is as the args have it. Knows neither Ray nor what a setting does.
"""

import difflib
from collections.abc import Mapping, Set

from engine.config import EngineConfig, parse_config
from engine.errors import ConfigError

API_KEYS_REVISION = "api_keys_revision"
"""Not a setting: any value, of which a change has the file of API keys read again."""

ROUTER_SETTINGS = frozenset(
    ("api_key_file", "log_level", "max_queued_requests", "max_queued_tokens", API_KEYS_REVISION)
)
ENGINE_SETTINGS = frozenset(("log_level",))


def lay_over(
    config: EngineConfig, user_config: object, *, deployment: str, settings: Set[str]
) -> EngineConfig:
    """Lay a deployment's user_config over its args.

    Args:
        config: The args.
        user_config: As Serve hands it over: whatever stands in the YAML file.
        deployment: Its name, for errors.
        settings: What may stand in it.

    Raises:
        ConfigError: It names what cannot be changed while the deployment runs, or a value that
            does not do; with one line per fault.
    """
    where = f"user_config of {deployment}"
    if not isinstance(user_config, Mapping):
        raise ConfigError(
            f"{where} is {user_config!r}; it has to be a mapping. Allowed: {_names(settings)}."
        )
    unknown = sorted(str(name) for name in user_config.keys() - settings)
    if unknown:
        raise ConfigError("\n".join(_explain(name, where, settings) for name in unknown))
    changes = {name: value for name, value in user_config.items() if name != API_KEYS_REVISION}
    try:
        changed = parse_config({**config.model_dump(exclude_unset=True), **changes})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if changed.max_queued_requests > config.max_queued_requests:
        raise ConfigError(
            f"{where}: max_queued_requests={changed.max_queued_requests} is above the args' "
            f"{config.max_queued_requests}, which Serve's own limit on requests stands on and no "
            "user_config changes. Name at most that, or raise max_queued_requests in the args, "
            "which restarts the deployments."
        )
    return changed


def chosen_log_level(config: EngineConfig) -> str | None:
    """The level of this project's lines; None if nothing but Serve's logging_config says one."""
    return config.log_level if "log_level" in config.model_fields_set else None


def _explain(name: str, where: str, settings: Set[str]) -> str:
    if name in EngineConfig.model_fields:
        return (
            f"{where}: {name} cannot be changed while the deployment runs. Set it in the args, "
            f"which restarts the deployments. Allowed here: {_names(settings)}."
        )
    near = difflib.get_close_matches(name, settings, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{where}: unknown name {name}.{hint} Allowed: {_names(settings)}."


def _names(settings: Set[str]) -> str:
    return ", ".join(sorted(settings))
