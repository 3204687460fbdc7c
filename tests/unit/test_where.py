"""docs/architecture.md, "Where it is decided": each file is there and has the name that the page promises."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text().partition("## 12. Where it is decided")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][
    1:
]


def place_of(cell):
    path = cell.strip("`")
    if (ROOT / path).exists():
        return ROOT / path
    service, _, rest = path.partition("/")
    return ROOT / "services" / service / f"whaleflux_{service}" / rest


def test_the_table_is_read():
    assert len(ROWS) > 20


@pytest.mark.parametrize(("question", "place", "name"), ROWS, ids=[row[1] for row in ROWS])
def test_each_thing_is_decided_where_the_page_says(question, place, name):
    text = place_of(place).read_text()
    assert name.strip("`") in text


def test_tests_that_the_page_names_exist():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    named = [word for row in ROWS for word in row[0].replace("`", " ").split() if word.startswith("test_")]
    assert named
    assert all(f"def {name.strip(').,')}(" in tests for name in named)
