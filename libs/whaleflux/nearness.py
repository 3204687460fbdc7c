"""Which known word somebody may have meant: only such as differ by a slip of the fingers. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def near(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The nearest of `known`, at most `most`: one slip in words of up to five letters, two in longer ones."""
    allowed = 1 if len(word) <= 5 else 2
    found = sorted((slips(word.lower(), other.lower()), other) for other in set(known))
    return [other for distance, other in found if distance <= allowed][:most]


def slips(one: str, other: str) -> int:
    """Letters left out, added, taken for another or swapped (optimal string alignment distance)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        last, row = row, [i]
        for j, wanted in enumerate(other, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before = last
    return row[-1]
