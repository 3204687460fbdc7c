"""What an update names: checked in one place, said in one way."""

from pathlib import Path

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.rpc.update_masks import paths_of

ROOT = Path(__file__).parents[2]


def test_each_path_counts_once_in_its_order():
    assert paths_of(["b", "a", "b"], ("a", "b", "c")) == ["b", "a"]
    assert paths_of([], ("a",), needed=False) == []


@pytest.mark.parametrize(
    ("paths", "needed", "says"),
    [
        ([], True, "update_mask: is empty; name what to change: a, b"),
        (["a", "x" * 100], True, f"update_mask: '{'x' * 64}' cannot be changed; use a, b"),
        (["name"], False, "update_mask: 'name' cannot be changed; use a, b"),
    ],
)
def test_what_cannot_be_changed_is_refused_with_what_can(paths, needed, says):
    with pytest.raises(InvalidArgument) as found:
        paths_of(paths, ("a", "b"), needed=needed)
    assert str(found.value) == says


def test_nobody_checks_masks_by_themselves():
    files = [*(ROOT / "libs").rglob("*.py"), *(ROOT / "services").rglob("*.py")]
    saying = {
        file.name
        for file in files
        if 'iolation("update_mask"' in (text := file.read_text()) or 'add("update_mask"' in text
    }
    assert saying == {"update_masks.py"}
