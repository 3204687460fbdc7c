"""Roll-ups of reports keep what they sum: no time is made up, none is lost, and the order in which reports came does not matter."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ledger_world import BEGIN_MS, sample, step
from whaleflux_console.ledger import usage
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.schemas import SAMPLES, STEPS

REPORTS = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 7_000]), st.integers(1, 40_000), st.one_of(st.none(), st.integers(0, 1_000_000))), max_size=30
)  # fmt: skip
KEPT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


def spans(drawn):
    """(start, end, value) of reports one after the other, some behind a gap."""
    at = BEGIN_MS
    for gap, length, value in drawn:
        yield at + gap, at + gap + length, value
        at += gap + length


def written(tmp_path, rows, schema):
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    return [tmp_path / "rows.parquet"]


@KEPT
@given(REPORTS, st.randoms(use_true_random=False))
def test_samples(tmp_path, engine, drawn, chance):
    known = list(spans(drawn))
    rows = [sample(start_ms=a, end_ms=b, tensor_ppm=v, sequence=n) for n, (a, b, v) in enumerate(known)]
    rows += [row for row in rows if chance.random() < 0.3]
    chance.shuffle(rows)
    minutes = usage.samples_of(engine, BEGIN_MS, written(tmp_path, rows, SAMPLES))
    coarser = usage.coarser_samples(engine, minutes, 300_000)
    for found in (minutes.to_pylist(), coarser.to_pylist()):
        for unknown in (True, False):
            mine = [each for each in found if (each["tensor_ppm"] is None) is unknown]
            covered = sum(each["end_ms"] - each["start_ms"] for each in mine)
            assert covered == sum(b - a for a, b, v in known if (v is None) is unknown)
        weighed = sum((each["tensor_ppm"] or 0) * (each["end_ms"] - each["start_ms"]) for each in found)
        exact = sum((v or 0) * (b - a) for a, b, v in known)
        assert exact - 2 * sum(b - a for a, b, _ in known) <= weighed <= exact
        ends = sorted((each["start_ms"], each["end_ms"]) for each in found)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


@KEPT
@given(REPORTS, st.randoms(use_true_random=False))
def test_steps(tmp_path, engine, drawn, chance):
    known = list(spans(drawn))
    rows = [
        step(start_ms=a, end_ms=b, first=n * 10 + 1, last=n * 10 + 10, data_us=v, tokens=n, sequence=n)
        for n, (a, b, v) in enumerate(known)
    ]
    rows += [row for row in rows if chance.random() < 0.3]
    chance.shuffle(rows)
    work = usage.steps_of(engine, BEGIN_MS, written(tmp_path, rows, STEPS))
    for found in (work.to_pylist(), usage.coarser_steps(engine, work, 300_000).to_pylist()):
        assert sum(each["tokens"] for each in found) == sum(range(len(known)))
        assert sum(each["data_us"] or 0 for each in found) == sum(v or 0 for _, _, v in known)
        assert sum(each["end_ms"] - each["start_ms"] for each in found) == sum(b - a for a, b, _ in known)
        unknown = sum(each["end_ms"] - each["start_ms"] for each in found if each["data_us"] is None)
        assert unknown == sum(b - a for a, b, v in known if v is None)
