"""Alerts and dashboards as Prometheus' own promtool understands them: each alert fires on what it is for, and is quiet otherwise."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.deploy_files import DEPLOY
from tools.dashboards import CHOICES, DASHBOARDS
from tools.grafana import filled
from whaleflux.telemetry.registry import METRICS

RULES_FILE = DEPLOY / "observability" / "rules.yaml"
RULES = [rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
RUNBOOKS = DEPLOY.parent / "docs" / "runbooks"
PAGES = {
    name: json.loads((DEPLOY / "observability/grafana/dashboards" / f"{name}.json").read_text()) for name in DASHBOARDS
}
SPECS = {metric.value: spec for metric, spec in METRICS.items()}
QUERIES = sorted({target["expr"] for page in PAGES.values() for panel in page["panels"] for target in panel["targets"]})

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus"
)


def spending(**micros):
    return {f'whaleflux_spending_micros{{cost_class="{kind}"}}': f"{value}x60" for kind, value in micros.items()}


def lag(late_per_minute):
    """60 timers a minute, so many of them later than 0.25 s."""
    return {
        f'whaleflux_event_loop_lag_seconds_bucket{{service="s",le="{le}"}}': f"0+{60 - (late_per_minute if le == '0.25' else 0)}x60"
        for le in ("0.25", "0.5", "+Inf")
    }


def slow(metric, le, slow_per_minute, labels=""):
    """Ten a minute, so many of them slower than `le` seconds."""
    return {
        f'{metric}_bucket{{le="{le}"{labels}}}': f"0+{10 - slow_per_minute}x400",
        f"{metric}_count{{{labels.removeprefix(',')}}}": "0+10x400",
    }


def stored(slow_per_minute):
    """Ten commits a minute, so many of them slower than 0.25 s."""
    return {
        f'whaleflux_store_duration_seconds_bucket{{service="s",call="commit",le="{le}"}}': f"0+{within}x60"
        for le, within in (("0.25", 10 - slow_per_minute), ("0.5", 10), ("+Inf", 10))
    }


def waits(bucket):
    """Jobs that were placed, all within the bucket."""
    edges = ("60.0", "3600.0", "14400.0", "+Inf")
    return {
        f'whaleflux_job_wait_seconds_bucket{{le="{le}"}}': f"0+{int(at >= edges.index(bucket))}x120"
        for at, le in enumerate(edges)
    }


COMMITS = 'whaleflux_checkpoint_commits_total{outcome="committed"}'
RUNNING = {'whaleflux_jobs{state="RUNNING"}': "3x400"}
HALF_HELD = {'whaleflux_gpus{model="a"}': "8x60", 'whaleflux_gpus_allocated{model="a"}': "4x60"}
LEDGER = "whaleflux_ledger_watermark_timestamp_seconds"

# alert -> when it is looked at, series on which it fires, series on which it does not
CASES = {
    "WhaleFluxTargetDown": ("5m", {'up{service="scheduler"}': "0x9"}, {'up{service="scheduler"}': "0 0 1x9"}),
    "WhaleFluxNoLeader": (
        "5m",
        {f'whaleflux_leader{{name="scheduler",instance="{i}"}}': "0x9" for i in "ab"},
        {f'whaleflux_leader{{name="scheduler",instance="{i}"}}': f"{int(i == 'b')}x9" for i in "ab"},
    ),
    "WhaleFluxEventLoopLagging": ("30m", lag(2), lag(0)),
    "WhaleFluxEtcdSlow": ("30m", stored(slow_per_minute=2), stored(slow_per_minute=0)),
    "WhaleFluxSitePartitioned": (
        "5m",
        {f'whaleflux_sites_cut_off{{site="{site}"}}': f"{int(site == 'b')}x9" for site in "ab"},
        {f'whaleflux_sites_cut_off{{site="{site}"}}': "0x9" for site in "ab"},
    ),
    "WhaleFluxGpuXidFatal": (
        "5m",
        {'whaleflux_gpu_faults_total{action="restart_host"}': "0 0 1x20"},
        {
            'whaleflux_gpu_faults_total{action="restart_host"}': "1x20",
            'whaleflux_gpu_faults_total{action="restart_work"}': "0 0 1x20",
        },
    ),
    "WhaleFluxBudgetForecastExceeded": (
        "90m",
        {'whaleflux_budgets{forecast="over"}': "1x120", 'whaleflux_budgets{forecast="within"}': "3x120"},
        {'whaleflux_budgets{forecast="over"}': "1x20 0x100", 'whaleflux_budgets{forecast="unknown"}': "3x120"},
    ),
    "WhaleFluxCertificateExpiring": (
        "10m",
        {'whaleflux_certificate_expiry_seconds{service="s",instance="i"}': "80000x20"},
        {'whaleflux_certificate_expiry_seconds{service="s",instance="i"}': "90000x20"},
    ),
    "WhaleFluxNodeUnreachable": (
        "5m",
        {f'whaleflux_nodes{{phase="UNREACHABLE",site="{site}"}}': f"{int(site == 'b')}x9" for site in "ab"},
        {'whaleflux_nodes{phase="READY",site="a"}': "9x9", 'whaleflux_nodes{phase="UNREACHABLE",site="a"}': "0x9"},
    ),
    "WhaleFluxGpuBrokenLong": (
        "25h",
        {f'whaleflux_nodes_with_broken_gpus{{site="{site}"}}': f"{int(site == 'b')}x1600" for site in "ab"},
        {'whaleflux_nodes_with_broken_gpus{site="a"}': "1x1000 0x600"},
    ),
    "WhaleFluxJobWaitLong": ("90m", waits("14400.0"), waits("3600.0")),
    "WhaleFluxGpusIdleWhileJobsWait": (
        "40m",
        HALF_HELD | {'whaleflux_queue_depth{queue="jobs"}': "3x60"},
        HALF_HELD | {'whaleflux_queue_depth{queue="jobs"}': "0x60"},
    ),
    "WhaleFluxJobNotProgressing": (
        "40m",
        {'whaleflux_training_step{training="a"}': "0+1x5 5x60", 'whaleflux_training_step{training="b"}': "0+1x60"},
        {f'whaleflux_training_step{{training="{name}"}}': "0+1x60" for name in "ab"},
    ),
    "WhaleFluxRecoverySlow": (
        "2h",
        slow("whaleflux_recovery_duration_seconds", "60.0", 8),
        slow("whaleflux_recovery_duration_seconds", "60.0", 2),
    ),
    "WhaleFluxCheckpointStale": ("200m", RUNNING | {COMMITS: "0+1x60 60x300"}, RUNNING | {COMMITS: "0+1x400"}),
    "WhaleFluxReplicaBelowMinimum": (
        "10m",
        {"whaleflux_models_below_minimum": "1x20"},
        {"whaleflux_models_below_minimum": "1x6 0x20"},
    ),
    "WhaleFluxFirstTokenSloBurn": (
        "2h",
        slow("whaleflux_first_token_seconds", "2.5", 2, ',model="m"'),
        slow("whaleflux_first_token_seconds", "2.5", 0, ',model="m"'),
    ),
    "WhaleFluxLedgerLagging": ("30m", {LEDGER: "60x60"}, {LEDGER: "0+60x60"}),
    "WhaleFluxLedgerResidual": (
        "5m",
        {"whaleflux_ledger_residual_micros": "1x9"},
        {"whaleflux_ledger_residual_micros": "0x9"},
    ),
    "WhaleFluxCrossNodeWasteHigh": (
        "45m",
        spending(useful=80, comm_avoidable=20),
        spending(useful=95, comm_avoidable=5),
    ),
    "WhaleFluxIdleAllocatedHigh": (
        "45m",
        spending(useful=80, allocated_idle=20),
        spending(useful=95, allocated_idle=5),
    ),
    "WhaleFluxUnknownShareHigh": ("45m", spending(useful=70, unknown=30), spending(useful=85, unknown=15)),
    "WhaleFluxAuditLost": ("9m", {"whaleflux_audit_lost_total": "0 0 5x20"}, {"whaleflux_audit_lost_total": "5x20"}),
    "WhaleFluxCallsFailing": (
        "15m",
        {'whaleflux_rpc_requests_total{service="s",code="INTERNAL"}': "0+3x20"},
        {'whaleflux_rpc_requests_total{service="s",code="NOT_FOUND"}': "0+3x20"},
    ),
    "WhaleFluxAgentClaimsRefused": (
        "9m",
        {'whaleflux_agent_claims_refused_total{what="usage"}': "0 0 2x20"},
        {'whaleflux_agent_claims_refused_total{what="usage"}': "2x20"},
    ),
    "WhaleFluxEndpointsRefused": (
        "5m",
        {"whaleflux_endpoints_refused_total": "0 0 1x20"},
        {"whaleflux_endpoints_refused_total": "1x20"},
    ),
}


def promtool(*arguments):
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)


def whole(expression):
    """The expression with recorded names in the place of what they record."""
    for name, recorded in RECORDED.items():
        expression = expression.replace(name, f"({recorded})")
    return expression


@needs_promtool
@pytest.mark.parametrize("alert", sorted(CASES))
def test_an_alert_fires_on_what_it_is_for_and_on_nothing_else(alert, tmp_path):
    at, firing, quiet = CASES[alert]
    query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > bool 0'
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": expected}],
        }
        for series, expected in ((firing, [{"labels": "{}", "value": 1}]), (quiet, []))
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES_FILE)], "evaluation_interval": "30s", "tests": tests}))
    found = promtool("test", "rules", str(file))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_is_tried():
    assert CASES.keys() == ALERTS.keys()


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_has_what_people_need(alert):
    rule = ALERTS[alert]
    notes = rule["annotations"]
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{" not in notes["summary"], "one text for all of its firings"
    assert DEPLOY.parent / notes["runbook_url"] == RUNBOOKS / f"{alert}.md"
    runbook = (RUNBOOKS / f"{alert}.md").read_text()
    assert runbook.startswith(f"# {alert}\n\n{notes['summary']} *{rule['labels']['severity'].capitalize()}*")
    assert f"`{rule['expr']}`" in runbook, "the runbook says on what it fires"
    assert "\n## Look\n\n* " in runbook
    assert "\n## Do\n\n* " in runbook
    assert notes["dashboard_url"].removeprefix("/d/") in {page["uid"] for page in PAGES.values()}


def test_every_runbook_is_of_an_alert():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*ALERTS, "index"}


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in RULES), *QUERIES])
def test_queries_ask_for_registered_metrics_and_their_labels(query):
    names = set(re.findall(r"whaleflux_\w+", whole(query)))
    assert names or re.search(r"\bup\b", query)
    asked = {re.sub(r"_(bucket|count)$", "", name): name for name in names}
    assert asked.keys() <= SPECS.keys()
    for base, name in asked.items():
        kind = SPECS[base].kind
        assert (name != base) == (kind == "histogram"), name
        counted = re.search(rf"\b(rate|increase)\({name}", whole(query)) is not None
        assert counted == (kind in ("counter", "histogram")), f"{name}: rates are of what is counted"
    labels = {"le", "service", "instance", *(label for base in asked for label in SPECS[base].labels)}
    by = {part.strip() for found in re.findall(r"by \(([^)]*)\)", whole(query)) for part in found.split(",")}
    assert by <= labels


def test_no_label_is_one_that_prometheus_gives_to_what_it_scrapes():
    """It would rename ours: what is summed by it would be summed over all."""
    labels = {label for spec in SPECS.values() for label in spec.labels}
    assert labels.isdisjoint({"job", "instance", "service", "severity", "alertname", "alertstate"})


@needs_promtool
def test_prometheus_reads_the_rules_and_the_dashboards_queries(tmp_path):
    found = promtool("check", "rules", str(RULES_FILE))
    assert found.returncode == 0, found.stdout + found.stderr
    rules = [{"record": f"q{at}", "expr": filled(q, "1m")} for at, q in enumerate(QUERIES)]
    file = Path(tmp_path, "queries.yaml")
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    found = promtool("check", "rules", str(file))
    assert found.returncode == 0, found.stdout + found.stderr


class TestDashboards:
    @pytest.mark.parametrize("name", sorted(DASHBOARDS))
    def test_panels_are_described_and_do_not_overlap(self, name):
        page, cells = PAGES[name], set()
        assert page["uid"] == f"whaleflux-{name}"
        for panel in page["panels"]:
            assert panel["description"].endswith("."), panel["title"]
            at = panel["gridPos"]
            own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not own & cells
            cells |= own
            assert at["x"] + at["w"] <= 24

    @pytest.mark.parametrize("name", sorted(DASHBOARDS))
    def test_the_source_of_figures_is_chosen_by_who_looks(self, name):
        page = PAGES[name]
        assert [v["name"] for v in page["templating"]["list"] if v["type"] == "datasource"] == ["datasource"]
        used = {one["datasource"]["uid"] for panel in page["panels"] for one in (panel, *panel["targets"])}
        assert used == {"$datasource"}

    @pytest.mark.parametrize("name", sorted(DASHBOARDS))
    def test_a_page_offers_the_choices_that_its_queries_use_and_of_labels_that_there_are(self, name):
        page = PAGES[name]
        asked = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
        used = {found for query in asked for found in re.findall(r"\$(?!__)(\w+)", query)}
        offered = {one["name"]: one for one in page["templating"]["list"] if one["type"] == "query"}
        assert used == offered.keys() == {choice.name for choice in CHOICES.get(name, ())}
        for choice in CHOICES.get(name, ()):
            base = choice.metric.removesuffix("_count")
            assert base == "up" or choice.label in {"service", *SPECS[base].labels}
            assert offered[choice.name]["query"] == f"label_values({choice.metric}, {choice.label})"
            assert offered[choice.name]["includeAll"] and offered[choice.name]["datasource"]["uid"] == "$datasource"

    def test_sites_and_queues_can_be_chosen(self):
        assert {choice.name for choices in CHOICES.values() for choice in choices} >= {"site", "queue"}

    @pytest.mark.parametrize(
        ("query", "asked"),
        [
            ('a{site=~"$site",b="c"}', 'a{site=~".*",b="c"}'),
            ('a{job=~"queues/$queue/jobs/.*"}', 'a{job=~"queues/.*/jobs/.*"}'),
            ("rate(a[$__rate_interval])", "rate(a[1m])"),
        ],
    )
    def test_where_all_is_chosen_a_query_asks_for_all(self, query, asked):
        assert filled(query, "1m") == asked

    @pytest.mark.parametrize("alert", sorted(ALERTS))
    def test_a_panel_of_an_alerts_page_shows_it_and_leads_to_its_runbook(self, alert):
        uid = ALERTS[alert]["annotations"]["dashboard_url"].removeprefix("/d/")
        (page,) = [page for page in PAGES.values() if page["uid"] == uid]
        links = [link["url"] for panel in page["panels"] for link in panel["links"]]
        assert f"${{runbooks}}/{alert}/" in links
        assert "runbooks" in {one["name"] for one in page["templating"]["list"]}
        (shown,) = page["annotations"]["list"]
        assert alert in re.search(r'alertname=~"([^"]*)"', shown["expr"])[1].split("|")

    @pytest.mark.parametrize("name", sorted(DASHBOARDS))
    def test_pages_lead_to_each_other_with_the_time_and_what_was_chosen(self, name):
        (link,) = PAGES[name]["links"]
        assert (link["keepTime"], link["includeVars"]) == (True, True)
        assert all(set(link["tags"]) <= set(page["tags"]) for page in PAGES.values())

    def test_every_file_is_made(self):
        assert {path.stem for path in (DEPLOY / "observability/grafana/dashboards").iterdir()} == DASHBOARDS.keys()
