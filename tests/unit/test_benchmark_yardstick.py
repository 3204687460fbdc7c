"""A target means the same on every host: read through the yardstick, told in one table, nothing passed over in silence."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import Report, Target, main, write_json
from benchmarks.report import markdown, read_results, summary, target_rows
from benchmarks.yardstick import LOOPS, REFERENCE, Yardstick, host_yardstick, numpy_loop, python_loop

SLOW = replace(REFERENCE, python=REFERENCE.python * 2.6)


def test_the_reference_host_is_its_own_measure() -> None:
    assert [REFERENCE.slowness(loop) for loop in LOOPS] == [1.0] * len(LOOPS)


def test_a_slower_host_owes_proportionally_fewer_decisions() -> None:
    assert Target("rate", 4_290, 10_000, "/s", "higher", per="python").met(SLOW)
    assert not Target("rate", 3_800, 10_000, "/s", "higher", per="python").met(SLOW)
    assert not Target("rate", 4_290, 10_000, "/s", "higher", per="python").met(REFERENCE)


def test_a_slower_host_may_take_proportionally_longer() -> None:
    assert Target("p99", 225, 100, "ms", per="python").met(SLOW)
    assert not Target("p99", 265, 100, "ms", per="python").met(SLOW)
    assert not Target("p99", 225, 100, "ms", per="python").met(REFERENCE)


def test_a_faster_host_is_not_let_off() -> None:
    fast = replace(REFERENCE, python=REFERENCE.python / 2)
    assert not Target("rate", 12_000, 10_000, "/s", "higher", per="python").met(fast)


def test_each_target_is_read_through_its_own_loop() -> None:
    slow_disk = replace(REFERENCE, fsync=REFERENCE.fsync * 10)
    assert Target("puts", 120, 1_000, "/s", "higher", per="fsync").met(slow_disk)
    assert not Target("puts", 120, 1_000, "/s", "higher", per="python").met(slow_disk)


def test_a_ratio_is_the_same_on_every_host() -> None:
    ratio = Target("ratio", 0.2, 0.3, "", "higher")
    assert not ratio.met(SLOW)
    assert not ratio.met(REFERENCE)


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_what_was_not_measured_is_not_met(better: str) -> None:
    assert not Target("gone", math.nan, 1, "", better).met(REFERENCE)  # type: ignore[arg-type]


def test_a_host_is_measured_once_per_boot(tmp_path: Path) -> None:
    cache, measured = tmp_path / "kept" / "yardstick.json", []

    def measure() -> Yardstick:
        measured.append(1)
        return SLOW

    assert [host_yardstick(cache, measure) for _ in range(3)] == [SLOW] * 3
    assert len(measured) == 1


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"key": "another boot", "seconds": {}}', "not json"])
def test_another_boot_or_a_damaged_file_is_measured_again(tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "yardstick.json"
    cache.write_text(damage, encoding="utf-8")
    assert host_yardstick(cache, lambda: SLOW) == SLOW
    assert host_yardstick(cache, lambda: REFERENCE) == SLOW  # the measurement has replaced it


def test_the_loops_do_the_same_work_every_time() -> None:
    assert python_loop(2) == python_loop(2) == 50_171_571
    assert numpy_loop(3) == numpy_loop(3)


def test_a_result_carries_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.common.host_yardstick", lambda: SLOW)
    path = tmp_path / "toy.json"
    rate = Target("rate", 4_290.0, 10_000, "/s", "higher", per="python")
    assert main("toy", lambda _: Report(targets=[rate]), argv=["--quick", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["host"]["yardstick"]["slowness"]["python"] == 2.6
    assert result["targets"][0]["met"] is True
    assert result["targets"][0]["on_reference_host"] == pytest.approx(11_154)
    assert ">= 10,000 /s per python loop" in capsys.readouterr().out


def test_the_report_names_what_was_met_missed_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.host_yardstick", lambda: SLOW)
    targets = [
        Target("good", 1.0, 2.0, "s"),
        Target("bad", 3.0, 2.0, "s"),
        Target("unknown", math.nan, 2.0, "s"),
    ]
    main("ran", lambda _: Report(targets=targets), argv=["--json", str(tmp_path / "ran.json")])
    results = read_results(tmp_path, ["missing", "ran"])
    rows = target_rows(results)
    assert [(row["benchmark"], row["target"], row[""]) for row in rows] == [
        ("missing", "", "not run"),
        ("ran", "good", "met"),
        ("ran", "bad", "MISSED"),
        ("ran", "unknown", "MISSED"),
    ]
    assert summary(rows) == "1 targets met, 2 missed; 1 benchmarks not run"
    page = markdown(results)
    assert "| ran | bad | 3 s |  | <= 2 s | full | MISSED |" in page
    assert "python 2.6" in page


def test_a_benchmark_without_targets_is_shown(tmp_path: Path) -> None:
    write_json(tmp_path / "plain.json", {"quick": True, "targets": []})
    assert target_rows(read_results(tmp_path, ["plain"]))[0][""] == "no target"
