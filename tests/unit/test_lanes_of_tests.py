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
    lanes = [[lane for lane in (FIRST, SECOND) if folder in lane] for folder in folders]
    assert all(len(having) == 1 for having in lanes)


def test_what_one_lane_leaves_out_the_other_has():
    left_out = {arg.removeprefix("--ignore=") for arg in FIRST if arg.startswith("--ignore=")}
    assert left_out and left_out <= set(SECOND)
    assert all(any((ROOT / folder).glob("test_*.py")) for folder in left_out)
