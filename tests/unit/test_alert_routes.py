"""Who hears of which alert, by the example for Alertmanager: as its own amtool reads it."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.support.deploy_files import DEPLOY
from tests.unit.test_alerts import ALERTS

FILE = DEPLOY / "observability" / "alertmanager.yaml"
CONFIG = yaml.safe_load(FILE.read_text())
URGENCY = {"info": 0, "warning": 1, "critical": 2}
needs_amtool = pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool is not here: apt-get install prometheus-alertmanager"
)


def amtool(*arguments):
    return subprocess.run(["amtool", *arguments], capture_output=True, text=True, timeout=60, check=False)


def named(matchers):
    """Alerts that a matcher of alertname names, in full."""
    found = [re.fullmatch(r'alertname=~?"([\w|]+)"', one) for one in matchers]
    return [name for one in found for name in one[1].split("|")]


INHIBITED = [
    (cause, effect)
    for rule in CONFIG["inhibit_rules"]
    for cause in named(rule["source_matchers"])
    for effect in named(rule["target_matchers"])
]


@needs_amtool
def test_alertmanager_reads_the_example():
    found = amtool("check-config", str(FILE))
    assert found.returncode == 0, found.stdout + found.stderr


@needs_amtool
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "pager"), ("warning", "tickets"), ("info", "nobody")])
def test_the_severity_says_who_hears_of_it(severity, receiver):
    of = next(alert for alert, rule in ALERTS.items() if rule["labels"]["severity"] == severity)
    told = amtool("config", "routes", "test", f"--config.file={FILE}", f"severity={severity}", f"alertname={of}")
    assert told.stdout.split() == [receiver]


@pytest.mark.parametrize(("cause", "effect"), INHIBITED)
def test_what_is_left_out_has_a_cause_that_is_told_at_least_as_urgently(cause, effect):
    severity = {alert: URGENCY[ALERTS[alert]["labels"]["severity"]] for alert in (cause, effect)}
    assert severity[cause] >= severity[effect]
    assert cause != effect and (effect, cause) not in INHIBITED


def test_causes_and_effects_share_the_labels_that_have_to_be_equal():
    for rule in CONFIG["inhibit_rules"]:
        for label in rule.get("equal", []):
            kinds = [ALERTS[name] for name in (*named(rule["source_matchers"]), *named(rule["target_matchers"]))]
            assert all(f"$labels.{label}" in kind["annotations"]["description"] for kind in kinds)
