"""Some of the faults of `benchmarks/dataset_faults`, each kind at least once: never a wrong byte. The thousand are the benchmark's full run."""

import json
import subprocess
import sys

import pytest

from benchmarks.common import ROOT
from benchmarks.dataset_faults import KINDS

pytestmark = pytest.mark.integration


def test_no_fault_brings_a_wrong_byte_through(tmp_path):
    (ROOT / ".build").mkdir(exist_ok=True)
    result = tmp_path / "faults.json"
    command = [sys.executable, "-m", "benchmarks.dataset_faults", "--quick", "--json", str(result)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.exists(), ended.stdout[-2000:] + ended.stderr[-2000:]
    rows = {row["what"]: row for row in json.loads(result.read_text())["rows"]}
    assert set(rows) == set(KINDS)
    assert {row["wrong files"] for row in rows.values()} == {0}
    assert all(row["struck"] for row in rows.values()), rows
