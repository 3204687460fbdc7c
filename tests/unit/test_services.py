"""One table of services: what names each of them elsewhere is made from it or agrees with it."""

import importlib
import tomllib
from pathlib import Path

import pytest
import yaml

from tools import generate
from whaleflux.config import ServiceSettings
from whaleflux.rpc import roles
from whaleflux.sdk.stubs import Stubs
from whaleflux.services import BY_GRPC, REFLECTING, REFLECTION, ROLES, SERVICES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
AGENTS_OWN = {"NodeService", "PieceService"}  # served by agents, on nodes


@pytest.mark.parametrize("path", generate.paths())
def test_what_is_made_from_tables_is_up_to_date(path):
    assert (ROOT / path).read_text() == generate.made(path), "run: make generate"


def test_a_folder_below_services_is_a_service_or_the_agent():
    folders = {path.name for path in (ROOT / "services").iterdir() if (path / "README.md").exists()}
    assert folders == {*ROLES, "agent"}
    for service in SERVICES:
        assert (ROOT / "services" / service.role / service.package / "__main__.py").exists()


def test_packaging_knows_each_service():
    extras = PROJECT["project"]["optional-dependencies"]
    embedded = next(line for line in extras["embedded"] if line.startswith("whaleflux["))
    named = embedded.removeprefix("whaleflux[").removesuffix("]").split(",")
    assert set(named) == {*(service.host for service in SERVICES), "agent"}
    assert set(named) <= set(extras)
    build = PROJECT["tool"]["hatch"]["build"]
    folders = {f"services/{role}" for role in (*ROLES, "agent")}
    for listed in (build["dev-mode-dirs"], PROJECT["tool"]["mypy"]["mypy_path"], PROJECT["tool"]["ruff"]["src"]):
        assert {folder for folder in listed if folder.startswith("services/")} == folders
    packages = {folder for folder in build["targets"]["wheel"]["packages"] if folder.startswith("services/")}
    assert packages == {f"services/{role}/whaleflux_{role}" for role in (*ROLES, "agent")}


def test_each_service_has_an_identity_an_address_in_settings_and_stubs_for_clients():
    assert set(ROLES) <= roles.SERVICES
    for service in SERVICES:
        assert service.role in ServiceSettings.model_fields
    stubs = {type(stub).__name__.removesuffix("Stub") for stub in vars(Stubs(_NoChannel())).values()}
    assert {name for service in SERVICES for name in (service.grpc[0], *service.also.values())} == stubs
    assert all(name in service.grpc for service in SERVICES for name in service.also.values())


class _NoChannel:
    """Takes what a stub asks of a channel when it is made."""

    def __getattr__(self, name):
        return lambda *arguments, **more: None


def test_the_front_door_sends_each_service_of_the_contract_somewhere():
    stems = [path.stem for path in (ROOT / "protos" / "whaleflux" / "v1").glob("*.proto")]
    files = [importlib.import_module(f"whaleflux.v1.{stem}_pb2") for stem in stems]
    contract = {name for file in files for name in file.DESCRIPTOR.services_by_name}
    assert contract == {*BY_GRPC, *AGENTS_OWN}
    config = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
    listener = config["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][-1]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert {r["match"]["prefix"]: r["route"]["cluster"] for r in routes} == {
        **{f"/whaleflux.v1.{name}/": service.role for name, service in BY_GRPC.items()},
        **{f"/{name}/": REFLECTING.role for name in REFLECTION},
    }
