"""docs/next-change.md names exactly the files that a new job field, GPU type or service touches."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tools import generate
from whaleflux.fleet.gpu_types import GPU_TYPES
from whaleflux.manifests.job_fields import ATTRIBUTES
from whaleflux.services import SERVICES

ROOT = Path(__file__).parents[2]
CHECKLISTS = (ROOT / "docs" / "next-change.md").read_text()
REGION = re.compile(r"^[^\n]*generated: ([\w-]+)\b[^\n]*\n.*?^[^\n]*end of \1$", re.DOTALL | re.MULTILINE)


@cache
def written_by_hand():
    """Path -> text of every file that people keep, without what is generated. Tests and benchmarks are no places of the product."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    wanted = (".py", ".proto", ".yaml", ".md", ".toml", ".json", ".conf", "Dockerfile", "Makefile")
    skipped = ("tests/", "benchmarks/", "docs/next-change.md", *generate.FILES)
    files = [path for path in listed if path.endswith(wanted) and not path.startswith(skipped)]
    return {path: REGION.sub("", (ROOT / path).read_text()) for path in files if (ROOT / path).exists()}


def checklist(title):
    section = CHECKLISTS.partition(f"## {title}\n")[2].partition("\n## ")[0]
    assert section, title
    return section


def places(title):
    """The files that the numbered lines begin with."""
    return re.findall(r"^\d\. `([^`]+)`:?", checklist(title), re.MULTILINE)


def naming(words, share):
    """Files that name at least this share of some things, each given by the words for it."""
    patterns = [re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, forms)) + r")(?![\w-])") for forms in words]
    found = {path: sum(bool(p.search(text)) for p in patterns) for path, text in written_by_hand().items()}
    return {path for path, count in found.items() if count >= share * len(patterns)}


def test_files_that_checklists_name_exist():
    named = set(
        re.findall(r"`((?:libs|services|protos|docs|tests|benchmarks)/[^`]+|\w+\.(?:toml|md))`", CHECKLISTS)
    ) - {"news.py"}
    assert len(named) > 10
    for path in named:
        assert any(ROOT.glob(path.replace("<name>", "*").replace("<service>", "*"))), path


def test_a_new_service_touches_eight_places_and_the_checklist_names_them():
    forms = [{s.role, s.host, s.package, s.grpc[0], s.grpc[0] + "/", f'"{s.role}"', s.role.upper()} for s in SERVICES]
    listed = places("Add a service")
    assert len(listed) <= 8
    assert set(listed) - {"services/<name>/", "protos/whaleflux/v1/<name>.proto"} == naming(forms, share=1)


def test_a_new_job_field_touches_three_places_and_the_checklist_names_the_lists():
    leaves = [{field.path.rpartition(".")[2]} for field in ATTRIBUTES.values() if field.path.count("_")]
    assert set(places("Add a field to job files")) == naming(leaves, share=0.75)
    assert len(re.findall(r"^\d\. ", checklist("Add a field to job files"), re.MULTILINE)) == 3


def test_a_new_gpu_type_touches_one_place():
    listed = places("Add a GPU type")
    assert len(listed) == 1
    assert set(listed) == naming([{gpu.name} for gpu in GPU_TYPES], share=0.5)


@pytest.mark.parametrize("title", re.findall(r"^## (.*)$", CHECKLISTS, re.MULTILINE))
def test_checklists_are_numbered(title):
    numbers = [int(number) for number in re.findall(r"^(\d)\. ", checklist(title), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
