"""deploy/compose, deploy/observability and deploy/envoy: complete, confined, and in step with the code."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.deploy_files import DEPLOY, SETTINGS, VERSIONS, unknown_settings
from whaleflux import bootstrap
from whaleflux.embedded import envoy
from whaleflux.telemetry.registry import METRICS

COMPOSE = DEPLOY / "compose"
FILE = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
ETCD3 = yaml.safe_load((COMPOSE / "compose.etcd3.yaml").read_text())
SERVICES = FILE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_each_container_is_bounded_and_confined(name):
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["restart"] in ("unless-stopped", "on-failure:3", "on-failure:5", "no")
    assert not service.get("privileged")
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_container_names_exists(name):
    service = SERVICES[name]
    assert set(service.get("networks", [])) <= set(FILE["networks"])
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (COMPOSE / source).exists(), source
        else:
            assert source in FILE["volumes"]
    needs = service.get("depends_on", {})
    for other in needs:
        condition = needs[other]["condition"] if isinstance(needs, dict) else "service_started"
        assert other in SERVICES
        assert condition != "service_healthy" or "healthcheck" in SERVICES[other]
        assert condition != "service_completed_successfully" or SERVICES[other]["restart"].startswith("on-failure")


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_the_file_has_a_value(name):
    used = set(re.findall(r"(?<!\$)\$\{(\w+)\}", json.dumps(SERVICES[name])))
    assert used <= set(VERSIONS)


@pytest.mark.parametrize("name", SETTINGS)
def test_services_understand_what_they_are_told(name):
    environment = SERVICES[name]["environment"]
    assert not unknown_settings(name, environment)
    assert environment["WHALEFLUX_ADVERTISE"] == f"{name}:7000"
    assert SERVICES[name]["healthcheck"]["test"][-1].count("/readyz") == 1


def test_the_check_of_settings_notices_a_misspelling():
    assert unknown_settings("scheduler", {"WHALEFLUX_STOER": ""}) == {"WHALEFLUX_STOER"}


def test_peers_are_named_as_the_services_are():
    settings = SERVICES["inventory"]["environment"]
    for role in bootstrap.SERVICES:
        host = settings[f"WHALEFLUX_{role.upper()}"].partition(":")[0]
        assert SERVICES[host]["build"]["args"] == {"ROLE": role}


def test_each_service_sees_its_own_identity_and_inventory_alone_the_authority():
    for role in bootstrap.SERVICES:
        name = role.replace("_", "-")
        wanted = {f"id-{name}:/identity:ro"} | ({"authority:/authority:ro"} if role == "inventory" else set())
        assert set(SERVICES[name]["volumes"]) == wanted
    assert {n for n, s in SERVICES.items() if any("authority:" in v for v in s.get("volumes", []))} == {
        "bootstrap",
        "renewal",
        "inventory",
    }


def test_bootstrap_writes_into_the_volumes_that_are_read():
    written = {Path(volume.split(":")[1]).name for volume in SERVICES["bootstrap"]["volumes"]}
    assert written == {"authority", "admin", "frontdoor", "nats", *bootstrap.SERVICES}
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    folders = re.search(r"for part in ([\w ]+);", dockerfile)
    assert folders
    assert written <= set(folders[1].split()), "a volume takes its owner from a folder of the image"


def test_nothing_is_published_beyond_what_was_asked_for():
    for service in SERVICES.values():
        assert all(re.match(r"(127\.0\.0\.1|\$\{PUBLISH\}):", port) for port in service.get("ports", []))
    assert VERSIONS["PUBLISH"] == "127.0.0.1"


def test_etcd_is_reached_by_services_alone():
    assert FILE["networks"]["store"]["internal"] is True
    on_store = {name for name, service in SERVICES.items() if "store" in (service.get("networks") or [])}
    assert on_store == {"etcd", *(role.replace("_", "-") for role in bootstrap.SERVICES)}


def test_three_members_of_etcd_know_one_another_and_are_known():
    members = {"etcd", "etcd-2", "etcd-3"}
    for member in members:
        told = ETCD3["services"][member]["environment"]
        cluster = dict(pair.split("=") for pair in told["ETCD_INITIAL_CLUSTER"].split(","))
        assert set(cluster) == members
        assert cluster[told["ETCD_NAME"]] == told["ETCD_INITIAL_ADVERTISE_PEER_URLS"] == f"http://{member}:2380"
    for role in bootstrap.SERVICES:
        store = ETCD3["services"][role.replace("_", "-")]["environment"]["WHALEFLUX_STORE"]
        assert {url.removeprefix("http://").partition(":")[0] for url in store.split(",")} == members


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.etcd3.yaml"]])
def test_docker_compose_accepts_it(files):
    if not shutil.which("docker"):
        pytest.skip("no docker command here; the structure is checked by the other tests")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin here; the structure is checked by the other tests")
    named = [part for file in files for part in ("-f", str(COMPOSE / file))]
    checked = subprocess.run(
        ["docker", "compose", *named, "config", "--quiet"], capture_output=True, text=True, check=False, timeout=30
    )
    assert checked.returncode == 0, checked.stderr


def test_envoys_configuration_is_the_one_that_is_generated():
    command = "run: python -m whaleflux.embedded.envoy deploy/envoy"
    front = envoy.deployed()
    assert (DEPLOY / "envoy" / "envoy.yaml").read_text() == envoy.render(front), command
    assert (DEPLOY / "envoy" / "secrets.yaml").read_text() == envoy.render_secrets(front), command


def test_envoy_finds_every_service_of_the_file():
    front = envoy.deployed()
    for role, address in front.upstreams.items():
        assert address == f"{role.replace('_', '-')}:7000"
        assert address.partition(":")[0] in SERVICES
    policy = SERVICES["inference-router"]["environment"]["WHALEFLUX_POLICY_LISTEN"]
    assert front.policy == f"inference-router:{policy.rpartition(':')[2]}"
    published = {port.rpartition(":")[2] for port in SERVICES["frontdoor"]["ports"]}
    assert published == {str(front.grpc_port), str(front.http_port)}


class TestObservability:
    FOLDER = DEPLOY / "observability"
    DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "whaleflux.json").read_text())
    EXPRESSIONS = tuple(target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))

    def test_the_dashboard_asks_for_registered_metrics_and_their_labels_only(self):
        assert len(self.EXPRESSIONS) > 20
        specs = {metric.value: spec for metric, spec in METRICS.items()}
        for expression in self.EXPRESSIONS:
            (name,) = set(re.findall(r"whaleflux_\w+", expression))
            base = name.removesuffix("_bucket")
            assert base in specs, expression
            assert (name != base) == ("histogram_quantile" in expression) == (specs[base].kind == "histogram")
            labels = {part.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for part in by.split(",")}
            assert labels <= {*specs[base].labels, "le", "service"}, expression

    def test_rates_are_taken_of_counters_and_histograms_only(self):
        for expression in self.EXPRESSIONS:
            counted = "rate(" in expression or "increase(" in expression
            name = re.findall(r"whaleflux_\w+", expression)[0].removesuffix("_bucket")
            kind = next(spec.kind for metric, spec in METRICS.items() if metric.value == name)
            assert counted == (kind in ("counter", "histogram")), expression

    def test_panels_do_not_overlap(self):
        cells = set()
        for panel in self.DASHBOARD["panels"]:
            at = panel["gridPos"]
            own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not own & cells
            cells |= own
            assert at["x"] + at["w"] <= 24

    def test_the_data_sources_are_those_of_the_dashboard_and_run(self):
        sources = yaml.safe_load((self.FOLDER / "grafana" / "datasources" / "whaleflux.yaml").read_text())[
            "datasources"
        ]
        used = {panel["datasource"]["uid"] for panel in self.DASHBOARD["panels"] if "datasource" in panel}
        assert used <= {source["uid"] for source in sources}
        for source in sources:
            assert re.fullmatch(r"http://([\w-]+):\d+", source["url"])[1] in SERVICES

    def test_prometheus_scrapes_everything_that_has_metrics(self):
        config = yaml.safe_load((self.FOLDER / "prometheus.yaml").read_text())
        targets = {
            target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]
        }
        measured = {
            f"{name}:{service['environment']['WHALEFLUX_METRICS_LISTEN'].rpartition(':')[2]}"
            for name, service in SERVICES.items()
            if name in SETTINGS
        }
        assert targets == measured
        for name in SETTINGS:  # by way of a network that both are on
            assert set(SERVICES[name]["networks"]) & set(SERVICES["prometheus"]["networks"])
