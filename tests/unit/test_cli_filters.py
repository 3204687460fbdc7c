"""The same flags narrow and order every list; what is wrong in them is told with what would be right."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.cli import output
from whaleflux.cli.filters import contains, enum_words, ordered, since_s, wanted, words
from whaleflux.cli.job_commands import lately
from whaleflux.cli.output import Column, Format
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import scheduler_pb2 as pb

STATES = enum_words(pb.JobState, "JOB_STATE_")
COLUMNS = [
    Column("NAME", lambda j: j.name),
    Column("COST", lambda j: f"${j.cost_usd:.2f}", value=lambda j: j.cost_usd),
    Column("LOSS", lambda j: "-", wide=True, value=lambda j: j.loss if j.HasField("loss") else ""),
]
JOBS = [pb.Job(name="b", cost_usd=9), pb.Job(name="a", cost_usd=100, loss=0.5), pb.Job(name="c", cost_usd=20)]


def names(jobs):
    return [job.name for job in jobs]


def test_words_are_read_as_people_write_them():
    assert words("running, queued", "--state", STATES) == {"RUNNING", "QUEUED"}
    assert words("", "--state", STATES) == frozenset()
    assert "UNSPECIFIED" not in STATES


def test_a_word_that_is_none_is_told_with_those_that_are():
    with pytest.raises(InvalidArgument) as wrong:
        words("runing", "--state", STATES)
    (violation,) = wrong.value.violations
    assert violation.field == "--state"
    assert "running" in violation.description


def test_a_filter_that_is_not_given_lets_everything_pass():
    assert wanted(frozenset(), "RUNNING")
    assert not wanted({"QUEUED"}, "RUNNING")
    assert contains("", "x")
    assert contains("ANN", "user/ann")
    assert not contains("bob", "user/ann")


@pytest.mark.parametrize(
    ("sort", "order"),
    [("", ["b", "a", "c"]), ("name", ["a", "b", "c"]), ("cost", ["b", "c", "a"]), ("-cost", ["a", "c", "b"]),
     ("loss", ["a", "b", "c"])],
)  # fmt: skip
def test_order_is_by_value_not_by_what_is_shown(sort, order):
    assert names(ordered(JOBS, COLUMNS, sort)) == order


def test_a_column_that_is_none_is_told_with_those_that_are():
    with pytest.raises(InvalidArgument, match="name, cost, loss"):
        ordered([], COLUMNS, "price")


@given(st.lists(st.one_of(st.floats(allow_nan=False), st.text(max_size=3))))
def test_numbers_and_words_are_ordered_together(values):
    column = [Column("V", str, value=lambda v: v)]
    numbers = [v for v in ordered(values, column, "v") if isinstance(v, float)]
    assert numbers == sorted(numbers)
    assert sorted(map(str, ordered(values, column, "v"))) == sorted(map(str, values))


@pytest.mark.parametrize("text", ["whenever", "5 parsecs"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(InvalidArgument, match="5m"):
        since_s(text)


def test_a_time_is_an_instant_or_a_duration():
    assert since_s("") == 0
    assert since_s("2026-12-01T08:00Z") == 1796112000
    assert since_s("1h") > since_s("2h")
    assert 0 < since_s("99999999d") < since_s("1d")
    assert since_s("0001-01-01T00:00Z") > 0, "older than all there is, and no time that the contract cannot hold"


class TestFormats:
    def test_csv_has_all_columns_and_plain_values(self, capsys):
        output.show(JOBS[:2], COLUMNS, Format.csv)
        rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
        assert rows == [["name", "cost", "loss"], ["b", "9.0", ""], ["a", "100.0", "0.5"]]

    def test_csv_keeps_each_row_in_one_line(self, capsys):
        output.show([pb.Job(name='x"\ny,z')], COLUMNS[:1], Format.csv, headers=False)
        assert capsys.readouterr().out == '"x"" y,z"\n'

    @pytest.mark.parametrize("fmt", [Format.name, Format.table, Format.wide])
    def test_nothing_prints_nothing_to_stdout(self, capsys, fmt):
        output.show([], COLUMNS, fmt, empty="nothing; do this")
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err == ("" if fmt is Format.name else "nothing; do this\n")

    def test_rows_that_are_no_messages_are_shown_as_they_are(self, capsys):
        output.show([{"name": "x", "n": 1}], [Column("N", lambda r: str(r["n"]))], Format.json)
        assert json.loads(capsys.readouterr().out) == [{"name": "x", "n": 1}]


class TestLately:
    NOW_S = 1_000_000.0

    def ended(self, name, ago_s):
        job = pb.Job(name=name)
        job.end_time.FromSeconds(int(self.NOW_S - ago_s))
        return job

    def test_unfinished_and_ten_of_the_last_day(self):
        day = [self.ended(f"e{n}", 60 * n) for n in range(15)]
        old = self.ended("old", 90_000)
        found = names(lately([*day, old, pb.Job(name="runs")], self.NOW_S, all_=False))
        assert found == ["runs", *(f"e{n}" for n in range(10))]

    def test_all_of_them_where_they_are_asked_for(self):
        assert names(lately([self.ended("old", 90_000)], self.NOW_S, all_=True)) == ["old"]
