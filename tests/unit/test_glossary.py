"""docs/glossary.md: few words, each where the page says."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")][1:]


def test_there_are_at_most_twenty_words():
    assert 10 < len(ROWS) <= 20


def test_each_word_stands_in_the_file_that_the_page_names():
    for row in ROWS:
        words, _, place = (cell.strip() for cell in row.strip("|").split("|"))
        text = (ROOT / place.strip("`")).read_text().lower()
        for word in words.lower().replace(",", "").split():
            assert word.removesuffix("s") in place + text, f"{word} is not in {place}"
