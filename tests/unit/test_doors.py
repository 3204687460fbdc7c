"""Nothing without a door: modules, figures and fields that no user can reach say what they wait for, or fail here."""

import ast
import re
from inspect import getsource
from pathlib import Path

import pytest

from benchmarks.doors import DOORS, NO_DOOR
from whaleflux.cli.__main__ import app
from whaleflux.manifests.job_fields import ATTRIBUTES, Spec
from whaleflux.manifests.reference import TABLES

ROOT = Path(__file__).parents[2]
NOT_YET = (ROOT / "docs" / "not-yet.md").read_text()
# Entrances beside `__main__`: what user code imports, and a program that is started by its path.
ENTRANCES = {
    "whaleflux.sdk",
    "whaleflux.bootstrap",
    "whaleflux.healthcheck",
    "whaleflux.cli.entry",
    "whaleflux_agent.runtime.shim",
    "whaleflux.ray_cluster.reader",
    "whaleflux.ray_cluster.worker",
    "whaleflux.ray_cluster.head",
}
PUBLIC = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "report.md",
]


def modules():
    """Every module of ours by its name."""
    found = {}
    for base in (ROOT / "libs", *(path for path in (ROOT / "services").iterdir() if path.is_dir())):
        for file in base.rglob("*.py"):
            if "/v1/" not in str(file):
                name = ".".join(file.relative_to(base).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imported(file, known):
    """Modules in `known` that a file imports, with the packages on the way."""
    found = set()
    for item in ast.walk(ast.parse(file.read_text())):
        if isinstance(item, ast.Import):
            names = [alias.name for alias in item.names]
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            names = [f"{item.module}.{alias.name}" for alias in item.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & set(known)
    return found


def reached(entrances, known):
    seen, waiting = set(), list(entrances)
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += imported(known[name], known)
    return seen


class TestModules:
    def test_each_is_reached_from_a_program_or_from_user_code(self):
        entrances = {name for name in MODULES if name.endswith("__main__")} | ENTRANCES
        unreached = set(MODULES) - reached(entrances, MODULES) - {"whaleflux.v1"}
        assert not unreached, "wire it in, or move it to benchmarks/ and list it in docs/not-yet.md"

    def test_the_walk_sees_what_is_imported_late_and_through_packages(self):
        known = MODULES | {"whaleflux.cli.nowhere": ROOT / "tests" / "unit" / "test_doors.py"}
        found = reached({"whaleflux.cli.__main__"}, known)
        assert {"whaleflux.manifests.reference", "whaleflux.embedded.suite"} <= found
        assert "whaleflux.cli.nowhere" not in found

    def test_programs_started_by_their_path_are(self):
        assert 'with_name("shim.py")' in MODULES["whaleflux_agent.runtime.process"].read_text()
        assert 'with_name("reader.py")' in MODULES["whaleflux.ray_cluster.reading"].read_text()
        assert '("reader", "worker", "head")' in MODULES["whaleflux_scheduler.ray_jobs"].read_text()


def benchmark_modules():
    return {
        f"benchmarks.{'.'.join(file.relative_to(ROOT / 'benchmarks').with_suffix('').parts)}": file
        for file in (ROOT / "benchmarks").rglob("*.py")
    }


class TestFigures:
    @pytest.mark.parametrize("name", DOORS)
    def test_a_door_is_one(self, name):
        commands = {command.name or command.callback.__name__ for command in app.registered_commands}
        groups = {group.name for group in app.registered_groups}
        assert set(DOORS[name].commands) <= commands | groups
        assert set(DOORS[name].fields) <= {field.file for field in ATTRIBUTES.values()}

    @pytest.mark.parametrize("name", DOORS)
    def test_what_only_the_laboratory_can_do_has_no_door(self, name):
        known = benchmark_modules()
        used = reached({f"benchmarks.{name}"}, known)
        of_the_laboratory = any(module.startswith("benchmarks.placement_lab.") for module in used)
        assert DOORS[name].waits_for or not of_the_laboratory, f"{name} measures code of placement_lab"

    def test_the_laboratory_is_used_by_no_service_and_holds_nothing_idle(self):
        for file in MODULES.values():
            assert "placement_lab" not in file.read_text(), file
        known = benchmark_modules()
        used = reached({f"benchmarks.{name}" for name in DOORS}, known)
        assert {name for name in known if ".placement_lab." in name and not name.endswith("__init__")} <= used

    @pytest.mark.parametrize("file", PUBLIC, ids=lambda file: str(file.relative_to(ROOT)))
    def test_a_figure_that_no_user_can_reach_says_so_beside_it(self, file):
        for line in file.read_text().splitlines():
            named = re.search(r"^\|.*make bench NAME=(\w+)", line) or re.match(r"\| `?(\w+)`? ", line)
            door = DOORS.get(named[1]) if named and file.parent.name != "guide" else None
            assert door is None or not door.waits_for or NO_DOOR in line, line

    def test_what_they_wait_for_is_listed(self):
        waiting = {name: door.waits_for for name, door in DOORS.items() if door.waits_for}
        assert waiting
        for name, waits_for in waiting.items():
            line = next(line for line in NOT_YET.splitlines() if f"`{name}`" in line)
            assert line.endswith(f"| {waits_for} |")

    def test_each_figure_of_the_readme_names_its_command(self):
        table = (ROOT / "README.md").read_text().partition("## Figures")[2].partition("\n\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| |", "|---"))]
        assert len(rows) > 5
        for row in rows:
            named = re.search(r"`make (?:demo|bench NAME=(\w+))` \|$", row)
            assert named, row
            assert named[1] is None or named[1] in DOORS


class TestFields:
    @pytest.mark.parametrize("name", ATTRIBUTES)
    def test_something_acts_on_each_field_of_a_job_file_or_it_says_not_yet(self, name):
        answers = [
            n for n, p in vars(Spec).items() if isinstance(p, property) and f"self.{name} " in getsource(p.fget) + " "
        ]
        words = "|".join([name, ATTRIBUTES[name].path.rpartition(".")[2], *answers])
        used = re.compile(rf"spec\.(?:\w+\.)*(?:{words})\b")
        ours = [
            file for module, file in MODULES.items() if module.startswith("whaleflux_") and file.name != "validate.py"
        ]
        acted_on = any(used.search(file.read_text()) for file in ours)
        assert acted_on != ATTRIBUTES[name].not_yet

    def test_fields_that_nothing_acts_on_are_listed_and_their_reference_says_so(self):
        for kind, fields in TABLES.items():
            page = (ROOT / "docs" / "guide" / f"{kind}-file.md").read_text()
            for field in (field for field in fields if field.not_yet):
                assert f"`{field.file.split('.')[0]}" in NOT_YET
                line = next(line for line in page.splitlines() if line.startswith(f"| `{field.file}` |"))
                assert "not yet" in line.lower()
