"""How far an engine's start has come, readable by any process that has joined the same Ray.

A replica's own methods answer only after its constructor is done, which is too late to tell what it
waits for; so the replica writes here, and the quickstart and /health/ready read. Knows Ray's
key-value store, the names of its actors and what Serve says of a deployment, and no more of Ray.
"""

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.util
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from engine.step import StartProgress

if TYPE_CHECKING:
    # Importing it takes a second, and the quickstart shows progress before.
    from ray.serve.schema import ApplicationStatusOverview

_NAMESPACE = "qwen-on-ray-status"
_REFUSALS = "qwen-on-ray-refused-user-config"
_WRITE_PERIOD_S = 0.2
_OWN_ERROR = "\nengine.errors."


class StartStatus:
    """One replica's status; written through, at most five times a second while no phase begins.

    Args:
        app: Name of the Serve application.
        replica: Id of the replica, unique in the application.

    Attributes:
        epoch: Of the gang that starts or serves.
    """

    def __init__(self, app: str, replica: str) -> None:
        self._app = app
        self._key = f"{app}/{replica}"
        # None outside of actors, and in one without a name.
        self._actor: str | None = ray.get_runtime_context().get_actor_name() or None
        self._whole = StartProgress(phase="placement")
        self._ranks: dict[int, StartProgress] = {}
        self._written_s = 0.0
        self._phases: dict[int | None, str] = {}
        self.epoch = 1

    def update(self, progress: StartProgress) -> None:
        """Take in what a host or the gang reports; fit for a `ProgressCallback`."""
        if progress.rank is not None:
            self._ranks[progress.rank] = progress
        if progress.rank in (None, 0):
            self._whole = progress
        is_new_phase = progress.phase != self._phases.get(progress.rank)
        self._phases[progress.rank] = progress.phase
        is_told = is_new_phase or progress.done == progress.total
        if is_told or time.monotonic() - self._written_s > _WRITE_PERIOD_S:
            self._write()

    def ready(self) -> None:
        """Say that the engine serves."""
        self._whole = StartProgress(phase="ready")
        self._write()

    def failed(self, reason: str) -> None:
        """Say that the start failed, and why."""
        self._whole = StartProgress(phase="failed", note=reason)
        self._write()

    def forget_the_dead(self) -> None:
        """Forget the application's replicas that died without a chance to `clear`.

        What they wrote last, perhaps that they are ready, would be read as the state of things.
        """
        living = living_actors()
        for replica, status in read_all(self._app).items():
            if status["actor"] is not None and status["actor"] not in living:
                _internal_kv_del(f"{self._app}/{replica}", namespace=_NAMESPACE)

    def clear(self) -> None:
        """Forget this replica."""
        _internal_kv_del(self._key, namespace=_NAMESPACE)

    def _write(self) -> None:
        self._written_s = time.monotonic()
        status = {
            **_as_json(self._whole),
            "ranks": [_as_json(self._ranks[rank]) for rank in sorted(self._ranks)],
            "epoch": self.epoch,
            "actor": self._actor,
            "time": time.time(),
        }
        _internal_kv_put(self._key, json.dumps(status), overwrite=True, namespace=_NAMESPACE)


def read_all(app: str) -> dict[str, dict[str, Any]]:
    """Status of each replica of an application, by replica id.

    Returns:
        Values {phase, done, total, note, ranks: [{rank, phase, done, total, note}], epoch, actor,
        time}, where phase is one of `StartProgress`'s, or ready, or failed; actor is the replica's
        name.
    """
    statuses = {}
    for key in _internal_kv_list(f"{app}/", namespace=_NAMESPACE):
        value = _internal_kv_get(key, namespace=_NAMESPACE)
        if value is not None:
            statuses[key.decode().partition("/")[2]] = json.loads(value)
    return statuses


def living_actors() -> set[str]:
    """Names of the actors that live, in all of Ray's namespaces."""
    actors = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
    return {actor["name"] for actor in actors}


def tell_user_config(app: str, replica: str, refusal: str | None) -> None:
    """Write down why a replica refused its user_config; None if it took it."""
    if refusal is None:
        _internal_kv_del(f"{app}/{replica}", namespace=_REFUSALS)
    else:
        _internal_kv_put(f"{app}/{replica}", refusal, overwrite=True, namespace=_REFUSALS)


def read_refusals(app: str) -> dict[str, str]:
    """Why replicas of an application refused their user_config, by replica id; dead ones too."""
    refusals = {}
    for key in _internal_kv_list(f"{app}/", namespace=_REFUSALS):
        value = _internal_kv_get(key, namespace=_REFUSALS)
        if value is not None:
            refusals[key.decode().partition("/")[2]] = value.decode()
    return refusals


def describe_start(app: str) -> str:
    """Say in a line how far the latest replica of an application has come."""
    latest = _latest(app)
    return describe_progress(latest) if latest else "waiting for a place for the engine's leader"


def failure_of(app: str) -> str | None:
    """Why the latest replica of an application failed; None if it has not."""
    latest = _latest(app)
    return latest["note"] if latest and latest["phase"] == "failed" else None


def describe_progress(progress: Mapping[str, Any]) -> str:
    """Put progress in words, as in "compile 7 of 12: 8 decodes"."""
    words = str(progress["phase"])
    if progress["total"]:
        words += f" {progress['done']} of {progress['total']}"
    return f"{words}: {progress['note']}" if progress["note"] else words


def reason_of(application: "ApplicationStatusOverview") -> str:
    """Why an application could not be deployed, where it was not the engine that failed.

    Such as a router that could not read its tokenizer. An error of ours says in its last line what
    to do; of others the traceback may be of use.
    """
    reasons = []
    for deployment in application.deployments.values():
        if deployment.status.value == "DEPLOY_FAILED":
            _, is_own, own = deployment.message.rpartition(_OWN_ERROR)
            reasons.append(own.partition(": ")[2] if is_own else deployment.message)
    return "\n".join(reason.strip() for reason in reasons) or application.message


def _latest(app: str) -> dict[str, Any] | None:
    return max(read_all(app).values(), key=lambda replica: replica["time"], default=None)


def _as_json(progress: StartProgress) -> dict[str, Any]:
    whole = {
        "phase": progress.phase,
        "done": progress.done,
        "total": progress.total,
        "note": progress.note,
    }
    return whole if progress.rank is None else {"rank": progress.rank, **whole}
