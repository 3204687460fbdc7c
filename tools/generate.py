"""Writes what deploy/ and docs/ repeat of the code's own tables: `make generate`. A test compares.

Some files are made whole; in others it is a region between two lines of comment, `generated: NAME` and `end of NAME`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tools import cert_manager, code_parts, dashboards, deploy_parts, docs_parts
from whaleflux import frontdoor, ports, reasons
from whaleflux.events import nats_config
from whaleflux.manifests import reference
from whaleflux.services import SERVICES

ROOT = Path(__file__).parents[1]
_ENVOY = """# Generated from libs/whaleflux/frontdoor by: make generate
# What is changed here is lost.
"""
_NATS = """# Generated from libs/whaleflux/events/permissions.py by: make generate
# For other sites: python -m whaleflux.bootstrap nats-config --site NAME --site OTHER, and: ... nats-config --of NAME
"""
_CERTIFICATES = "# Generated from libs/whaleflux/services.py and libs/whaleflux/rpc/pki.py by: make generate\n"
KUBERNETES = "deploy/kubernetes/base"
FILES: dict[str, Callable[[], str]] = {
    "docs/guide/job-file.md": lambda: reference.page("job"),
    "docs/guide/model-file.md": lambda: reference.page("model"),
    "docs/guide/ray-file.md": lambda: reference.page("ray"),
    "docs/guide/permissions.md": docs_parts.permissions,
    "docs/guide/reasons.md": reasons.page,
    "docs/guide/settings.md": docs_parts.settings,
    "libs/whaleflux/sdk/stubs.py": code_parts.stubs,
    "deploy/envoy/envoy.yaml": lambda: _ENVOY + frontdoor.render(frontdoor.deployed()),
    "deploy/nats/hub.conf": lambda: _NATS + nats_config.deployed_hub(["site-a"]),
    "deploy/nats/site-a.conf": lambda: _NATS + nats_config.deployed_site("site-a", "nats:7422"),
    **{
        f"deploy/kubernetes/components/cert-manager/{name}.yaml": lambda made=made: _CERTIFICATES + made()  # type: ignore[misc]
        for name, made in (
            ("issuers", cert_manager.issuers),
            ("certificates", cert_manager.certificates),
            ("identities", cert_manager.identities),
        )
    },
    **{
        f"deploy/observability/grafana/dashboards/{name}.json": lambda name=name: dashboards.page(name)  # type: ignore[misc]
        for name in dashboards.DASHBOARDS
    },
    "deploy/envoy/public.yaml": lambda: _ENVOY + frontdoor.render_public_secrets(frontdoor.deployed()),
    "deploy/envoy/secrets.yaml": lambda: _ENVOY + frontdoor.render_secrets(frontdoor.deployed()),
    **{
        f"{KUBERNETES}/{service.host}.yaml": lambda service=service: deploy_parts.kubernetes(service)  # type: ignore[misc]
        for service in SERVICES
    },
}
REGIONS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/guide/wires.md": {"ports": lambda: "\n" + ports.table() + "\n"},
    "libs/whaleflux/config.py": {"addresses": code_parts.addresses},
    "deploy/compose/compose.yaml": {
        "addresses": lambda: deploy_parts.addresses("  "),
        "identities": deploy_parts.compose_identities,
        "services": deploy_parts.compose_services,
        "volumes": deploy_parts.compose_volumes,
    },
    "deploy/compose/compose.etcd3.yaml": {"services": deploy_parts.compose_etcd3},
    "deploy/docker/Dockerfile": {"folders": deploy_parts.docker_folders},
    "deploy/observability/prometheus.yaml": {"targets": deploy_parts.prometheus_targets},
    f"{KUBERNETES}/settings.yaml": {"addresses": lambda: deploy_parts.addresses("  ")},
    f"{KUBERNETES}/kustomization.yaml": {
        "resources": deploy_parts.kustomize_resources,
        "images": deploy_parts.kustomize_images,
    },
    "deploy/kubernetes/agent/agent.yaml": {"agent-dialers": deploy_parts.agent_dialers},
    f"{KUBERNETES}/network-policies.yaml": {
        "towards-nodes": deploy_parts.towards_nodes,
        "node-ports": deploy_parts.node_ports,
    },
}


def made(path: str) -> str:
    """What the file at `path` should be."""
    if path in FILES:
        return FILES[path]()
    text = (ROOT / path).read_text()
    for name, content in REGIONS[path].items():
        marked = re.compile(
            rf"(^[^\n]*generated: {name}\b[^\n]*\n).*?(^[^\n]*end of {name}\b[^\n]*$)", re.DOTALL | re.MULTILINE
        )
        text, count = marked.subn(lambda found, content=content: found[1] + content() + found[2], text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{path} has {count} regions {name!r}; it needs one")
    return text


def paths() -> list[str]:
    return [*FILES, *REGIONS]


def main() -> None:
    """Writes what differs, and once more where code was written that other parts are made from."""
    again = False
    for path in paths():
        text, file = made(path), ROOT / path
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            print(path)
            again |= path.endswith(".py")
    if again:
        subprocess.run([sys.executable, "-m", "tools.generate"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
