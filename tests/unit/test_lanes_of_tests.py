"""`make test` fails when a lane does, however that ended, unless few tests did that pass alone; no folder of tests is left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.test_lanes import AT_MOST, FIRST, SECOND, Lane, passed_alone, second_try, worse

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
    assert all((ROOT / path).exists() for path in left_out)


A, B, C, D = (f"tests/integration/test_{name}.py::test" for name in "abcd")
CLEAN = Lane(0, {A: "passed"})


def failing(*tests, code=1):
    return Lane(code, {"tests/contract/test_x.py::test": "passed", **dict.fromkeys(tests, "failed")})


@pytest.mark.parametrize(("first", "second", "again"), [
    (CLEAN, CLEAN, []),
    (failing(A), CLEAN, [A]),
    (failing(A, B, C), failing(D), [A, B, C, D]),
    (failing(A), Lane(5, {}), [A]),
    (failing(A, B, C, D), CLEAN, []),  # more than a few
    (failing(A), failing("tests/unit/test_x.py::test"), []),  # deterministic
    (failing(A), failing("tests/simulation/test_x.py::test"), []),
    (failing(A), failing(B, code=2), []),  # a file that could not be read, or an interrupt
    (failing(A), failing(B, code=-9), []),
    (Lane(1, None), CLEAN, []),  # ended before it could say which
    (Lane(1, {A: "passed"}), CLEAN, []),  # failed by something that is no test
])  # fmt: skip
def test_few_that_a_busy_machine_may_have_failed_are_run_once_more(first, second, again):
    assert second_try([first, second]) == again
    assert len(again) <= 2 * AT_MOST


@pytest.mark.parametrize(
    ("alone", "passed"),
    [
        (Lane(0, {A: "passed", B: "passed"}), True),
        (Lane(1, {A: "passed", B: "failed"}), False),
        (Lane(0, {A: "passed", B: "skipped"}), False),
        (Lane(0, {A: "passed"}), False),
        (Lane(0, None), False),
    ],
)
def test_each_of_them_has_to_pass_then(alone, passed):
    assert passed_alone([A, B], alone) is passed


SAMPLE = """
import pytest

@pytest.fixture
def broken_end():
    yield
    raise OSError

def test_good(): pass
def test_bad(): assert False
def test_bad_end(broken_end): pass
@pytest.mark.skip
def test_left_out(): pass
"""


def test_how_each_test_ended_is_written(tmp_path):
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    plugin = ["-p", "tools.test_outcomes", "--outcomes", "outcomes.json", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, "test_sample.py"]
    subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        check=False,
    )
    ended = json.loads((tmp_path / "outcomes.json").read_text())
    assert ended == {
        "test_sample.py::test_good": "passed",
        "test_sample.py::test_bad": "failed",
        "test_sample.py::test_bad_end": "failed",
        "test_sample.py::test_left_out": "skipped",
    }
