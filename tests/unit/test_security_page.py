"""docs/guide/security.md: what it says is shown, is shown by something that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guide" / "security.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| [stride ]+ \|", line)]


def test_each_boundary_has_rows_and_each_letter_stands_somewhere():
    assert len(ROWS) > 25
    assert {letter for row in ROWS for letter in row.split("|")[1].split()} == set("stride")


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[2].strip()[:60] for row in ROWS])
def test_a_row_names_what_shows_it(row):
    shown = re.findall(r"`(tests/[^`]+|python -m benchmarks\.\w+)`", row.split("|")[4])
    assert shown
    for what in shown:
        path = what if what.startswith("tests/") else what.removeprefix("python -m ").replace(".", "/") + ".py"
        assert (ROOT / path).exists(), what
