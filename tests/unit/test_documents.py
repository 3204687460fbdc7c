"""Blocks of the docs: every command is run by a test or says why not; every YAML file is a file of ours or says whose."""

import re
from pathlib import Path

import pytest

from tests.support import documented
from tools import site
from whaleflux.errors import StatusError
from whaleflux.manifests import yaml_files
from whaleflux.manifests.offer_file import offers_from_yaml
from whaleflux.manifests.ray_file import ray_from_yaml

ROOT = Path(__file__).parents[2]
PAGES = [documented.read(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
REST = "run: python train.py\ngpus: 1\n"  # of a job file of which a page shows some lines
NOT_RUN = 12  # at most, in all pages: each is a hole


def blocks(language):
    return [
        pytest.param(page, block, id=f"{page.path.relative_to(ROOT)}:{block.line}")
        for page in PAGES
        for block in page.blocks
        if block.language == language
    ]


def test_a_page_is_read(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- fleet: h200x8 -->\n\n<!-- exits: 2 -->\n```sh\nfalse\n```\ntext\n```yaml\na: 1\n```\n")
    page = documented.read(path)
    assert page.fleet == "h200x8"
    assert [(b.line, b.language, b.text, b.said) for b in page.blocks] == [
        (5, "sh", "false\n", {"exits": "2"}),
        (9, "yaml", "a: 1\n", {}),
    ]


@pytest.mark.parametrize("text", ["```sh\nnever closed\n", "<!-- exits with: 1 -->\n```sh\nfalse\n```\n"])
def test_a_page_that_means_nothing_is_told(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md:1"):
        documented.read(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT)))
def test_a_block_that_looks_like_a_command_is_one(page):
    """Blocks without a language are pictures and output."""
    shells = ("$ ", "whaleflux ", "make ", "docker ", "kubectl ", "python ", "pip ", "curl ", "export ", "git ")
    hidden = [
        block.line for block in page.blocks if block.language not in {"sh", "yaml"} and block.text.startswith(shells)
    ]
    assert not hidden, f"{page.path}: fence as sh what begins at line(s) {hidden}"


def test_few_commands_are_not_run():
    not_run = [f"{p.path.name}:{b.line}: {b.said['not run']}" for p in PAGES for b in p.blocks if "not run" in b.said]
    assert len(not_run) <= NOT_RUN, not_run


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_a_file_of_ours_is_valid(page, block):
    if {"another system", "not run"} & block.said.keys():
        pytest.skip("a file of another program")
    if re.search(r"^(nodes|jobs|seed):", block.text, re.MULTILINE):
        pytest.skip("a file of the simulator, which the page runs")
    if re.search(r"^layers:", block.text, re.MULTILINE):
        pytest.skip("a model's shape, which the page plans with")
    text = block.text if re.search(r"^(run|image|url|model):", block.text, re.MULTILINE) else f"{REST}{block.text}"
    try:
        if re.search(r"^offers:", block.text, re.MULTILINE):
            offers_from_yaml(block.text)
        elif re.search(r"^max_gpus:", block.text, re.MULTILINE):
            ray_from_yaml(block.text)
        else:
            (yaml_files.model_from_yaml if yaml_files.is_model(text) else yaml_files.jobs_from_yaml)(text, ROOT)
    except StatusError as error:
        pytest.fail(f"{page.path}:{block.line}: {error.message}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT)))
def test_tables_and_lists_are_shown_as_such(page):
    """Rows have as many cells as the head of their table, and a list that follows text begins behind an empty line."""
    wrong, before, cells = [], "", 0
    for number, line in enumerate(without_blocks(page.path.read_text()), 1):
        now = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if (now and cells and now != cells) or (LIST.match(line) and TEXT.match(before)):
            wrong.append(f"{page.path}:{number}")
        before, cells = line, now
    assert not wrong


LIST, TEXT = re.compile(r"(\*|1\.) "), re.compile(r"[^\s*#|\d<`]")


def without_blocks(text):
    """Its lines, those of blocks left empty."""
    inside = False
    for line in text.splitlines():
        fence = line.startswith("```")
        yield "" if inside or fence else line
        inside ^= fence


LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    gone = [to for to in LINK.findall(page.path.read_text()) if not (page.path.parent / to).exists()]
    assert not gone


def test_the_site_names_what_it_does_not_have():
    said = site.named("[a](../b.py), [`tests/c`](../tests/c), [d](d.md), [e](https://e)", depth=0)
    assert said == "a (`b.py`), `tests/c`, [d](d.md), [e](https://e)"
    assert site.named("[f](../clients.md) [g](../../README.md)", depth=1) == "[f](../clients.md) g (`README.md`)"


def test_the_site_shows_bars_within_code_as_they_are():
    assert site.with_bars("| `a\\|b` | c\\|d |\n`e\\|f`") == "| `a|b` | c\\|d |\n`e\\|f`"
