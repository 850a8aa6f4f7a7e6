"""The metrics of a router's `/metrics`, in Prometheus' text format.

A scrape behind a load balancer meets any router, so all show the same of the engines, within the
second in which each asks them. Counters are told apart by `engine`, as in vLLM: a sum would fall
when an engine goes, and differ between routers that have seen engines come and go and those that
have not. What is a router's own has the label `router`.
"""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import generate_latest
from prometheus_client import metrics_core as families
from prometheus_client.registry import Collector

from cluster.metrics import ENGINE_METRICS, ROUTER_METRICS, Metric, S
from cluster.openai.engine_client import EngineInfo
from cluster.router_stats import RouterStats


class _Collected(Collector):
    """What was collected before, as prometheus_client wants it."""

    def __init__(self, collected: Iterable[families.Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[families.Metric]:
        return self._collected


class Exposition:
    """What one router shows.

    Args:
        model_name: A label of every series.
        router_id: A label of this router's own.
    """

    def __init__(self, model_name: str, router_id: str) -> None:
        self._model_name = model_name
        self._router_id = router_id

    def text(self, fleet: EngineInfo, engines: Sequence[EngineInfo], router: RouterStats) -> bytes:
        """Put figures in Prometheus' text format.

        Args:
            fleet: Of all engines together.
            engines: Of each.
            router: This router's own.
        """
        model = {"model_name": self._model_name}
        by_engine = [({**model, "engine": info.engine_id}, info) for info in engines]
        own = {**model, "router": self._router_id}
        collected = [
            _family(metric, [(model, fleet)] if metric.is_of_fleet else by_engine)
            for metric in ENGINE_METRICS
        ]
        collected += [_family(metric, [(own, router)]) for metric in ROUTER_METRICS]
        return generate_latest(_Collected(collected))


def _family(metric: Metric[S], sources: Sequence[tuple[Mapping[str, str], S]]) -> families.Metric:
    kind = "gauge" if metric.kind == "info" else metric.kind
    family = families.Metric(metric.name, metric.help_text, kind)
    for labels, source in sources:
        for series, own_labels, value in metric.samples(source):
            family.add_sample(series, {**labels, **own_labels}, value)
    return family
