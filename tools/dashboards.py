"""Grafana's dashboards, from one table: `make generate` writes deploy/observability/grafana/dashboards/*.json."""

from __future__ import annotations

import json
from dataclasses import dataclass

_SOURCE = {"type": "prometheus", "uid": "$datasource"}
_WIDTH, _HEIGHT = 8, 7  # of a panel; a row of Grafana's grid is 24 wide


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries`: PromQL -> legend. `unit` as Grafana names it."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "none"


def _quantiles(metric: str, by: str = "") -> dict[str, str]:
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return {
        f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))": f"{legend}{name}"
        for q, name in (("0.5", "half"), ("0.99", "99 %"))
    }


_JOBS = Panel(
    "Jobs by state", "As the scheduler that leads counts them.", {"max by (state) (whaleflux_jobs)": "{{state}}"}
)
_NODES = Panel(
    "Nodes by phase",
    "As the health monitor judges them.",
    {"sum by (phase) (max by (site, phase) (whaleflux_nodes))": "{{phase}}"},
)
_HELD = Panel(
    "GPUs held",
    "Of those that take work, all types together.",
    {"cluster:whaleflux_gpus:allocated_ratio": "held"},
    "percentunit",
)
_WAITING = Panel(
    "Waiting", "Items in each queue inside of the services.", {"max by (queue) (whaleflux_queue_depth)": "{{queue}}"}
)
_SPENT = Panel(
    "Spending of the last 24 hours by class",
    "Millionths of a dollar in the usage ledger, by what they went into.",
    {"max by (cost_class) (whaleflux_spending_micros)": "{{cost_class}}"},
    "short",
)
_REPLICAS = Panel("Replicas by state", "Of all models.", {"max by (state) (whaleflux_replicas)": "{{state}}"})
_UP = Panel("Targets that answer", "Of those that Prometheus scrapes.", {"sum by (service) (up)": "{{service}}"})
_RECOVERED = Panel(
    "Attempts after a failure, per hour",
    "By what ended the attempt before.",
    {"sum by (cause) (increase(whaleflux_recoveries_total[1h]))": "{{cause}}"},
)

DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": ("Overview", (_UP, _NODES, _HELD, _JOBS, _REPLICAS, _SPENT)),
    "fleet": (
        "Fleet and health",
        (
            _NODES,
            Panel("GPUs by model", "Of nodes that take work.", {"max by (model) (whaleflux_gpus)": "{{model}}"}),
            Panel(
                "GPUs held by model",
                "Lost ones too, until they are fenced.",
                {"max by (model) (whaleflux_gpus_allocated)": "{{model}}"},
            ),
            Panel(
                "Tasks by phase", "Over all agents that are scraped.", {"sum by (phase) (whaleflux_tasks)": "{{phase}}"}
            ),
            Panel(
                "Sites that are cut off",
                "1 while all of a site is silent as one; its work goes on there.",
                {"max by (site) (whaleflux_sites_cut_off)": "{{site}}"},
            ),
            Panel(
                "Faults of GPUs per hour",
                "Xids of the hardware, by what the GPU needs before it is used again.",
                {"sum by (action) (increase(whaleflux_gpu_faults_total[1h]))": "{{action}}"},
            ),
            Panel(
                "Last sign of life to verdict",
                "How long it takes to find out.",
                _quantiles("whaleflux_detection_duration_seconds", "verdict"),
                "s",
            ),
        ),
    ),
    "scheduler": (
        "Scheduler",
        (
            _JOBS,
            _WAITING,
            _HELD,
            Panel(
                "Submission to placement",
                "Of jobs that were placed for the first time.",
                _quantiles("whaleflux_job_wait_seconds"),
                "s",
            ),
            Panel(
                "Time of a decision", "By what is decided.", _quantiles("whaleflux_plan_duration_seconds", "kind"), "s"
            ),
            Panel(
                "Lost compare-and-swaps per second",
                "Somebody else wrote first; it is tried again.",
                {"sum by (kind) (rate(whaleflux_cas_conflicts_total[$__rate_interval]))": "{{kind}}"},
            ),
        ),
    ),
    "training": (
        "Training",
        (
            Panel(
                "Loss", "The newest loss that each job reported.", {"max by (job) (whaleflux_training_loss)": "{{job}}"}
            ),
            Panel(
                "Training step",
                "A step back is work repeated after a failure.",
                {"max by (job) (whaleflux_training_step)": "{{job}}"},
            ),
            Panel(
                "Checkpoints per hour",
                "Committed, or refused because another attempt runs.",
                {"sum by (outcome) (increase(whaleflux_checkpoint_commits_total[1h]))": "{{outcome}}"},
            ),
        ),
    ),
    "recovery": (
        "Recovery",
        (
            _RECOVERED,
            Panel(
                "Failure to running again",
                "A point leads to its trace.",
                _quantiles("whaleflux_recovery_duration_seconds"),
                "s",
            ),
            Panel(
                "Slower than 60 s",
                "Share of the recoveries; the objective is 5 %.",
                {
                    "cluster:whaleflux_recovery_slow:ratio_rate1h": "1 h",
                    "cluster:whaleflux_recovery_slow:ratio_rate6h": "6 h",
                },
                "percentunit",
            ),
        ),
    ),
    "inference": (
        "Inference",
        (
            _REPLICAS,
            Panel(
                "Models below their minimum",
                "Fewer ready replicas than their files ask for.",
                {"max(whaleflux_models_below_minimum)": "models"},
            ),
            Panel(
                "First byte of the answer",
                "By model; a request to its first byte.",
                _quantiles("whaleflux_first_token_seconds", "model"),
                "s",
            ),
            Panel(
                "Routing decisions per second",
                "By outcome.",
                {"sum by (outcome) (rate(whaleflux_route_decisions_total[$__rate_interval]))": "{{outcome}}"},
            ),
            Panel(
                "Time of a routing decision", "Within the router.", _quantiles("whaleflux_route_duration_seconds"), "s"
            ),
            Panel(
                "First token later than 2.5 s",
                "Share of the answers; the objective is 1 %.",
                {"model:whaleflux_first_token_slow:ratio_rate1h": "{{model}}"},
                "percentunit",
            ),
        ),
    ),
    "cost": (
        "Cost",
        (
            _SPENT,
            Panel(
                "Shares of spending",
                "The same, of all.",
                {"class:whaleflux_spending:share": "{{cost_class}}"},
                "percentunit",
            ),
            Panel(
                "Usage that is not in the ledger yet",
                "Its newest is as old as this.",
                {"time() - max(whaleflux_ledger_watermark_timestamp_seconds)": "behind"},
                "s",
            ),
            Panel(
                "Budgets of this month",
                "By what the whole month is expected to cost.",
                {"max by (forecast) (whaleflux_budgets)": "{{forecast}}"},
            ),
            Panel(
                "Residual",
                "By how much a bill and its parts differ: always 0.",
                {"max(whaleflux_ledger_residual_micros)": "micro-dollars"},
            ),
        ),
    ),
    "control-plane": (
        "Control plane",
        (
            _UP,
            Panel("Who leads", "One of each name.", {"sum by (name) (whaleflux_leader)": "{{name}}"}),
            Panel(
                "Calls per second",
                "Answered, whatever the answer.",
                {"sum by (service) (rate(whaleflux_rpc_requests_total[$__rate_interval]))": "{{service}}"},
            ),
            Panel(
                "Refused and failed calls per second",
                "By gRPC's status.",
                {
                    'sum by (service, code) (rate(whaleflux_rpc_requests_total{code!="OK"}[$__rate_interval]))': "{{service}} {{code}}"
                },
            ),
            Panel(
                "Time of a call",
                "By service; a point leads to its trace.",
                _quantiles("whaleflux_rpc_duration_seconds", "service"),
                "s",
            ),
            Panel(
                "Timers late, 99 %",
                "A blocked event loop delays everything of its process.",
                {"service:whaleflux_event_loop_lag_seconds:p99": "{{service}}"},
                "s",
            ),
            Panel(
                "Time of the store's answers, 99 %",
                "Of gets and commits, as services see them; failed ones too.",
                {"service:whaleflux_store_duration_seconds:p99": "{{service}}"},
                "s",
            ),
            Panel(
                "Open streams",
                "Long calls that are held open.",
                {"sum by (service) (whaleflux_rpc_open_streams)": "{{service}}"},
            ),
            Panel(
                "Events published per second",
                "By what happened.",
                {"sum by (what) (rate(whaleflux_events_published_total[$__rate_interval]))": "{{what}}"},
            ),
            Panel(
                "Life left of certificates",
                "Renewed when a third is left.",
                {
                    "min by (service, instance) (whaleflux_certificate_expiry_seconds) - time()": "{{service}} {{instance}}"
                },
                "s",
            ),
        ),
    ),
}


def page(name: str) -> str:
    """The dashboard as Grafana's JSON."""
    title, panels = DASHBOARDS[name]
    whole = {
        "uid": f"whaleflux-{name}",
        "title": f"WhaleFlux: {title}",
        "tags": ["whaleflux"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "title": "WhaleFlux", "tags": ["whaleflux"], "asDropdown": True, "keepTime": True}
        ],
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": [_panel(panel, place) for place, panel in enumerate(panels)],
    }
    return json.dumps(whole, indent=1) + "\n"


def _panel(panel: Panel, place: int) -> dict[str, object]:
    across = 24 // _WIDTH
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
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
