"""What a dashboard of panels is in Grafana's JSON: variables, links between dashboards, and from each panel to its runbooks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

RULES = Path(__file__).parents[1] / "deploy/observability/rules.yaml"
EVERY = ".*"  # what stands for a variable where all are chosen
_SOURCE = {"type": "prometheus", "uid": "$datasource"}
_WIDTH, _HEIGHT = 8, 7  # of a panel; a row of Grafana's grid is 24 wide
_METRIC = re.compile(r"\bwhaleflux_[a-z_]+?(?=_bucket\b|_count\b|[^a-z_]|$)|\bup\b")


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries`: PromQL -> legend. `unit` as Grafana names it."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "none"


@dataclass(frozen=True, slots=True)
class Choice:
    """A variable: the values of a label. `regex` takes the wanted part out of each."""

    name: str
    metric: str
    label: str
    regex: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """`metrics`: those that it looks at. `dashboard`: uid of the one that it names."""

    name: str
    metrics: frozenset[str]
    dashboard: str


def alerts() -> list[Alert]:
    """Those of deploy/observability/rules.yaml."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return [
        Alert(rule["alert"], metrics_of(rule["expr"]), rule["annotations"]["dashboard_url"].removeprefix("/d/"))
        for rule in rules
        if "alert" in rule
    ]


def metrics_of(query: str) -> frozenset[str]:
    """Names of what it asks for; of what a rule records the metric that is recorded."""
    return frozenset(_METRIC.findall(query))


def filled(query: str, window: str) -> str:
    """The query as it is asked where everything is chosen."""
    return re.sub(r"\$(?!__)\w+", EVERY, query.replace("$__rate_interval", window))


def page(uid: str, title: str, panels: tuple[Panel, ...], choices: tuple[Choice, ...]) -> str:
    """The dashboard as Grafana's JSON."""
    own = [alert for alert in alerts() if alert.dashboard == uid]
    whole = {
        "uid": uid,
        "title": title,
        "tags": ["whaleflux"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_firing(own)] if own else []},
        "links": [
            {
                "type": "dashboards", "title": "WhaleFlux", "tags": ["whaleflux"],
                "asDropdown": True, "keepTime": True, "includeVars": True,
            }
        ],
        "templating": {"list": [*_FIXED, *map(_variable, choices)]},
        "panels": [_panel(panel, place, own) for place, panel in enumerate(panels)],
    }  # fmt: skip
    return json.dumps(whole, indent=1) + "\n"


_FIXED: list[Mapping[str, object]] = [
    {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
    {  # where `make docs` puts them, once it is served
        "name": "runbooks", "type": "textbox", "label": "Runbooks below", "query": "http://localhost:8000/runbooks",
    },
]  # fmt: skip


def _variable(one: Choice) -> dict[str, object]:
    return {
        "name": one.name,
        "type": "query",
        "label": one.name.capitalize(),
        "datasource": _SOURCE,
        "query": f"label_values({one.metric}, {one.label})",
        "regex": one.regex,
        "refresh": 2,  # whenever the time range changes: sites and queues come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": EVERY,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _firing(own: list[Alert]) -> dict[str, object]:
    """Shown in each panel of the page, since when and until when."""
    names = "|".join(sorted(alert.name for alert in own))
    return {
        "name": "Alerts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": f'ALERTS{{alertstate="firing",alertname=~"{names}"}}',
        "titleFormat": "{{alertname}}",
    }


def _panel(panel: Panel, place: int, own: list[Alert]) -> dict[str, object]:
    across = 24 // _WIDTH
    shown = frozenset[str]().union(*map(metrics_of, panel.queries))
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "links": [
            {"title": f"Runbook: {alert.name}", "url": f"${{runbooks}}/{alert.name}/", "targetBlank": True}
            for alert in own
            if alert.metrics & shown
        ],
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": place % across * _WIDTH, "y": place // across * _HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {"fillOpacity": 8, "showPoints": "auto"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "expr": expr,
                "legendFormat": legend,
                "exemplar": "_bucket" in expr,
                "datasource": _SOURCE,
            }
            for at, (expr, legend) in enumerate(panel.queries.items())
        ],
    }
