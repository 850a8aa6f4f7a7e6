"""What Serve's `user_config` may change of a deployment while it runs.

A user_config is laid over the `args:` and checked as they are, so that a name means the same in
both; what it leaves out is as the args have it. Of settings it knows the log level alone.
"""

import difflib
import logging
from collections.abc import Awaitable, Callable, Mapping, Set

from cluster.serve_log import log_into_serve
from cluster.status import tell_user_config
from engine.config import EngineConfig, parse_config
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

API_KEYS_REVISION = "api_keys_revision"
"""Not a setting: any value, of which a change has the file of API keys read again."""

ROUTER_SETTINGS = frozenset(
    ("api_key_file", "log_level", "max_queued_requests", "max_queued_tokens", API_KEYS_REVISION)
)
ENGINE_SETTINGS = frozenset(("log_level",))


class UserConfig:
    """What one replica goes by; made with the replica, whose log it opens.

    Args:
        config: The args.
        deployment: Its name, for errors.
        settings: What may stand in its user_config.
        replica: Application and id.

    Attributes:
        is_in_service: Whether the replica has served; to be set by it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        deployment: str,
        settings: Set[str],
        replica: tuple[str, str],
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._settings = settings
        self._replica = replica
        self.is_in_service = False
        log_into_serve(_chosen_log_level(config))

    async def take(
        self,
        user_config: object,
        change: Callable[[EngineConfig], Awaitable[None]] | None = None,
    ) -> None:
        """Go by a user_config from here on, or as before if it is at fault.

        Args:
            user_config: As Serve hands it over.
            change: Puts the settings into force, all or none.

        Raises:
            ConfigError: It is at fault, and the replica has not served so far. One that serves
                says so in its log and in `qwen-on-ray status`: Serve would stop it if it raised.
        """
        try:
            config = lay_over(
                self._config, user_config, deployment=self._deployment, settings=self._settings
            )
            if change is not None:
                await change(config)
        except ConfigError as error:
            if not self.is_in_service:
                raise
            logger.error("%s Nothing was changed.", error)
            tell_user_config(*self._replica, str(error))
            return
        tell_user_config(*self._replica, None)
        log_into_serve(_chosen_log_level(config))
        logger.info("The user_config holds from here on: %s", user_config)


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


def _chosen_log_level(config: EngineConfig) -> str | None:
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
