"""Memory and open files of a cluster's processes over time: which of them grew while they lived."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
from processes import descendants

# A title's beginning and a part of it, by what the process is.
ROLES = {
    "router": ("ray::ServeReplica", ":Router"),
    "leader": ("ray::ServeReplica", ":Engine"),
    "rank": ("ray::HostWorker", ""),
    "controller": ("ray::ServeController", ""),
    "proxy actor": ("ray::ProxyActor", ""),
    "HAProxy's manager": ("ray::HAProxyManager", ""),
}
MIN_SAMPLES = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at one moment."""

    at_s: float
    rss_mb: float
    num_files: int


@dataclass(frozen=True, slots=True)
class Growth:
    """What became of a process in its life: medians of the first third of it and of the last.

    Attributes:
        is_judged: It lived long enough to say.
    """

    role: str
    pid: int
    life_s: float
    rss_mb: tuple[float, float]
    num_files: tuple[float, float]
    is_judged: bool

    @property
    def rss_growth_mb(self) -> float:
        return self.rss_mb[1] - self.rss_mb[0]

    @property
    def files_growth(self) -> float:
        return self.num_files[1] - self.num_files[0]


@dataclass(slots=True)
class ProcessSizes:
    """Samples of every process that has a role, for as long as it lives."""

    samples: dict[psutil.Process, list[Sample]] = field(default_factory=dict)
    roles: dict[psutil.Process, str] = field(default_factory=dict)

    def take(self) -> None:
        """Look at all processes once."""
        now_s = time.monotonic()
        for process in descendants():
            try:
                if process not in self.roles:
                    # A worker gets its title only once it is somebody.
                    role = role_of(" ".join(process.cmdline()))
                    if role is None:
                        continue
                    self.roles[process] = role
                sample = Sample(now_s, process.memory_info().rss / 1e6, process.num_fds())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self.samples.setdefault(process, []).append(sample)

    def latest_mb(self) -> Mapping[str, float]:
        """Memory of each role's living processes together."""
        total: dict[str, float] = {}
        last_s = max((samples[-1].at_s for samples in self.samples.values()), default=0.0)
        for process, samples in self.samples.items():
            if samples[-1].at_s == last_s:
                role = self.roles[process]
                total[role] = total.get(role, 0.0) + samples[-1].rss_mb
        return total

    def growths(self, *, least_life_s: float) -> list[Growth]:
        """What became of each process, those that lived longest first."""
        found = []
        for process, samples in self.samples.items():
            life_s = samples[-1].at_s - samples[0].at_s
            third = max(1, len(samples) // 3)
            first, last = samples[:third], samples[-third:]
            found.append(
                Growth(
                    role=self.roles[process],
                    pid=process.pid,
                    life_s=life_s,
                    rss_mb=(_median_mb(first), _median_mb(last)),
                    num_files=(_median_files(first), _median_files(last)),
                    is_judged=life_s >= least_life_s and len(samples) >= MIN_SAMPLES,
                )
            )
        return sorted(found, key=lambda growth: -growth.life_s)


def role_of(title: str) -> str | None:
    for role, (start, part) in ROLES.items():
        if title.startswith(start) and part in title:
            return role
    if "haproxy" in title.split(" ")[0].lower():
        return "HAProxy"
    return None


def _median_mb(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.rss_mb for sample in samples)


def _median_files(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.num_files for sample in samples)
