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
        "slept_s": 5.0,
        **more,
    }


def lines():
    seen = [window(at, 400_000 if at < 1 else 510_000, sent=5 * 10**9) for at in range(0, 80, 5)] + [
        {"cores": 0.001, "gpus": 1}
    ]
    rank = [phase("full", 0), phase("half", 20), phase("reduce", 40, sent_bytes=20 * 10**9)]
    rank += [{"report": {"start_s": 21, "end_s": 39, "data_s": 6.0}}]
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


def test_bytes_cost_and_cores():
    _, found = scored(*lines())
    assert found["nvlink_pct"] == pytest.approx(0.0, abs=1e-9)
    assert found["sdk_pct"] == pytest.approx(1.0)
    assert found["cores_per_8"] == pytest.approx(0.008)


def test_one_gpu_has_no_links_and_it_all_fits_into_six_minutes():
    assert not any(one["kind"] == "reduce" for one in plan(1, 1.0))
    assert sum(one["seconds"] for one in plan(2, 1.0)) < 240
