"""What a gang of hosts asks of a cluster: how many bundles, each of which resources.

Knows resources by their names in Ray, and no node that has them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.nodes import Cluster
from engine.config import EngineConfig
from engine.tpu_slice import Slice

CPUS_PER_HOST_PROCESS = 0.5
"""On CPU hosts: a claim small enough that router, leader and two hosts fit a laptop's two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a gang asks for: `num_hosts` bundles, each of `bundle`.

    Attributes:
        tpu: The slice that the hosts must be, where the configuration names one.
    """

    device: str
    num_hosts: int
    bundle: Mapping[str, float]
    tpu: Slice | None = None

    @property
    def resource(self) -> str:
        return {"tpu": "TPU", "gpu": "GPU", "cpu": "CPU"}[self.device]

    @property
    def device_words(self) -> str:
        return {"tpu": "TPU chips", "gpu": "GPUs", "cpu": "CPUs"}[self.device]

    def num_bundles_in(self, resources: Mapping[str, float]) -> int:
        """How many of the bundles these resources hold."""
        return min(
            math.floor(resources.get(name, 0) / amount + 1e-6)
            for name, amount in self.bundle.items()
        )

    def __str__(self) -> str:
        amount = self.bundle[self.resource]
        hosts = "1 host" if self.num_hosts == 1 else f"{self.num_hosts} hosts"
        text = f"{hosts} with {amount:g} {self.device_words}{' each' * (self.num_hosts > 1)}"
        if self.tpu is not None:
            text += f" (one slice {self.tpu})"
        elif self.device == "tpu" and self.num_hosts > 1:
            text += f" (one slice of {amount * self.num_hosts:g} chips)"
        return text


def resolve_device(config: EngineConfig, cluster: Cluster) -> EngineConfig:
    """Replace device "auto" by what the cluster has, or may get from its autoscaler."""
    if config.device != "auto":
        return config
    for device, resource in (("tpu", "TPU"), ("gpu", "GPU")):
        if cluster.total(resource) + cluster.maxima.get(resource, 0) > 0:
            return config.model_copy(update={"device": device})
    return config.model_copy(update={"device": "cpu"})


def need_of(config: EngineConfig) -> Need:
    """What `config`, its device resolved, asks of the cluster."""
    bundle = {
        "tpu": {"TPU": float(config.chips_per_host), "CPU": 1.0},
        "gpu": {"GPU": float(config.devices_per_host), "CPU": 1.0},
        "cpu": {"CPU": CPUS_PER_HOST_PROCESS},
    }[config.device]
    return Need(device=config.device, num_hosts=config.nnodes, bundle=bundle, tpu=config.tpu_slice)
