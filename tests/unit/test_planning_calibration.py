"""A ladder of single operations becomes a machine and constants; files that are no ladder are refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.plan_lab.reality_cases import needed_bytes, step_s
from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.calibration import SOFTWARE, calibrated, ladder_from_text
from whaleflux.planning.known_models import model_named
from whaleflux.planning.layers import layer_times
from whaleflux.planning.machine import Machine
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training

RECORDED = json.loads((Path(__file__).parents[2] / "benchmarks/plan_lab/h200_reality.json").read_text())
LADDER = RECORDED["ladder"]
SHEET = Machine.of(CATALOGUE.types["H200"])
RUN = CliRunner()


def found(**changed):
    return calibrated(SHEET, ladder_from_text(json.dumps(LADDER | changed)))


@pytest.fixture
def ladder_file(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(LADDER))
    return path


def test_recorded_steps_and_peaks_of_a_real_gpu_are_predicted():
    steps = np.array([step_s(case, found()) / case["step_s"] - 1 for case in RECORDED["cases"]])
    peaks = np.array([needed_bytes(case, found()) / case["allocated_bytes"] - 1 for case in RECORDED["cases"]])
    assert len(steps) >= 12
    assert np.abs(steps).mean() < 0.05
    assert np.abs(steps).max() < 0.10
    assert np.abs(peaks).mean() < 0.05


def test_a_gpu_that_multiplies_at_half_the_rate_plans_at_half_the_rate():
    slower = found(matmul=[[m, n, k, 2 * s] for m, n, k, s in LADDER["matmul"]])
    assert slower.machine.flops == pytest.approx(found().machine.flops / 2, rel=1e-6)


def test_each_way_to_run_layers_that_was_measured_is_known_by_its_name():
    assert set(found().kernels) == set(SOFTWARE)
    eager, constants = found().of(Training(), "eager")
    assert not eager.fused
    assert constants.eager_traffic > found().of(Training(), "compiled")[1].fused_traffic


def test_a_way_that_was_not_measured_stays_as_it_was():
    how = Training()
    assert found(layer=[]).of(how, "compiled")[0] == how


def collectives(ranks):
    return [
        [kind, ranks, 1 << 30, (1 << 30) / rate]
        for kind, rate in (("all_reduce", 300e9), ("all_gather", 400e9), ("reduce_scatter", 390e9))
    ]


def test_collectives_set_the_islands_rates():
    fabric = found(collective=collectives(8)).machine.fabric
    assert fabric.island_bytes_per_s == pytest.approx(350e9)
    assert fabric.switch_bytes_per_s == pytest.approx(525e9)


def test_what_an_idle_context_holds_is_not_planned_with():
    usual, more = (found(context_bytes=size).machine.usable_bytes for size in (0, 2_650_000_000))
    assert usual == SHEET.usable_bytes
    assert usual - more == pytest.approx(2e9)


def test_attention_over_a_ring_is_as_slow_as_over_a_ranks_part_of_the_sequence():
    def core_s(sequence, cp):
        plans = Plans.of(cp=cp, micro_batch=1, global_batch=1, sequence=sequence)
        short = replace(found().constants, attention_short=512.0)
        return float(layer_times(model_named("llama-3.1-8b"), SHEET, plans, Training(), short).core_s)

    assert core_s(8192, 8) == pytest.approx(core_s(8192, 1) / 8 * (1 + 512 / 1024) / (1 + 512 / 8192))


def test_collectives_of_too_few_gpus_say_nothing_of_the_switches():
    fabric = found(collective=collectives(4)).machine.fabric
    assert fabric.island_bytes_per_s == pytest.approx(300e9)
    assert fabric.switch_bytes_per_s == SHEET.fabric.switch_bytes_per_s > 0


HOSTILE = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[]", "no ladder of version 1"),
    "another version": (json.dumps(LADDER | {"version": 2}), "no ladder of version 1"),
    "made on a CPU": (json.dumps(LADDER | {"simulated": True}), "measured on a CPU"),
    "no multiplications": (json.dumps(LADDER | {"matmul": []}), "has no rows in matmul"),
    "a short row": (json.dumps(LADDER | {"copy": [[1]]}), "copy: each row has 2 columns"),
    "NaN": (json.dumps(LADDER | {"copy": [[1e9, float("nan")]]}), "copy must be a number"),
    "negative": (json.dumps(LADDER | {"copy": [[1e9, -1]]}), "copy must be a number"),
    "words": (json.dumps(LADDER | {"matmul": [["a", 1, 1, 1]]}), "matmul must be a number"),
    "too many": (json.dumps(LADDER | {"copy": [[1, 1]] * 10_001}), "at most 10000 rows"),
    "a layer of no width": (
        json.dumps(LADDER | {"layer": [["eager", 8192, 4096, 1e-6, 5632, 0.1, 0.1, 1]]}),
        "layer must be a number between 1 and",
    ),
    "deep": ("[" * 100_000, "is no JSON"),
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_ladder_is_refused_by_name(text, said):
    with pytest.raises(InvalidArgument, match=r"--calibration.*") as refused:
        ladder_from_text(text)
    assert said in str(refused.value)


def test_layers_that_were_not_measured_are_said():
    assert found().lacks() == ""
    eager = found(layer=[row for row in LADDER["layer"] if row[0] in ("eager", "autocast")])
    assert eager.lacks("eager") == ""
    assert "measured eager, autocast alone: compiled layers count with fitted constants" in eager.lacks()
    assert "measured no layers" in found(layer=[]).lacks()


def test_fits_counts_with_what_was_measured(ladder_file):
    asked = ("fits", "llama-3.1-8b", "--gpu", "H200", "--gpus", "8", "-o", "json")
    plain, measured = (
        json.loads(RUN.invoke(app, [*asked, *more]).output) for more in ((), ("--calibration", str(ladder_file)))
    )
    assert measured["step_s"] != plain["step_s"]
    assert measured["fits"]


@pytest.mark.parametrize(
    ("gpu", "file", "said"),
    [("H100-80GB", "", "was measured on H200, not on H100-80GB"), ("H200", "/nowhere.json", "cannot be read")],
)
def test_a_ladder_of_other_gpus_or_none_is_refused(ladder_file, gpu, file, said):
    done = RUN.invoke(app, ["fits", "llama-3.1-8b", "--gpu", gpu, "--calibration", file or str(ladder_file)])
    assert done.exit_code != 0
    assert said in str(done.exception) + done.output


def test_calibrate_says_where_to_run_it_when_there_is_no_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = RUN.invoke(app, ["calibrate"])
    assert done.exit_code != 0
    assert "sees no GPU on this machine" in str(done.exception) + done.output


def test_a_plan_counts_with_what_was_measured_of_its_type(ladder_file):
    asked = ("plan", "llama-3.1-8b", "--gpu", "H200", "--gpus", "8", "-o", "json")
    plain, measured = (
        json.loads(RUN.invoke(app, [*asked, *more]).output) for more in ((), ("--calibration", str(ladder_file)))
    )
    assert measured != plain


def test_two_ladders_of_one_type_are_refused(ladder_file):
    done = RUN.invoke(app, ["plan", "llama-3.1-8b", "--gpu", "H200", *("--calibration", str(ladder_file)) * 2])
    assert "has one already" in str(done.exception) + done.output


@pytest.fixture
def eager_file(tmp_path):
    """Of a node where nothing was compiled."""
    path = tmp_path / "eager.json"
    path.write_text(json.dumps(LADDER | {"layer": [row for row in LADDER["layer"] if row[0] == "eager"]}))
    return str(path)


@pytest.mark.parametrize("command", ["plan", "fits"])
@pytest.mark.parametrize("more", [(), ("--software", "autocast")])
def test_a_way_that_was_not_measured_is_refused_with_those_that_were(eager_file, command, more):
    asked = [command, "llama-3.1-8b", "--gpu", "H200", "--gpus", "8", "--calibration", eager_file]
    done = RUN.invoke(app, [*asked, *more])
    assert "take one of: eager" in str(done.exception)
    assert RUN.invoke(app, [*asked, "--software", "eager"]).exit_code == 0


def test_what_is_emitted_runs_as_the_plan_was_made(ladder_file):
    asked = ["plan", "llama-3.1-8b", "--gpu", "H200", "--gpus", "8", "--emit", "torchtitan", "--calibration", str(ladder_file)]  # fmt: skip
    eager, compiled = (RUN.invoke(app, [*asked, "--software", one]).output for one in ("eager", "compiled"))
    assert "enable = true" in compiled
    assert "enable = true" not in eager


def test_a_file_that_cannot_be_written_is_known_before_it_is_measured(tmp_path):
    done = RUN.invoke(app, ["calibrate", "--file", str(tmp_path)])
    assert "--file" in str(done.exception)
    assert "cannot be written" in str(done.exception)
