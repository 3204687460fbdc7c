"""`make test` fails when a lane does, however that ended, and no folder of tests is left out."""

from pathlib import Path

import pytest

from tools.test_lanes import FIRST, SECOND, worse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([0, -9], 9), ([5, 0], 0), ([5, 1], 1), ([5, 5], 5)]
)
def test_the_worse_end_counts(codes, code):
    assert worse(codes) == code


def test_each_folder_of_tests_is_in_a_lane():
    folders = {
        f"tests/{file.parent.relative_to(ROOT / 'tests').parts[0]}" for file in (ROOT / "tests").rglob("test_*.py")
    }
    assert folders == {*FIRST, *SECOND}
