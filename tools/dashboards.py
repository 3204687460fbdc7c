"""Grafana's dashboards, from one table: `make generate` writes deploy/observability/grafana/dashboards/*.json."""

from __future__ import annotations

from tools import grafana
from tools.grafana import Choice, Panel


def _quantiles(metric: str, by: str = "", where: str = "") -> dict[str, str]:
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return {
        f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{where}[$__rate_interval])))": f"{legend}{name}"
        for q, name in (("0.5", "half"), ("0.99", "99 %"))
    }


_OF_QUEUES = '{training=~"queues/$queue/jobs/.*"}'
_OF_SERVICES = '{service=~"$service"}'
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


def _of_sites(query: str) -> str:
    return query.replace("{}", '{site=~"$site"}')


DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "overview": ("Overview", (_UP, _NODES, _HELD, _JOBS, _REPLICAS, _SPENT)),
    "fleet": (
        "Fleet and health",
        (
            Panel(
                "Nodes by phase",
                "As the health monitor judges them, of the chosen sites.",
                {_of_sites("sum by (phase) (max by (site, phase) (whaleflux_nodes{}))"): "{{phase}}"},
            ),
            Panel(
                "Nodes that take work, by site",
                "READY ones.",
                {'max by (site) (whaleflux_nodes{phase="READY",site=~"$site"})': "{{site}}"},
            ),
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
                {_of_sites("max by (site) (whaleflux_sites_cut_off{})"): "{{site}}"},
            ),
            Panel(
                "Nodes with broken GPUs",
                "A GPU of theirs is out of use; the others go on.",
                {_of_sites("max by (site) (whaleflux_nodes_with_broken_gpus{})"): "{{site}}"},
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
                "Loss",
                "The newest loss that each job reported.",
                {f"max by (training) (whaleflux_training_loss{_OF_QUEUES})": "{{training}}"},
            ),
            Panel(
                "Training step",
                "A step back is work repeated after a failure.",
                {f"max by (training) (whaleflux_training_step{_OF_QUEUES})": "{{training}}"},
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
                _quantiles("whaleflux_first_token_seconds", "model", '{model=~"$model"}'),
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
                "Addresses that a front door refused, per hour",
                "One that is refused freezes the addresses of all models: always 0.",
                {"sum(increase(whaleflux_endpoints_refused_total[1h]))": "refused"},
            ),
            Panel(
                "First token later than 2.5 s",
                "Share of the answers; the objective is 1 %.",
                {'model:whaleflux_first_token_slow:ratio_rate1h{model=~"$model"}': "{{model}}"},
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
                {
                    'sum by (service) (rate(whaleflux_rpc_requests_total{service=~"$service"}[$__rate_interval]))': "{{service}}"
                },
            ),
            Panel(
                "Refused and failed calls per second",
                "By gRPC's status.",
                {
                    'sum by (service, code) (rate(whaleflux_rpc_requests_total{code!="OK",service=~"$service"}[$__rate_interval]))': "{{service}} {{code}}"
                },
            ),
            Panel(
                "Time of a call",
                "By service; a point leads to its trace.",
                _quantiles("whaleflux_rpc_duration_seconds", "service", _OF_SERVICES),
                "s",
            ),
            Panel(
                "Timers late, 99 %",
                "A blocked event loop delays everything of its process.",
                {f"service:whaleflux_event_loop_lag_seconds:p99{_OF_SERVICES}": "{{service}}"},
                "s",
            ),
            Panel(
                "Time of the store's answers, 99 %",
                "Of gets and commits, as services see them; failed ones too.",
                {f"service:whaleflux_store_duration_seconds:p99{_OF_SERVICES}": "{{service}}"},
                "s",
            ),
            Panel(
                "Open streams",
                "Long calls that are held open.",
                {f"sum by (service) (whaleflux_rpc_open_streams{_OF_SERVICES})": "{{service}}"},
            ),
            Panel(
                "Events published per second",
                "By what happened.",
                {"sum by (what) (rate(whaleflux_events_published_total[$__rate_interval]))": "{{what}}"},
            ),
            Panel(
                "Claims of agents that were refused, per hour",
                "Of work that is not placed on their node.",
                {"sum by (what) (increase(whaleflux_agent_claims_refused_total[1h]))": "{{what}}"},
            ),
            Panel(
                "Records of the audit trail that were lost, per hour",
                "There was no room for them while the event bus was away: always 0.",
                {
                    f"sum by (service) (increase(whaleflux_audit_lost_total{_OF_SERVICES}[1h]))": "{{service}}",
                },
            ),
            Panel(
                "Life left of certificates",
                "Renewed when a third is left.",
                {
                    f"min by (service, instance) (whaleflux_certificate_expiry_seconds{_OF_SERVICES}) - time()": "{{service}} {{instance}}"
                },
                "s",
            ),
        ),
    ),
}


# What a page is narrowed down to by who looks.
CHOICES: dict[str, tuple[Choice, ...]] = {
    "fleet": (Choice("site", "whaleflux_nodes", "site"),),
    "training": (Choice("queue", "whaleflux_training_step", "training", r"/queues\/(.*)\/jobs\//"),),
    "inference": (Choice("model", "whaleflux_first_token_seconds_count", "model"),),
    "control-plane": (Choice("service", "up", "service"),),
}


def page(name: str) -> str:
    """The dashboard as Grafana's JSON."""
    title, panels = DASHBOARDS[name]
    return grafana.page(f"whaleflux-{name}", f"WhaleFlux: {title}", panels, CHOICES.get(name, ()))
