"""The ledger's benchmarks, small: their simulated truth is found again, and what they report is what they measured."""

import gzip
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from benchmarks import forecast_error
from benchmarks.common import Options
from benchmarks.ledger_lab.pipeline import step
from benchmarks.ledger_lab.wasteful_hour import GPUS, WastefulHour
from benchmarks.waste_attribution import ALONE, ALONE_SHARE, TAKEN, shares, truth
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES, CostClass


class TestTheSimulatedHour:
    @pytest.mark.parametrize("kind", ALONE)
    def test_every_millisecond_is_somewhere_and_the_injected_share_is_there(self, kind):
        hour = WastefulHour({kind: ALONE_SHARE}, Random(1)).play()
        assert abs(sum(hour.truth_ms.values()) - GPUS * HOUR_MS) < 10_000
        assert truth(hour)[kind] > 15

    def test_a_pipeline_waits_as_theory_says_where_nothing_varies(self):
        whole, busy = step(4, 8, 1.0, 0.0, Random(1))
        assert whole == pytest.approx(3 * (8 + 3))
        assert busy == pytest.approx([24.0] * 4)


class TestAttribution:
    @pytest.mark.parametrize("kind", ALONE)
    def test_injected_waste_is_found_within_two_points(self, kind):
        hour = WastefulHour({kind: ALONE_SHARE}, Random(2)).play()
        is_so, found = truth(hour), shares(hour.facts)
        assert all(abs(found[one] - is_so[one]) < 2 for one in CLASSES)

    @pytest.mark.parametrize("taken", TAKEN)
    def test_signals_that_are_taken_away_leave_unknown(self, taken):
        mix = {CostClass.DATA: 0.1, CostClass.COMM_AVOIDABLE: 0.1, CostClass.LOST: 0.1, CostClass.ALLOCATED_IDLE: 0.1}
        hour = WastefulHour(mix, Random(3)).play()
        full, found = shares(hour.facts), shares(TAKEN[taken](hour.facts))
        assert all(found[one] < full[one] + 0.5 for one in CLASSES if one is not CostClass.UNKNOWN)
        assert taken == "counters" or found[CostClass.UNKNOWN] > full[CostClass.UNKNOWN] + 1


class TestIdentity:
    def test_generated_histories_leave_nothing_over(self, monkeypatch):
        from benchmarks import ledger_identity

        monkeypatch.setattr(ledger_identity, "QUICK", 5)
        monkeypatch.setattr(ledger_identity, "QUICK_CARDS", 20)
        report = ledger_identity.measure(Options(Path(), 1, quick=True, json_path=None, extra=Namespace()))
        assert [target.value for target in report.targets[:2]] == [0, 0]


class TestForecastError:
    def test_a_trace_is_billed_by_day_and_a_steady_one_is_foretold(self, tmp_path):
        day = datetime(2026, 1, 1, tzinfo=UTC)
        jobs = [f"{day + timedelta(days=n):%Y-%m-%d} 12:00:00,86400,24,0,q" for n in range(60)]
        with gzip.open(tmp_path / "trace.csv.gz", "wt") as file:
            file.write("\n".join(["timestamp,duration,num_gpus,gpu_time,cluster", *jobs]))
        spent = forecast_error.spending(tmp_path / "trace.csv.gz")
        assert set(spent) == {"all", "q"}
        assert set(spent["q"].values()) == {24 * 24 * forecast_error.USD_MICROS_PER_GPU_HOUR}
        trials = list(forecast_error.trials(spent["q"], 7))
        assert len(trials) == len(spent["q"]) - forecast_error.KNOWN_DAYS - 7 + 1
        assert {trial.errors for trial in trials} == {(0.0, 0.0)}
