"""Who may import whom (docs/architecture.md): walked, not trusted."""

import ast
import functools
import re
from pathlib import Path

import pytest

from benchmarks import run as benchmarks_run
from benchmarks.doors import DOORS
from tests.support.stray_words import python_files, strays

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())
CORE_MAY = (
    "whaleflux.errors", "whaleflux.names", "whaleflux.clock", "whaleflux.fleet", "whaleflux.hostport", "whaleflux.manifests", "whaleflux.planning",
    "whaleflux.quantities", "whaleflux.reasons",
)  # fmt: skip
ONLY = {
    "aetcd": ["libs/whaleflux/store/etcd/"],
    "nats": ["libs/whaleflux/events/nats", "libs/whaleflux/events/topology", "libs/whaleflux/events/pull"],
}


@functools.cache
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


def test_planning_is_pure():
    for file in files(ROOT / "libs" / "whaleflux" / "planning"):
        names = imports(file)
        foreign = [name for name in names if name.split(".")[0] == "whaleflux" and not name.startswith(CORE_MAY)]
        assert not foreign, f"{file} imports {foreign}"
        assert not [
            n
            for n in names
            if n.split(".")[0] in {"asyncio", "socket", "grpc", "subprocess", "time", "pathlib", "os", "io"}
        ], file


def test_libs_never_import_services():
    for file in files(ROOT / "libs"):
        assert not [name for name in imports(file) if name.startswith("whaleflux_")], file


@pytest.mark.parametrize(("module", "places"), ONLY.items())
def test_only_one_place_knows_each_server(module, places):
    everybody = files(ROOT / "libs", ROOT / "services")
    knowing = [str(f.relative_to(ROOT)) for f in everybody if any(n.split(".")[0] == module for n in imports(f))]
    assert knowing, f"nobody imports {module}: take it off the list"
    assert [file for file in knowing if not file.startswith(tuple(places))] == []


def test_reasons_conditions_and_words_of_events_are_used_from_their_lists():
    found = {str(file.relative_to(ROOT)): words for file in python_files() if (words := strays(file.read_text()))}
    assert not found, "use whaleflux.reasons, which names each once with its meaning"


def test_a_stray_literal_would_be_seen():
    assert strays('raise Aborted("x", reason="MADE_UP")') == ["MADE_UP"]
    assert strays('if health.reason == "SITE_PARTITIONED": pass') == ["SITE_PARTITIONED"]
    assert not strays("class Kind(Enum):\n    NODE_LOST = 'GPU_LOST'\n")


COLLECTIONS = "sites|nodes|queues|jobs|checkpoints|models|replicas|datasets|incidents"
MADE = re.compile(
    rf"""f["'][^"'\n]*\b(?:{COLLECTIONS})/\{{|["'](?:[^"'\n]*/)?(?:{COLLECTIONS})/["'] *\+|\.split\(["']/["']\)\["""
)
TAKES_APART = {"libs/whaleflux/names.py", "libs/whaleflux/store/keys.py", "libs/whaleflux/events/subjects.py"}


def test_names_of_resources_are_made_and_taken_apart_in_one_place():
    elsewhere = [file for file in python_files() if str(file.relative_to(ROOT)) not in TAKES_APART]
    assert len(elsewhere) > 100
    assert [file for file in elsewhere if MADE.findall(file.read_text())] == [], "use whaleflux.names"


def test_a_name_made_elsewhere_would_be_seen():
    text = 'a = f"queues/{q}/jobs/{j}"\nb = f"{job}/checkpoints/{c}"\nd = "datasets/" + x\ne = node.split("/")[1]'
    assert len(MADE.findall(text)) == 4


def test_each_benchmark_has_a_door_or_says_what_it_waits_for():
    assert set(DOORS) == set(benchmarks_run.names()) - {"yardstick"}, "benchmarks/doors.py: how does a user reach it?"
    for name, door in DOORS.items():
        assert bool(door.commands) != bool(door.waits_for), name
