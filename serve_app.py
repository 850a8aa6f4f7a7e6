"""The composition root: the Serve application of a YAML file, and the seed's command line.

`serve run configs/demo-cpu.yaml` calls `build` with the file's `args:`; `python -m serve_app` takes
the same names as flags, forms the cluster by itself and serves until it is interrupted.
"""

import logging
import math
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import ray
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.schema import ApplicationStatus, LoggingConfig

from cluster.autoscaling import engine_autoscaling, router_autoscaling
from cluster.cli import leave_no_key_in_the_process_list, parse_command_line
from cluster.needs import Need, need_of, resolve_device
from cluster.nodes import Cluster, read_cluster
from cluster.placement import check_capacity
from cluster.ray_node import LONGEST_STREAM_S
from cluster.rendezvous import form_cluster
from cluster.replica import Engine
from cluster.router import ROUTER_ENVIRONMENT, Router
from cluster.slices import count_gangs
from cluster.status import describe_start, failure_of, reason_of
from engine.config import EngineConfig, parse_config
from engine.errors import CapacityError, ConfigError, EngineError, QwenOnRayError

logger = logging.getLogger(__name__)

APP_NAME = "qwen"

# Leader and routers wait far more than they compute; a whole CPU each would not fit two cores.
_LEADER_CPUS = 0.2
_ROUTER_CPUS = 0.2
# Serve's own bound on requests in flight stands above ours, which answers in OpenAI's words.
_CALLS_ABOVE_OURS = 1.25
# The command line's one HTTP address is rank 0's, and may be a loopback address, which HAProxy
# could not reach on another host: routers bind what it names.
_ON_THE_HEAD = MappingProxyType({"node:__internal_head__": 0.001})
_LOGGING = LoggingConfig(enable_access_log=False)
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 5.0
_POLL_S = 0.5
# Asking costs the machine 40 ms each time, in this process, the controller and Ray's head.
_POLL_WHILE_SERVING_S = 5.0
_HTTP_FIELDS = ("host", "port", "http_host", "http_port")


def build(args: Mapping[str, Any]) -> serve.Application:
    """Make the application that a YAML file's `args:` describe.

    Args:
        args: Names and values of `EngineConfig`'s fields.

    Raises:
        ConfigError: With one line per fault.
        CapacityError: The cluster that this process has joined can never hold the model; naming
            what is needed, what there is and what to do.
    """
    for name in _HTTP_FIELDS:
        if name in args:
            raise ConfigError(
                f"{name} does not belong into args: HTTP's address stands in the YAML file's "
                "http_options (host, port)."
            )
    return _build(parse_config(args), router_resources={})


def _build(config: EngineConfig, router_resources: Mapping[str, float]) -> serve.Application:
    need, surge = None, Surge()
    if ray.is_initialized():
        # The leader asks again; said here, it is said once and before anything is downloaded.
        cluster = read_cluster()
        need = need_of(resolve_device(config, cluster))
        check_capacity(need, cluster)
        if router_resources:
            check_room_for_routers(cluster, router_resources, config.num_routers)
        surge = find_surge(config, need, cluster)
    fields = config.model_dump(exclude_unset=True)
    router = router_deployment(config, resources=router_resources, surge_percent=surge.routers)
    engine = engine_deployment(config, Engine, need=need, surge_percent=surge.engines)
    return router.bind(fields, engine.bind(fields))


@dataclass(frozen=True, slots=True)
class Surge:
    """How many replicas an update may start before it stops as many old ones, in percent.

    Without any, an old replica drains while its successor starts, or waits for what it holds.
    """

    engines: int = 0
    routers: int = 0


