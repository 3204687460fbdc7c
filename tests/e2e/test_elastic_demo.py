"""One pool that breathes, with real Ray: what `make demo-elastic` shows."""

import json
from pathlib import Path

import pytest

from tests.support.suite import state_folder
from whaleflux.demo.elastic import ElasticOptions, run

RAY = Path(__file__).parents[2] / ".venv-ray" / "bin" / "python"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not RAY.exists(), reason="Ray is not installed beside; make ray installs it"),
]


def test_everything_that_the_elastic_demo_claims_was_seen():
    with state_folder() as folder:
        code = run(ElasticOptions(RAY, folder / "demo", report=folder / "report.json"))
        report = json.loads((folder / "report.json").read_text())
    assert {claim for claim, seen in report["checks"].items() if not seen} == set()
    assert code == 0
    assert min(gpus for _, gpus in report["training_gpus"] if gpus) < 4
