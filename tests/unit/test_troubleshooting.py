"""Every text that the page on troubleshooting quotes still stands in the code that says it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
SOURCES = [path for folder in ("libs", "services") for path in (ROOT / folder).rglob("*.py") if "v1" not in path.parts]
# Strings that are divided over lines are one again.
CODE = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in SOURCES))
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
QUOTED = sorted({text for row in ROWS for text in re.findall(r"`([^`]+)`", row.split("|")[1]) if text != "sends"})


@pytest.mark.parametrize("text", QUOTED)
def test_a_quoted_text_is_in_the_code(text):
    assert text in CODE


def test_the_page_quotes_something():
    assert len(QUOTED) > 25
