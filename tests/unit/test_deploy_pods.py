"""What Pods may do: Kubernetes' "restricted" profile and more for all of them; the agent's exceptions are these and no others.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

import pytest

from tests.support.deploy_files import of_kind, pods, rendered

OVERLAYS = ("overlays/dev", "overlays/production", "overlays/cert-manager")
SAFE_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
AGENT = {
    # Its identity outlives the Pod, or a node would need a new token at each restart.
    "volume state is a hostPath",
    # That folder belongs to root when it is made, and the agent does not run as root.
    "own-state may run as root",
    "own-state adds CHOWN",
}


def beyond_restricted(template):
    """What the profile forbids of a Pod, in words."""
    spec = template["spec"]
    whole = spec.get("securityContext", {})
    yield from (f"{name} is shared with the host" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    for volume in spec.get("volumes", []):
        yield from (f"volume {volume['name']} is a {kind}" for kind in volume.keys() - {"name"} - SAFE_VOLUMES)
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = whole | container.get("securityContext", {})
        name, capabilities = container["name"], own.get("capabilities", {})
        yield from [f"{name} is privileged"] * bool(own.get("privileged"))
        yield from [f"{name} may gain rights"] * (own.get("allowPrivilegeEscalation") is not False)
        yield from [f"{name} keeps capabilities"] * ("ALL" not in capabilities.get("drop", []))
        yield from (f"{name} adds {added}" for added in capabilities.get("add", []))
        yield from [f"{name} may run as root"] * (own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0)
        yield from [f"{name} has no seccomp profile"] * (own.get("seccompProfile") != {"type": "RuntimeDefault"})
        yield from [f"{name} binds a port of its host"] * any("hostPort" in p for p in container.get("ports", []))


def beyond_ours(template):
    """What we ask for beside the profile."""
    spec = template["spec"]
    yield from ["has a token of the cluster"] * (spec.get("automountServiceAccountToken") is not False)
    yield from ["has its neighbours' addresses as variables"] * (spec.get("enableServiceLinks") is not False)
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        name, limits = container["name"], container.get("resources", {}).get("limits", {})
        yield from [f"{name} may write its image"] * (
            container["securityContext"].get("readOnlyRootFilesystem") is not True
        )
        yield from [f"{name} has no memory limit"] * ("memory" not in limits)
        words = [*container.get("command", []), *container.get("args", [])]
        yield from (f"{name} is started by a shell" for word in words if word in ("sh", "bash", "/bin/sh", "/bin/bash"))
    for volume in spec.get("volumes", []):
        yield from [f"{volume['name']} has no size"] * ("sizeLimit" not in volume.get("emptyDir", {"sizeLimit": ""}))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted_but_for_what_the_agent_needs(overlay):
    found = {name: set(beyond_restricted(template)) for name, template in pods(rendered(overlay))}
    assert found.pop("agent") == AGENT
    assert len(found) > 6
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_has_a_token_a_shell_or_room_without_end(overlay):
    found = {name: set(beyond_ours(template)) for name, template in pods(rendered(overlay))}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_the_profile_is_enforced_where_no_exception_is_needed():
    levels = {
        d["metadata"]["name"]: d["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for d in of_kind(rendered("overlays/production"), "Namespace")
    }
    assert levels == {"whaleflux": "restricted", "whaleflux-agents": "privileged"}


def test_a_loose_pod_would_be_noticed():
    loose = {"spec": {"hostNetwork": True, "volumes": [{"name": "v", "hostPath": {}}], "containers": [{"name": "c"}]}}
    assert len(set(beyond_restricted(loose))) == 6
