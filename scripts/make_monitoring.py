"""Writes the Grafana dashboard and the table in docs/monitoring.md; --check only compares them.

Panels are listed here in a line or two each; what Grafana wants around them is the same for all.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.metrics import ENGINE_METRICS, ROUTER_METRICS, ray_name

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "configs" / "grafana" / "qwen-on-ray.json"
PAGE = ROOT / "docs" / "monitoring.md"
TABLE_BEGIN, TABLE_END = "<!-- table of metrics: begin -->\n", "<!-- table of metrics: end -->\n"

_MODEL = 'model_name=~"$model_name"'
_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT = 24, 8, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A graph.

    Attributes:
        queries: PromQL by legend.
        unit: As Grafana names it.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    is_stacked: bool = False


def _rate(name: str, by: str, labels: str = "") -> str:
    return f"sum by ({by}) (rate({ray_name(name)}{{{_MODEL}{labels}}}[$__rate_interval]))"


def _quantiles(name: str, *quantiles: float) -> dict[str, str]:
    series = ray_name(f"{name}_bucket")
    return {
        f"p{quantile * 100:g}": f"histogram_quantile({quantile}, "
        f"sum by (le) (rate({series}{{{_MODEL}}}[$__rate_interval])))"
        for quantile in quantiles
    }


def _now(name: str, by: str) -> str:
    return f"sum by ({by}) ({ray_name(name)}{{{_MODEL}}})"


_PER_STEP = f" / ignoring (part) group_left {_rate('qwen_on_ray:engine_steps_total', 'engine')}"

ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            title="Requests by HTTP status",
            queries={"{{status}}": _rate("qwen_on_ray:router_requests_total", "status")},
            unit="reqps",
            is_stacked=True,
        ),
        Panel(
            title="Tokens",
            queries={
                "prompt": _rate("vllm:prompt_tokens_total", "model_name"),
                "generated": _rate("vllm:generation_tokens_total", "model_name"),
            },
            unit="short",
        ),
        Panel(
            title="Choices that ended, by how",
            queries={
                "{{finished_reason}}": _rate("qwen_on_ray:router_choices_total", "finished_reason")
            },
            is_stacked=True,
        ),
    ],
    "Latency, as routers see it": [
        Panel(
            title="Time to first token",
            queries=_quantiles("qwen_on_ray:router_time_to_first_token_seconds", 0.5, 0.9, 0.99),
            unit="s",
        ),
        Panel(
            title="Between tokens",
            queries=_quantiles("qwen_on_ray:router_inter_token_latency_seconds", 0.5, 0.9, 0.99),
            unit="s",
        ),
        Panel(
            title="Whole requests",
            queries=_quantiles("qwen_on_ray:router_request_latency_seconds", 0.5, 0.9, 0.99),
            unit="s",
        ),
    ],
    "Queue": [
        Panel(
            title="Time in an engine's queue",
            queries=_quantiles("vllm:request_queue_time_seconds", 0.5, 0.9, 0.99),
            unit="s",
        ),
        Panel(
            title="Sequences in engines",
            queries={
                "running {{engine}}": _now("qwen_on_ray:engine_requests_running", "engine"),
                "waiting {{engine}}": _now("qwen_on_ray:engine_requests_waiting", "engine"),
            },
        ),
        Panel(
            title="Choices in routers",
            queries={
                "running {{router}}": _now("qwen_on_ray:router_choices_running", "router"),
                "waiting {{router}}": _now("qwen_on_ray:router_choices_waiting", "router"),
            },
        ),
    ],
    "Engine steps": [
        Panel(
            title="Time of a step, by part",
            queries={
                "{{part}} {{engine}}": _rate(
                    "qwen_on_ray:engine_step_seconds_total", "engine, part"
                )
                + _PER_STEP
            },
            unit="s",
        ),
        Panel(
            title="Share of computed rows that is padding",
            queries={
                "{{engine}}": _rate("qwen_on_ray:engine_padding_tokens_total", "engine")
                + f" / ({_rate('qwen_on_ray:engine_padding_tokens_total', 'engine')}"
                + f" + {_rate('qwen_on_ray:engine_scheduled_tokens_total', 'engine')})"
            },
            unit="percentunit",
        ),
        Panel(
            title="Programs compiled while serving (a fault)",
            queries={"{{engine}}": _now("qwen_on_ray:engine_compiles_total", "engine")},
        ),
        Panel(
            title="Steps per second",
            queries={"{{engine}}": _rate("qwen_on_ray:engine_steps_total", "engine")},
        ),
        Panel(
            title="Tokens of a step",
            queries=_quantiles("vllm:iteration_tokens_total", 0.5, 0.99),
        ),
        Panel(
            title="Where a sequence's time goes",
            queries={
                part: _rate(f"vllm:request_{part}_time_seconds_sum", "model_name")
                for part in ("queue", "prefill", "decode")
            },
            unit="s",
            is_stacked=True,
        ),
    ],
    "Cache and pages": [
        Panel(
            title="Pages in use",
            queries={
                "{{engine}}": f"{_now('qwen_on_ray:engine_pages_used', 'engine')} / "
                f"{_now('qwen_on_ray:engine_pages', 'engine')}"
            },
            unit="percentunit",
        ),
        Panel(
            title="Prompt tokens that were cached",
            queries={
                "{{engine}}": f"{_rate('vllm:prefix_cache_hits_total', 'engine')} / "
                f"{_rate('vllm:prefix_cache_queries_total', 'engine')}"
            },
            unit="percentunit",
        ),
        Panel(
            title="Preemptions",
            queries={"{{engine}}": _rate("vllm:num_preemptions_total", "engine")},
        ),
    ],
    "Hosts, epochs, restarts": [
        Panel(
            title="Engines that serve",
            queries={"{{engine}}": _now("qwen_on_ray:engine_up", "engine")},
            is_stacked=True,
        ),
        Panel(
            title="Epoch",
            queries={"{{engine}}": _now("qwen_on_ray:engine_epoch", "engine")},
        ),
        Panel(
            title="Restarts in the last hour, by cause",
            queries={
                "{{cause}} {{engine}}": "sum by (engine, cause) (increase("
                f"{ray_name('qwen_on_ray:engine_restarts_total')}{{{_MODEL}}}[1h]))"
            },
        ),
        Panel(
            title="Requests that moved to another engine",
            queries={
                "to {{engine}}": _rate("qwen_on_ray:engine_requests_moved_total", "engine"),
            },
        ),
    ],
}


def render_dashboard() -> str:
    panels = list(_panels())
    dashboard = {
        "uid": "qwen-on-ray",
        "title": "qwen-on-ray",
        "tags": ["qwen-on-ray", "ray"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
    }


def _model_variable() -> dict[str, Any]:
    query = f"label_values({ray_name('qwen_on_ray:engine_up')}, model_name)"
    return {
        "name": "model_name",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": "model_name"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> Iterator[dict[str, Any]]:
    panel_id, top = 1, 0
    for row, panels in ROWS.items():
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": panel_id, "type": "row", "title": row, "gridPos": place, "panels": []}
        panel_id, top = panel_id + 1, top + 1
        for index, panel in enumerate(panels):
            per_line = _COLUMNS // _PANEL_WIDTH
            yield _graph(
                panel,
                panel_id,
                x=index % per_line * _PANEL_WIDTH,
                y=top + index // per_line * _PANEL_HEIGHT,
            )
            panel_id += 1
        top += -(-len(panels) * _PANEL_WIDTH // _COLUMNS) * _PANEL_HEIGHT


def _graph(panel: Panel, panel_id: int, *, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": _PANEL_WIDTH, "h": _PANEL_HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "fillOpacity": 10,
                    "stacking": {"mode": "normal" if panel.is_stacked else "none"},
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def render_page() -> str:
    head, begin, rest = PAGE.read_text().partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    return head + begin + _table() + end + tail


def _table() -> str:
    lines = ["| name at `/metrics` | kind | labels | what it says |", "|---|---|---|---|"]
    for metrics, whose in ((ENGINE_METRICS, "engine"), (ROUTER_METRICS, "router")):
        for metric in metrics:
            name = metric.series[0] if metric.kind == "counter" else metric.name
            labels = [] if metric.is_of_fleet else [whose]
            labels += [metric.label] if metric.label else []
            shown = ", ".join(f"`{label}`" for label in labels)
            lines.append(f"| `{name}` | {metric.kind} | {shown} | {metric.help_text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if outdated")
    is_check = parser.parse_args().check
    outdated = []
    for path, render in ((DASHBOARD, render_dashboard), (PAGE, render_page)):
        text = render()
        if is_check and path.read_text() != text:
            outdated.append(str(path.relative_to(ROOT)))
        elif not is_check:
            path.write_text(text)
    if outdated:
        print(
            f"{' and '.join(outdated)}: out of date. Run scripts/make_monitoring.py and commit "
            "what it writes."
        )
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
