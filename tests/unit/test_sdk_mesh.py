"""What `device_mesh` says of files that are wrong, before any rank talks to another."""

import json

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.sdk import device_mesh

pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({}, "mesh: is missing"),
        ({"mesh": {"tp": 0}}, "mesh.tp: is '0', must be a whole number from 1"),
        ({"mesh": {"tp": True}}, "mesh.tp: is 'True'"),
        ({"mesh": {"dp_shard": 2, "tp": 2}}, r"mesh: is for 4 ranks \(dp_shard 2 x tp 2\), and WORLD_SIZE is 1"),
        ({"mesh": {}, "recomputed": "abc"}, "recomputed: is 'abc', must be a number from 0 to 1"),
        ({"mesh": {}, "recomputed": None}, "recomputed: is 'None'"),
        ({"mesh": {}, "parameters": ["float16"]}, "parameters: is"),
        ({"mesh": {}, "reduce": {}}, "reduce: is"),
        ({"mesh": {}, "stage_layers": [4, 4]}, "stage_layers: is .*must be 1 whole numbers"),
        ({"mesh": {}, "stage_layers": ["4"]}, "stage_layers: is"),
        ("{oops", "holds no JSON"),
        ("[1]", "cannot be read"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_the_field_and_the_fix_are_named(plan, said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InvalidArgument, match=said) as wrong:
        device_mesh(plan, "cpu")
    assert "whaleflux plan MODEL" in str(wrong.value)


def test_the_variable_holds_or_names_the_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for said in (json.dumps({"mesh": {"dp_shard": 2}}), str(tmp_path / "mine.json")):
        (tmp_path / "mine.json").write_text(json.dumps({"mesh": {"dp_shard": 2}}))
        monkeypatch.setenv("MESH", said)
        with pytest.raises(InvalidArgument, match="is for 2 ranks"):
            device_mesh(device="cpu")
