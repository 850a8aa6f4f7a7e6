"""The list of metrics, and the two ways in which it is shown."""

from dataclasses import replace
from typing import Any

import prometheus_client.parser
import pytest
import ray.util.metrics

from cluster.exposition import Exposition
from cluster.metrics import ENGINE_METRICS, ROUTER_METRICS
from cluster.openai.engine_client import EngineInfo
from cluster.ray_metrics import RayMetrics
from cluster.router_stats import RouterStats
from engine.stats import EngineStats


def engine_info(engine_id: str, **stats: Any) -> EngineInfo:
    info = EngineInfo(
        is_ready=True, engine_id=engine_id, epoch=2, page_size=16, stats=EngineStats(**stats)
    )
    info.stats.time_to_first_token_s.observe(0.02)
    info.stats.time_to_first_token_s.observe(1000.0)
    return info


def exposition(router_id: str, engines: list[EngineInfo]) -> dict[tuple[str, str], float]:
    """Values by name and the label that tells engines or routers apart."""
    stats = engines[0].stats + engines[1].stats if len(engines) == 2 else engines[0].stats
    fleet = replace(engines[0], engine_id="", stats=stats)
    text = Exposition("tiny", router_id).text(fleet, engines, RouterStats()).decode()
    values = {}
    for family in prometheus_client.parser.text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            key = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            values[sample.name, key] = sample.value
    return values


def test_no_two_metrics_have_a_series_in_common() -> None:
    names = [series for metric in (*ENGINE_METRICS, *ROUTER_METRICS) for series in metric.series]
    assert len(names) == len(set(names))


def test_every_series_of_the_list_is_shown_even_before_anything_has_happened() -> None:
    shown = {name for name, _ in exposition("r", [EngineInfo(is_ready=False, engine_id="e")])}
    listed = {series for metric in (*ENGINE_METRICS, *ROUTER_METRICS) for series in metric.series}
    assert shown == listed


def test_gauges_that_schedulers_read_are_the_fleets_and_counters_are_each_engines() -> None:
    engines = [
        engine_info("e1", num_running=2, num_waiting=5, generated_tokens_total=7),
        engine_info("e2", num_running=1, num_pages=8, num_pages_used=2, preemptions_total=3),
    ]
    shown = exposition("r", engines)
    assert shown["vllm:num_requests_running", ""] == 3
    assert shown["vllm:num_requests_waiting", ""] == 5
    assert shown["vllm:kv_cache_usage_perc", ""] == 0.25
    assert shown["vllm:generation_tokens_total", "engine=e1"] == 7
    assert shown["vllm:num_preemptions_total", "engine=e2"] == 3
    assert shown["vllm:cache_config_info", "block_size=16,engine=e2,num_gpu_blocks=8"] == 1
    assert shown["qwen_on_ray:engine_epoch", "engine=e2"] == 2


def test_routers_differ_in_nothing_but_what_is_their_own() -> None:
    engines = [engine_info("e1", steps_total=4), engine_info("e2")]
    one, other = exposition("r1", engines), exposition("r2", engines)
    own = {key for key in one if not key[1].startswith("router=") and ",router=" not in key[1]}
    assert {name for name, _ in own} == {s for metric in ENGINE_METRICS for s in metric.series}
    assert {key: one[key] for key in own} == {key: other[key] for key in own}
    assert not (one.keys() - own) & (other.keys() - own)


def test_a_histograms_buckets_count_all_that_lies_below() -> None:
    shown = exposition("r", [engine_info("e")])
    name = "vllm:time_to_first_token_seconds"
    assert shown[f"{name}_bucket", "engine=e,le=0.01"] == 0
    assert shown[f"{name}_bucket", "engine=e,le=0.025"] == 1
    assert shown[f"{name}_bucket", "engine=e,le=120.0"] == 1
    assert shown[f"{name}_bucket", "engine=e,le=+Inf"] == 2
    assert shown[f"{name}_count", "engine=e"] == 2
    assert shown[f"{name}_sum", "engine=e"] == pytest.approx(1000.02)


def test_ray_gets_every_series_under_names_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[tuple[str, str], float] = {}

    def record(gauge: ray.util.metrics.Gauge, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(gauge.info["tag_keys"])
        assert tags["model_name"] == "tiny"
        given[gauge.info["name"], tags.get("cause", tags.get("le", ""))] = value

    monkeypatch.setattr(ray.util.metrics.Gauge, "set", record)
    info = engine_info("e", steps_total=4)
    info.stats.restarts_total["silent"] = 2
    RayMetrics(ENGINE_METRICS, {"model_name": "tiny", "engine": "e"}).publish(info)
    RayMetrics(ROUTER_METRICS, {"model_name": "tiny", "router": "r"}).publish(RouterStats())
    listed = {series for metric in (*ENGINE_METRICS, *ROUTER_METRICS) for series in metric.series}
    assert {name for name, _ in given} == {series.replace(":", "_") for series in listed}
    assert given["qwen_on_ray_engine_steps_total", ""] == 4
    assert given["qwen_on_ray_engine_restarts_total", "silent"] == 2
    assert given["vllm_time_to_first_token_seconds_bucket", "+Inf"] == 2