def find_surge(config: EngineConfig, need: Need, cluster: Cluster) -> Surge:
    """See what the cluster has to spare for an update; what waited for more would wait for ever."""
    num_engines = config.max_engines or config.num_engines
    num_routers = config.max_routers or config.num_routers
    spare = 0
    # On CPUs, another engine's memory is not counted by Ray.
    if need.device != "cpu":
        spare = count_gangs(need, cluster, cpus_beside=_LEADER_CPUS) - num_engines
    on_cpus = need.num_hosts * need.bundle.get("CPU", 0)
    # Each engine's leader has a successor beside it in any case.
    taken = num_engines * (on_cpus + 2 * _LEADER_CPUS) + 2 * num_routers * _ROUTER_CPUS
    return Surge(
        engines=max(0, min(100, 100 * spare // num_engines)),
        routers=100 if cluster.total("CPU") >= taken else 0,
    )


def check_room_for_routers(
    cluster: Cluster, resources: Mapping[str, float], num_routers: int
) -> None:
    """Check that a node with certain resources has CPUs, too; Serve would wait for one for ever.

    Raises:
        CapacityError: None has.
    """
    each = {"CPU": _ROUTER_CPUS, **resources}
    needed = {name: amount * num_routers for name, amount in each.items()}
    if not any(
        all(node.resources.get(name, 0) >= amount for name, amount in needed.items())
        for node in cluster.nodes
    ):
        raise CapacityError(
            f"The cluster's head has fewer than the {needed['CPU']:g} CPUs that --num-routers="
            f"{num_routers} takes there. Start the head with --num-cpus={math.ceil(needed['CPU'])} "
            "or more, or serve a YAML file with `serve run`, which puts routers on any node."
        )


def engine_deployment(
    config: EngineConfig, leader: type, *, need: Need | None = None, surge_percent: int = 0
) -> serve.Deployment:
    """Make the deployment of an engine's leader, `cluster.replica.Engine` or a stand-in for it.

    Args:
        need: What an engine needs of the cluster, which bounds the number of engines.
        surge_percent: As `Surge` has it.
    """
    number: dict[str, Any] = {"num_replicas": config.num_engines}
    if config.max_engines is not None:
        scaling = engine_autoscaling(config, need=need, cpus_per_leader=_LEADER_CPUS)
        number = {"autoscaling_config": scaling}
    return serve.deployment(
        name="Engine",
        **number,
        max_ongoing_requests=_max_calls(config),
        ray_actor_options={"num_cpus": _LEADER_CPUS},
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": "cluster.request_router.RouteFollower"}
        ),
        # A leader that is frozen holds its hosts until Serve has replaced it.
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        max_surge_percent=surge_percent,
    )(leader)


def router_deployment(
    config: EngineConfig,
    *,
    environment: Mapping[str, str] = MappingProxyType({}),
    resources: Mapping[str, float] = MappingProxyType({}),
    surge_percent: int = 0,
) -> serve.Deployment:
    """Make the deployment of the routers.

    Args:
        environment: Variables of the routers' processes, beside those that they need.
        resources: What a node must have for a router to be put there.
        surge_percent: As `Surge` has it.
    """
    variables = {**ROUTER_ENVIRONMENT, **environment}
    options = {
        "num_cpus": _ROUTER_CPUS,
        "resources": dict(resources),
        "runtime_env": {"env_vars": variables},
    }
    number: dict[str, Any] = {"num_replicas": config.num_routers}
    if config.max_routers is not None:
        number = {"autoscaling_config": router_autoscaling(config)}
    # Its decorators hide from type checkers what it has become.
    return cast(serve.Deployment, Router).options(
        max_ongoing_requests=_max_calls(config),
        ray_actor_options=options,
        # A router that is no longer needed stays until its streams have ended.
        graceful_shutdown_timeout_s=LONGEST_STREAM_S,
        max_surge_percent=surge_percent,
        **number,
    )


def _max_calls(config: EngineConfig) -> int:
    return int((config.max_running_requests + config.max_queued_requests) * _CALLS_ABOVE_OURS)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve what the command line says until SIGINT or SIGTERM; the exit status."""
    leave_no_key_in_the_process_list()
    command = parse_command_line(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=command.config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with form_cluster(command.config, stop) as membership:
            if membership.rank == 0:
                _serve_until(stop, command.config, command.host, command.port)
            else:
                membership.wait(stop)
    except QwenOnRayError as error:
        print(f"qwen-on-ray: {error}", file=sys.stderr)
        return 0 if stop.is_set() else 1
    return 0


def _serve_until(stop: threading.Event, config: EngineConfig, host: str, port: int) -> None:
    """Serve until `stop` is set or the application is gone.

    Raises:
        EngineError: The application could not be deployed; carries its own reason.
    """
    serve.start(
        # These are the controller's and the proxies'; the application's own are told below.
        http_options=HTTPOptions(host=host, port=port),
        logging_config=_LOGGING,
    )
    try:
        application = _build(config, router_resources=_ON_THE_HEAD)
        target = serve.RunTarget(
            target=application, name=APP_NAME, route_prefix="/", logging_config=_LOGGING
        )
        serve.run_many([target], wait_for_applications_running=False)
        is_said = False
        line = ""
        while not stop.wait(_POLL_WHILE_SERVING_S if is_said else _POLL_S):
            application_status = serve.status().applications.get(APP_NAME)
            if application_status is None:
                logger.info("The application is gone: it was shut down elsewhere.")
                return
            status = application_status.status
            if status == ApplicationStatus.DEPLOY_FAILED:
                reason = failure_of(APP_NAME) or reason_of(application_status)
                raise EngineError(f"{config.model_path} cannot be served. {reason}")
            if status == ApplicationStatus.RUNNING:
                if not is_said:
                    logger.info("Serving %s at http://%s:%d/v1", config.model_names[0], host, port)
                is_said = True
            elif (told := describe_start(APP_NAME)) != line:
                logger.info("Starting: %s", told)
                line = told
    finally:
        serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
