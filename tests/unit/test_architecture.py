"""Who may import whom (docs/architecture.md): walked, not trusted."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())
CORE_MAY = ("whaleflux.errors", "whaleflux.names", "whaleflux.clock", "whaleflux.fleet")
ONLY = {
    "aetcd": ["libs/whaleflux/store/etcd"],
    "nats": ["libs/whaleflux/events/nats", "libs/whaleflux/events/topology", "libs/whaleflux/events/pull"],
}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, with the names taken from it, wherever in the file."""
    found = []
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found += [alias.name for alias in item.names]
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            found += [f"{item.module}.{alias.name}" for alias in item.names]
    return found


def files(*folders: Path) -> list[Path]:
    return sorted(file for folder in folders for file in folder.rglob("*.py") if "/v1/" not in str(file))


def test_the_walk_sees_the_code():
    assert len(files(ROOT / "libs", ROOT / "services")) > 50


@pytest.mark.parametrize("service", SERVICES)
def test_a_core_is_pure(service):
    package = f"whaleflux_{service}"
    for file in files(ROOT / "services" / service / package / "core"):
        ours = [name for name in imports(file) if name.split(".")[0].startswith("whaleflux")]
        foreign = [n for n in ours if not n.startswith((*CORE_MAY, f"{package}.core")) and n != "whaleflux.names"]
        foreign = [
            n for n in foreign if n not in {"whaleflux.names", "whaleflux.errors", "whaleflux.clock", "whaleflux.fleet"}
        ]
        assert not foreign, f"{file} imports {foreign}"
        assert not [
            n for n in imports(file) if n.split(".")[0] in {"asyncio", "socket", "grpc", "subprocess", "time"}
        ], file


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_one_another(service):
    others = tuple(f"whaleflux_{other}" for other in SERVICES if other != service)
    for file in files(ROOT / "services" / service):
        assert not [name for name in imports(file) if name.split(".")[0] in others], file


def test_libs_never_import_services():
    for file in files(ROOT / "libs"):
        assert not [name for name in imports(file) if name.startswith("whaleflux_")], file


@pytest.mark.parametrize(("module", "places"), ONLY.items())
def test_only_one_place_knows_each_server(module, places):
    for file in files(ROOT / "libs", ROOT / "services"):
        if any(name.split(".")[0] == module for name in imports(file)):
            assert str(file.relative_to(ROOT)).startswith(tuple(places)), f"{file} imports {module}"
