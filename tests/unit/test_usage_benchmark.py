"""How what was seen of GPUs is scored against what was counted: from made-up lines, no GPU."""

import pytest

from benchmarks.usage_h200 import plan, scored


def window(start_s, tensor, sent=0):
    gpu = {"tensor_ppm": tensor, "nvlink_sent_bytes": sent}
    return {"start_s": start_s, "end_s": start_s + 5, "gpus": [gpu]}


def phase(name, start_s, **more):
    return {
        "phase": name,
        "start_s": start_s,
        "end_s": start_s + 20,
        "flops": 0.5 * 989.4e12 * 20,
        "slept_s": 0.0 if name == "full" else 5.0,
        **more,
    }


def report(start_s, end_s, **parts):
    return {
        "report": {
            "start_s": start_s,
            "end_s": end_s,
            "first_step": 11,
            "last_step": 20,
            "data_s": 0.0,
            "host_s": 0.0,
            **parts,
        }
    }


def lines():
    seen = [window(at, 400_000 if at < 1 else 510_000, sent=5 * 10**9) for at in range(0, 80, 5)] + [
        {"cores": 0.001, "gpus": 1}
    ]
    rank = [
        phase("full", 0, look_cost_s=2.0),
        phase("half", 20, look_cost_s=0.03),
        phase("reduce", 40, sent_bytes=20 * 10**9),
    ]
    rank += [phase("host", 100, look_cost_s=0.05), phase("launches", 200, graph_s=0.02, look_cost_s=0.01)]
    rank += [report(1, 19, host_s=None), report(2, 18, host_s=0.0), report(21, 39, data_s=5.4)]
    rank += [report(101, 110, host_s=None), report(110, 119, host_s=2.7), report(201, 202, host_s=0.7)]
    rank += [phase(f"plain {at}", 60, blocks_s=[0.1, 0.2, 9.0]) for at in range(2)]
    rank += [phase(f"told {at}", 60, blocks_s=[0.1, 0.202, 9.0]) for at in range(2)]
    return seen, [rank]


def test_windows_within_a_phase_are_compared_with_what_it_counted():
    rows, found = scored(*lines())
    full = next(row for row in rows if row["what"] == "MFU %, full, GPU 0")
    assert full["counted"] == pytest.approx(50.0)
    assert (full["by counters"], full["windows"]) == (pytest.approx(51.0), 2), "the first window begins with the phase"
    assert found["mfu_points"] == pytest.approx(1.0)
    assert found["data_points"] == pytest.approx(5.0)


def test_what_was_told_is_compared_with_what_was_slept_where_something_was_told():
    rows, found = scored(*lines())
    by_name = {row["what"]: (row.get("counted"), row["by counters"]) for row in rows}
    assert by_name["host wait %, host, rank 0"] == (pytest.approx(25.0), pytest.approx(30.0))
    assert by_name["wait for launches %, steps of 100.00 ms"] == (pytest.approx(80.0), pytest.approx(70.0))
    assert found["host_points"] == pytest.approx(5.0)


def test_looks_cost_what_those_behind_the_first_one_cost():
    rows, found = scored(*lines())
    assert [row["by counters"] for row in rows if row["what"].startswith("a look")] == pytest.approx([2000, 30, 50, 10])
    assert found["look_pct"] == pytest.approx(100 * 0.04 / (500 * 0.2))


def test_bytes_cost_and_cores():
    _, found = scored(*lines())
    assert found["nvlink_pct"] == pytest.approx(0.0, abs=1e-9)
    assert found["sdk_pct"] == pytest.approx(1.0)
    assert found["cores_per_8"] == pytest.approx(0.008)


def test_one_gpu_has_no_links_and_it_all_fits_into_six_minutes():
    assert not any(one["kind"] == "reduce" for one in plan(1, 1.0))
    assert sum(one["seconds"] for one in plan(2, 1.0)) < 300
