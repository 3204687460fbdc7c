"""The ladder that `whaleflux calibrate` climbs, here on the CPU and small: what it writes is what plans read."""

import json
from dataclasses import asdict

import pytest

torch = pytest.importorskip("torch")
from whaleflux.errors import InvalidArgument  # noqa: E402
from whaleflux.planning.calibration import ladder_from_text  # noqa: E402
from whaleflux.sdk import ladder  # noqa: E402


def test_each_rung_is_measured_and_a_cpu_is_never_taken_for_a_gpu(monkeypatch):
    monkeypatch.setattr(ladder, "HOT_S", 0.001)
    monkeypatch.setattr(ladder, "LEAST_S", 0.001)
    said = asdict(ladder.measure(compiled=False, small=0.02))
    text = json.dumps(said)
    with pytest.raises(InvalidArgument, match="measured on a CPU"):
        ladder_from_text(text)
    read = ladder_from_text(json.dumps(said | {"simulated": False}))
    assert all((read.matmul, read.attention, read.copy, read.optimizer, read.layer, read.head, read.launch))
    assert {row[0] for row in read.layer} == {"eager", "autocast"}


def test_collectives_are_measured_among_all_ranks():
    found = ladder.collectives(2, "gloo", 0.001)
    assert {row[0] for row in found} == set(ladder.COLLECTIVES)
    assert all(taken > 0 for *_, taken in found)
