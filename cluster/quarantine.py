"""Hosts that failed: how often, why, and until when they had better be left alone.

Kept in Ray's key-value store, so that all engines of a cluster know, and the next leader does. A
host that joins the cluster anew is another node, and starts without a record.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

_NAMESPACE = "qwen-on-ray-failed-hosts"
_FAILURES_TO_QUARANTINE = 2
_FORGOTTEN_AFTER_S = 1800.0
"""A failure that long ago counts no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """The failures of one host that still count.

    Attributes:
        name: For people.
        failed_at: Seconds since 1970, the latest last.
        reason: Of the latest.
    """

    name: str
    failed_at: tuple[float, ...]
    reason: str

    def quarantine_left_s(self, now: float, quarantine_s: float) -> float:
        """For how long it is left alone from `now` on; 0 if it may be taken."""
        if len(self._counted(now)) < _FAILURES_TO_QUARANTINE:
            return 0.0
        return max(0.0, self.failed_at[-1] + quarantine_s - now)

    def with_failure(self, now: float, reason: str) -> "HostRecord":
        failed_at = (*self._counted(now), now)
        return HostRecord(name=self.name, failed_at=failed_at, reason=reason)

    def is_forgotten(self, now: float) -> bool:
        return not self._counted(now)

    def _counted(self, now: float) -> Sequence[float]:
        return [at for at in self.failed_at if now - at < _FORGOTTEN_AFTER_S]


def record_failure(hosts: Mapping[str, str], reason: str) -> None:
    """Note that hosts failed.

    Args:
        hosts: What to call each of them, by node id.
    """
    now = time.time()
    for node_id, name in hosts.items():
        known = _read(node_id) or HostRecord(name=name, failed_at=(), reason="")
        record = json.dumps(asdict(known.with_failure(now, reason)))
        _internal_kv_put(node_id, record, overwrite=True, namespace=_NAMESPACE)


def read_quarantine(quarantine_s: float) -> dict[str, str]:
    """What to say of each node that is in quarantine, by node id."""
    now = time.time()
    notes = {}
    for key in _internal_kv_list("", namespace=_NAMESPACE):
        record = _read(key.decode())
        if record is None:
            continue
        if record.is_forgotten(now):
            _internal_kv_del(key, namespace=_NAMESPACE)
        elif (left_s := record.quarantine_left_s(now, quarantine_s)) > 0:
            # In steps, so that what is said changes once in a while and not all the time.
            notes[key.decode()] = (
                f"{record.name} failed {len(record.failed_at)} times and is left alone for "
                f"{_rounded_up(left_s)} s. Its last failure: {record.reason}"
            )
    return notes


def _rounded_up(seconds: float) -> int:
    return 30 * (int(seconds) // 30 + 1)


def _read(node_id: str) -> HostRecord | None:
    value = _internal_kv_get(node_id, namespace=_NAMESPACE)
    if value is None:
        return None
    fields = json.loads(value)
    return HostRecord(**{**fields, "failed_at": tuple(fields["failed_at"])})
