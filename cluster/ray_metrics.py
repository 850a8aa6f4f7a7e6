"""The same metrics given to Ray, which shows them on each node, and which its dashboard reads.

They have to come from the Serve replica's own process: Ray labels each series with it, and its
"Serve LLM" dashboard looks the replica up by that label.

Every series is one of Ray's gauges, whatever its kind, because the counting is done already: Ray's
histograms would take one figure at a time, a call for every token, and its counters show nothing
until they leave 0. PromQL reads names, not kinds.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Generic

import ray.util.metrics

from cluster.metrics import Metric, S, ray_name

PERIOD_S = 2.0


class RayMetrics(Generic[S]):
    """A process's metrics in Ray.

    Args:
        metrics: The list.
        labels: Of every series; Ray's dashboard asks for `model_name`.
    """

    def __init__(self, metrics: Sequence[Metric[S]], labels: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._labels = dict(labels)
        self._gauges: dict[str, ray.util.metrics.Gauge] = {}

    async def publish_for_ever(self, read: Callable[[], S]) -> None:
        """Publish what `read` gives, every few seconds, until cancelled."""
        while True:
            self.publish(read())
            await asyncio.sleep(PERIOD_S)

    def publish(self, source: S) -> None:
        """Give Ray the figures as they are."""
        for metric in self._metrics:
            for series, labels, value in metric.samples(source):
                gauge = self._gauges.get(series)
                if gauge is None:
                    gauge = self._gauges[series] = ray.util.metrics.Gauge(
                        ray_name(series).removeprefix("ray_"),
                        metric.help_text,
                        tag_keys=(*self._labels, *labels),
                    )
                gauge.set(value, {**self._labels, **labels})
