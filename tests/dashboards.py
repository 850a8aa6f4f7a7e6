"""The PromQL of Grafana dashboards, with their variables filled in."""

import json
import re
from pathlib import Path

import yaml
from ray.dashboard.modules.metrics.dashboards import serve_llm_dashboard_panels

CONFIGS = Path(__file__).parents[1] / "configs"
WINDOW = "60s"


def own_expressions() -> list[str]:
    """Of every panel of our dashboard."""
    dashboard = json.loads((CONFIGS / "grafana" / "qwen-on-ray.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [_filled(target["expr"]) for target in targets]


def alert_expressions() -> dict[str, str]:
    """Of every alert rule, by its name."""
    groups = yaml.safe_load((CONFIGS / "prometheus" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def ray_expressions() -> list[str]:
    """Of every panel of Ray's own dashboard for LLMs that Serve serves."""
    config = serve_llm_dashboard_panels.serve_llm_dashboard_config
    panels = [panel for row in config.rows or [] for panel in row.panels]
    return [
        _filled(target.expr.format(global_filters=""))
        for panel in panels
        for target in panel.targets
    ]


def series_in(expression: str) -> set[str]:
    """Names of series that an expression reads, of those that this project could give."""
    return set(re.findall(r"\b(?:ray_)?(?:vllm|qwen_on_ray)[:_]\w+", expression))


def _filled(expression: str) -> str:
    expression = re.sub(r"\$(__rate_interval|interval)", WINDOW, expression)
    return re.sub(r"\$\w+", ".*", expression)
