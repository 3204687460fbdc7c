"""What the tests of deploy/ read: the folder, the versions, and which settings each process knows."""

import functools
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from whaleflux.services import SERVICES

DEPLOY = Path(__file__).parents[2] / "deploy"
SETTINGS = {service.host: service.package for service in SERVICES} | {
    "agent-1": "whaleflux_agent",
    "agent-2": "whaleflux_agent",
}
VERSIONS = dict(
    line.split("=", 1)
    for line in (DEPLOY / "compose" / ".env").read_text().splitlines()
    if line and not line.startswith("#")
)


def settings_of(service):
    return importlib.import_module(f"{SETTINGS[service]}.settings").Settings


def unknown_settings(service, environment):
    known = {f"WHALEFLUX_{field.upper()}" for field in settings_of(service).model_fields} | {"WHALEFLUX_CONFIG"}
    return {name for name in environment if name.startswith("WHALEFLUX_")} - known


@functools.cache
def rendered(folder):
    """What kustomize makes of a folder below deploy/kubernetes; skips the test where there is none."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if not shutil.which(command[0]):
        pytest.skip("neither kubectl nor kustomize is on the PATH: what overlays make of the base is not checked here")
    made = subprocess.run(
        [*command, str(DEPLOY / "kubernetes" / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def of_kind(found, *kinds):
    return [document for document in found if document["kind"] in kinds]


def pods(found):
    return [
        (d["metadata"]["name"], d["spec"]["template"]) for d in of_kind(found, "Deployment", "StatefulSet", "DaemonSet")
    ]
