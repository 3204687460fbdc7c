"""deploy/compose, deploy/observability and deploy/envoy: complete, confined, and in step with the code."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests.support.deploy_files import DEPLOY, SETTINGS, VERSIONS, unknown_settings
from whaleflux import bootstrap, frontdoor, services
from whaleflux.rpc import store_authority

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
        source = re.sub(r"\$\{(\w+)\}", lambda found: VERSIONS[found[1]], volume.rpartition(":ro")[0] or volume).split(
            ":"
        )[0]
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
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "python", "-m", "whaleflux.healthcheck"]


def test_what_runs_once_is_not_asked_whether_it_is_ready():
    ours = {name for name, service in SERVICES.items() if service["image"].startswith("whaleflux/")}
    assert all(SERVICES[name]["healthcheck"] == {"disable": True} for name in ours - set(SETTINGS))


def test_agents_alone_have_a_root_with_a_shell():
    assert FILE["x-agent"]["build"]["args"]["ROOT"] == "full"
    assert not any(
        "ROOT" in service["build"]["args"]
        for name, service in SERVICES.items()
        if name not in SETTINGS and "build" in service
    )


def test_the_check_of_settings_notices_a_misspelling():
    assert unknown_settings("scheduler", {"WHALEFLUX_STOER": ""}) == {"WHALEFLUX_STOER"}


def test_peers_are_named_as_the_services_are():
    settings = SERVICES["inventory"]["environment"]
    for role in services.ROLES:
        host = settings[f"WHALEFLUX_{role.upper()}"].partition(":")[0]
        assert SERVICES[host]["build"]["args"] == {"ROLE": role}


def test_each_service_sees_its_own_identity_and_inventory_alone_the_authority():
    for role in services.ROLES:
        name = role.replace("_", "-")
        wanted = {f"id-{name}:/identity:ro", f"state-{name}:/var/lib/whaleflux"} | (
            {"authority:/authority:ro"} if role == "inventory" else set()
        )
        assert set(SERVICES[name]["volumes"]) == wanted
    assert {n for n, s in SERVICES.items() if any("authority:" in v for v in s.get("volumes", []))} == {
        "bootstrap",
        "renewal",
        "inventory",
    }


def test_bootstrap_writes_into_the_volumes_that_are_read(tmp_path):
    written = {Path(volume.split(":")[1]).name for volume in SERVICES["bootstrap"]["volumes"]}
    bootstrap.write_identities(
        tmp_path, datetime(2026, 1, 1, tzinfo=UTC), hosts=["h"], life=timedelta(1), sites=["site-a"]
    )
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= written
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    owned = set().union(*(found.split() for found in re.findall(r"for part in ([\w -]+);", dockerfile)))
    data = {volume.split("/")[-1] for file in (FILE, ETCD3) for volume in file["services"]["folders"]["volumes"]}
    assert written | data <= owned, "a volume takes its owner from a folder of the image"


def test_keys_are_seen_by_who_shows_them_alone():
    """And by who makes them; two parts of one authority never share a volume."""
    readers = {}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            if volume.startswith(("id-", "authority:", "store-authority:")):
                readers.setdefault(volume.split(":")[0], set()).add(name)
    makers = {"bootstrap", "renewal"}
    assert readers.pop("store-authority") == makers
    assert readers.pop("authority") == {*makers, "inventory"}
    assert readers.pop("id-admin") == {*makers, "tokens", "cli"}
    assert readers.pop("id-scraper") == {*makers, "prometheus"}
    assert readers.pop("id-backup") == makers
    assert readers.pop("id-site-a") == {*makers, "nats-site-a"}
    assert readers == {
        f"id-{name}": {*makers, name} for name in (*map(hyphens, services.ROLES), "frontdoor", "etcd", "nats")
    }


def test_the_ledger_lies_in_the_volume_of_the_console_alone():
    folder = SERVICES["console"]["environment"]["WHALEFLUX_LEDGER_FOLDER"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in SERVICES["console"]["volumes"])
    (volume,) = [name for mount, name in mounts.items() if folder.startswith(f"{mount}/")]
    assert volume in FILE["volumes"]
    assert [name for name, s in SERVICES.items() if any(v.startswith(f"{volume}:") for v in s.get("volumes", []))] == [
        "console"
    ]


def hyphens(role):
    return role.replace("_", "-")


@pytest.mark.parametrize("name", ["etcd", "nats", "nats-site-a", "frontdoor", "prometheus"])
def test_programs_of_others_run_without_root_and_without_capabilities(name):
    assert SERVICES[name]["user"] == "10001:10001"
    assert "cap_add" not in SERVICES[name]


@pytest.mark.parametrize("file", [FILE, ETCD3], ids=["one", "three"])
def test_etcd_asks_everybody_for_a_certificate(file):
    for name in (name for name in file["services"] if name.startswith("etcd")):
        told = {**ETCD3["x-member"], **file["services"][name]}
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in told["command"][1:])
        assert flags["client-cert-auth"] == flags["peer-client-cert-auth"] == "true"
        assert flags["trusted-ca-file"] == flags["peer-trusted-ca-file"] == "/identity/ca.crt"
        assert flags["peer-cert-allowed-hostname"] == store_authority.ETCD_MEMBER
        plain = [name for name, value in flags.items() if "http://" in value]
        assert plain == ["listen-metrics-urls"]
        assert flags["listen-metrics-urls"].startswith("http://127.0.0.1:")
        assert "id-etcd:/identity:ro" in told["volumes"]


def test_nothing_is_published_beyond_what_was_asked_for():
    for service in SERVICES.values():
        assert all(re.match(r"(127\.0\.0\.1|\$\{PUBLISH\}):", port) for port in service.get("ports", []))
    assert VERSIONS["PUBLISH"] == "127.0.0.1"


def test_etcd_is_reached_by_services_alone():
    assert FILE["networks"]["store"]["internal"] is True
    on_store = {name for name, service in SERVICES.items() if "store" in (service.get("networks") or [])}
    assert on_store == {"etcd", *(role.replace("_", "-") for role in services.ROLES)}


def test_three_members_of_etcd_know_one_another_and_are_known():
    members = {"etcd", "etcd-2", "etcd-3"}
    for member in members:
        told = ETCD3["services"][member]["environment"]
        cluster = dict(pair.split("=") for pair in told["ETCD_INITIAL_CLUSTER"].split(","))
        assert set(cluster) == members
        assert cluster[told["ETCD_NAME"]] == told["ETCD_INITIAL_ADVERTISE_PEER_URLS"] == f"https://{member}:2380"
    for role in services.ROLES:
        store = ETCD3["services"][role.replace("_", "-")]["environment"]["WHALEFLUX_STORE"]
        assert {url.removeprefix("https://").partition(":")[0] for url in store.split(",")} == members


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


def test_envoy_finds_every_service_of_the_file():
    front = frontdoor.deployed()
    for role, address in front.upstreams.items():
        assert address == f"{role.replace('_', '-')}:7000"
        assert address.partition(":")[0] in SERVICES
    policy = SERVICES["inference-router"]["environment"]["WHALEFLUX_POLICY_LISTEN"]
    assert front.policy == policy
    published = {port.rpartition(":")[2] for port in SERVICES["frontdoor"]["ports"]}
    assert published == {str(front.grpc_port), str(front.http_port)}


class TestObservability:
    FOLDER = DEPLOY / "observability"

    def test_data_sources_are_what_runs_and_traces_are_found_from_figures(self):
        sources = yaml.safe_load((self.FOLDER / "grafana" / "datasources" / "whaleflux.yaml").read_text())[
            "datasources"
        ]
        for source in sources:
            assert re.fullmatch(r"http://([\w-]+):\d+", source["url"])[1] in SERVICES
        (figures,) = [source for source in sources if source["type"] == "prometheus"]
        (traces,) = [source for source in sources if source["type"] == "jaeger"]
        assert figures["jsonData"]["exemplarTraceIdDestinations"] == [
            {"name": "trace_id", "datasourceUid": traces["uid"]}
        ]
        assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]

    def test_prometheus_has_the_rules_that_its_configuration_names(self):
        config = yaml.safe_load((self.FOLDER / "prometheus.yaml").read_text())
        mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["prometheus"]["volumes"]}
        for file in config["rule_files"]:
            assert (COMPOSE / mounted[f"/etc/prometheus/{file}"]).is_file()

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
        for job in config["scrape_configs"]:  # as whom it shows itself, and whom it expects
            assert job["scheme"] == "https"
            (target,), files = job["static_configs"][0]["targets"], job["tls_config"]
            host, agent = target.partition(":")[0], job["static_configs"][0]["labels"]["service"] == "agent"
            assert files["server_name"] == (f"{host}.site-a.agent.whaleflux" if agent else f"{host}.whaleflux")
            assert {files[key].rpartition("/")[0] for key in ("ca_file", "cert_file", "key_file")} == {"/identity"}
        for name in SETTINGS:  # by way of a network that both are on
            assert set(SERVICES[name]["networks"]) & set(SERVICES["prometheus"]["networks"])
