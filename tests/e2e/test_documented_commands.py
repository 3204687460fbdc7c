"""The commands of README and docs do what they print: each page's blocks are run in order, in one shell, as a reader would.

A page that names a fleet finds it running; pages that name the same one share it. What needs a program that does not work here
is left out and named.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import documented
from tests.support.page_reader import PageReader

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): documented.read(path)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# How a program shows that it can do something here: the client alone is not enough.
PROBES = {"docker": ["docker", "info"], "kubectl": ["kubectl", "version", "--request-timeout=2s"]}


class Fleets:
    """One running at a time, under its own home."""

    def __init__(self, folder):
        self._folder, self._wanted, self._operator = folder, "", None

    def home_of(self, wanted):
        """A home in which commands reach the fleet; an empty one when none is wanted."""
        if wanted != self._wanted:
            self.stop()
        home = self._folder / (f"home-{wanted.replace('/', '-').replace(',', '-')}" if wanted else "home")
        home.mkdir(exist_ok=True)
        if wanted and self._operator is None:
            (home / "operator").mkdir()
            self._operator, self._wanted = PageReader(home, home / "operator"), wanted
            up = f"whaleflux up --state {home}/state --simulate {wanted}\n"
            self._operator.run(documented.Block(0, "sh", up, {"until": "stop with"}))
        return home

    def stop(self):
        if self._operator is not None:
            self._operator.leave()
        self._operator, self._wanted = None, ""


@pytest.fixture(scope="module")
def fleets(tmp_path_factory):
    made = Fleets(tmp_path_factory.mktemp("fleets"))
    yield made
    made.stop()


def works(program):
    if program.startswith("$"):
        return program[1:] in os.environ
    return bool(shutil.which(program)) and not (
        program in PROBES and subprocess.run(PROBES[program], capture_output=True, check=False, timeout=30).returncode
    )


BY_FLEET = sorted((name for name, page in PAGES.items() if page.commands), key=lambda name: (PAGES[name].fleet, name))


@pytest.mark.parametrize("name", BY_FLEET)
def test_the_commands_of_a_page_work_as_printed(name, fleets, tmp_path):
    page, left_out = PAGES[name], []
    reader = PageReader(fleets.home_of(page.fleet), tmp_path)
    try:
        for block in page.blocks:
            if "file" in block.said:
                reader.write(block)
            elif block.is_command:
                if missing := [n for n in block.said.get("needs", "").split(", ") if n and not works(n)]:
                    left_out.append(f"{name}:{block.line} needs {', '.join(missing)}")
                    continue
                began = time.monotonic()
                try:
                    reader.run(block)
                    print(f"{name}:{block.line} took {time.monotonic() - began:.1f} s")  # shown by -rP
                except AssertionError as error:
                    pytest.fail(f"{name}:{block.line}: {error}", pytrace=False)
    finally:
        reader.leave()
    if left_out and len(left_out) == len(page.commands):
        pytest.skip("; ".join(left_out))
