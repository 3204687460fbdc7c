"""deploy/kubernetes: every document is valid, what it names exists, and what is rendered is confined."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.support.deploy_files import VERSIONS, of_kind, pods, rendered, settings_of, unknown_settings
from whaleflux import bootstrap, services

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES = "1.33"
FILES = sorted(
    file
    for folder in ("base", "agent")
    for file in (FOLDER / folder).glob("*.yaml")
    if file.name not in ("kustomization.yaml", "service-patch.yaml")
)
# For what reads metrics, wherever that runs.
NOT_MOUNTED = {"whaleflux-scraper"}
OVERLAYS = ("overlays/dev", "overlays/production")  # both contain base and agent
SECRETS = {
    f"whaleflux-{part.replace('_', '-')}" for part in (*services.ROLES, "authority", "frontdoor", "etcd", "nats")
}


def documents(file):
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


BASE = [document for file in FILES for document in documents(file)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_document_is_valid(file):
    for document in documents(file):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_a_misspelt_field_would_be_noticed():
    wrong = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "a"},
        "automountServiceAccountTokens": 1,
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_file_is_used():
    folders = [file.parent for file in FOLDER.rglob("kustomization.yaml")]
    assert {file.parent for file in FOLDER.rglob("*.yaml")} == set(folders)
    for folder in folders:
        told = yaml.safe_load((folder / "kustomization.yaml").read_text())
        patches = [patch["path"] for patch in told.get("patches", []) if "path" in patch]
        named = {name for name in [*told.get("resources", []), *patches] if name.endswith(".yaml")}
        assert named == {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}, folder


def test_every_service_has_an_account_a_budget_and_a_network_name():
    for role in (*(role.replace("_", "-") for role in services.ROLES), "frontdoor", "etcd", "nats"):
        kinds = {document["kind"] for document in BASE if document["metadata"]["name"] == role}
        assert {"Service", "ServiceAccount", "PodDisruptionBudget"} <= kinds, role


def test_no_account_has_a_token_of_the_cluster():
    accounts = of_kind(BASE, "ServiceAccount")
    assert len(accounts) == len(services.ROLES) + len(("agent", "frontdoor", "etcd", "nats"))
    assert all(account["automountServiceAccountToken"] is False for account in accounts)


def test_budgets_and_services_select_pods_that_exist():
    labels = [template["metadata"]["labels"] for _, template in pods(BASE)]
    selectors = [document["spec"]["selector"] for document in of_kind(BASE, "Service")]
    selectors += [document["spec"]["selector"]["matchLabels"] for document in of_kind(BASE, "PodDisruptionBudget")]
    for selector in selectors:
        assert any(selector.items() <= own.items() for own in labels), selector


def test_a_budget_never_blocks_the_drain_of_a_node():
    assert all(document["spec"].get("maxUnavailable") == 1 for document in of_kind(BASE, "PodDisruptionBudget"))


def test_secrets_are_those_that_bootstrap_makes(tmp_path):
    from datetime import UTC, datetime, timedelta

    bootstrap.write_identities(tmp_path, datetime(2026, 1, 1, tzinfo=UTC), hosts=["h"], life=timedelta(days=1))
    made = bootstrap.kubernetes_secrets(tmp_path)
    for secret in made:
        kubernetes_validate.validate(secret, KUBERNETES, strict=True)
    assert {secret["metadata"]["name"] for secret in made} == SECRETS | NOT_MOUNTED
    used = set()
    for name, template in pods(BASE):
        spec = template["spec"]
        used |= {volume["secret"]["secretName"] for volume in spec.get("volumes", []) if "secret" in volume}
        used |= {s["secretRef"]["name"] for c in spec["containers"] for s in c.get("envFrom", []) if "secretRef" in s}
        assert name == "inventory" or "whaleflux-authority" not in str(spec)
    assert used == SECRETS | {"whaleflux-join-tokens"}


def test_services_understand_their_settings():
    settings = next(d["data"] for d in BASE if d["metadata"]["name"] == "whaleflux-settings")
    component = "app.kubernetes.io/component"
    ours = {name: t for name, t in pods(BASE) if t["metadata"]["labels"][component] == "service"}
    assert len(ours) == len(services.ROLES)
    for name, template in ours.items():
        own = {variable["name"] for variable in template["spec"]["containers"][0].get("env", [])}
        assert not unknown_settings(name, {*settings, *own})
    for role in services.ROLES:
        host = settings[f"WHALEFLUX_{role.upper()}"].partition(":")[0]
        assert any(d["metadata"]["name"] == host for d in of_kind(BASE, "Service"))


@pytest.mark.parametrize("overlay", ["overlays/dev", "overlays/production"])
def test_the_ledger_outlives_the_pods_of_the_console(overlay):
    """In a volume that every replica reaches: one node's is enough for one replica only."""
    found = rendered(overlay)
    (claim,) = of_kind(found, "PersistentVolumeClaim")
    spec = dict(pods(found))["console"]["spec"]
    (volume,) = [v["name"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert {"name": volume, "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in spec["volumes"]
    container = spec["containers"][0]
    (place,) = [v["value"] for v in container["env"] if v["name"] == "WHALEFLUX_LEDGER_FOLDER"]
    assert {"name": volume, "mountPath": place} in container["volumeMounts"]
    (replicas,) = [d["spec"]["replicas"] for d in of_kind(found, "Deployment") if d["metadata"]["name"] == "console"]
    assert claim["spec"]["accessModes"] == (["ReadWriteOnce"] if replicas == 1 else ["ReadWriteMany"])


def test_the_agent_only_senses_and_understands_its_settings():
    settings = next(d["data"] for d in BASE if d["metadata"]["name"] == "agent-settings")
    template = dict(pods(BASE))["agent"]
    own = {v["name"] for v in template["spec"]["containers"][0]["env"]}
    assert not unknown_settings("agent-1", {*settings, *own})
    values = {name.removeprefix("WHALEFLUX_").lower(): value for name, value in settings.items()}
    agent = settings_of("agent-1")(**values)
    assert agent.run is False
    assert agent.docker is False


def test_versions_are_those_of_compose():
    images = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["images"]
    tags = {image["name"]: image["newTag"] for image in images}
    for name in ("ETCD_IMAGE", "NATS_IMAGE", "ENVOY_IMAGE"):
        image, _, tag = VERSIONS[name].rpartition(":")
        assert tags[image] == tag


class TestRendered:
    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_each_document_is_valid(self, overlay):
        for document in rendered(overlay):
            if document not in BASE:  # checked already
                kubernetes_validate.validate(document, KUBERNETES, strict=True)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_pods_are_confined_and_bounded(self, overlay):
        for name, template in pods(rendered(overlay)):
            spec = template["spec"]
            assert spec["automountServiceAccountToken"] is False, name
            assert spec["securityContext"]["runAsNonRoot"] is True, name
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
            for container in spec["containers"]:
                confined = container["securityContext"]
                assert confined["readOnlyRootFilesystem"] is True
                assert confined["allowPrivilegeEscalation"] is False
                assert confined["capabilities"] == {"drop": ["ALL"]}
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])
                assert "memory" in container["resources"]["limits"]
                assert {"readinessProbe", "livenessProbe"} <= set(container)

    @pytest.mark.parametrize("overlay", OVERLAYS)
    def test_every_image_has_a_version(self, overlay):
        for _, template in pods(rendered(overlay)):
            for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
                assert ":" in container["image"]
                assert not container["image"].endswith(":latest")

    def test_mounted_configurations_are_made(self):
        found = rendered("overlays/dev")
        names = {document["metadata"]["name"] for document in of_kind(found, "ConfigMap")}
        for _, template in pods(found):
            for volume in template["spec"].get("volumes", []):
                assert "configMap" not in volume or volume["configMap"]["name"] in names

    def test_production_survives_the_loss_of_a_node(self):
        found = rendered("overlays/production")
        counts = {d["metadata"]["name"]: d["spec"]["replicas"] for d in of_kind(found, "Deployment", "StatefulSet")}
        assert counts.pop("etcd") == 3
        assert counts.pop("nats") == 1  # news may wait, truth may not
        assert set(counts.values()) == {2}
        etcd = dict(pods(found))["etcd"]["spec"]["containers"][0]
        (cluster,) = [v["value"] for v in etcd["env"] if v["name"] == "ETCD_INITIAL_CLUSTER"]
        assert len(cluster.split(",")) == 3
