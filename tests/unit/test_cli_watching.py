"""Watches in the terminal: what is drawn, and what JSON lines tell, over streams that break."""

import json

import pytest

from whaleflux.cli.output import Format
from whaleflux.cli.watching import watch
from whaleflux.errors import Compacted, InvalidArgument, PermissionDenied, Unavailable
from whaleflux.v1 import health_pb2 as pb


def told(revision=0, **change):
    event = change or {"bookmark": {}}
    return pb.WatchIncidentsResponse(resource_version=revision, **event)


def incident(name, ended=False):
    made = pb.Incident(name=f"incidents/{name}")
    if ended:
        made.end_time.seconds = 1
    return made


class Streams:
    """Each stream says what its script says; behind the last one the person has enough."""

    def __init__(self, *scripts):
        self.scripts, self.since = list(scripts), []

    def __call__(self, since):
        self.since.append(since)
        for said in self.scripts.pop(0) if self.scripts else [KeyboardInterrupt()]:
            if isinstance(said, BaseException):
                raise said
            yield said


def open_ones(one):
    return not one.end_time.seconds


def drawn(*scripts, keeps=open_ones):
    pictures, streams = [], Streams(*scripts)
    watch(streams, Format.table, lambda found: pictures.append([one.name[10:] for one in found]), keeps)
    return pictures, streams.since


def lines(capsys, *scripts):
    watch(Streams(*scripts), Format.json, lambda _: None, open_ones)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


class TestATable:
    def test_is_drawn_when_all_is_known_and_at_each_change(self):
        pictures, _ = drawn(
            [told(added=incident("a")), told(added=incident("b")), told(2), told(3, added=incident("c")), told(4, deleted="incidents/a")]
        )  # fmt: skip
        assert pictures == [["a", "b"], ["a", "b", "c"], ["b", "c"]]

    def test_leaves_out_what_is_not_asked_for_and_what_is_not_any_more(self):
        pictures, _ = drawn(
            [told(added=incident("a")), told(added=incident("old", ended=True)), told(2), told(3, modified=incident("a", ended=True))]
        )  # fmt: skip
        assert pictures == [["a"], []]

    def test_goes_on_where_a_stream_broke_and_begins_anew_when_that_is_gone(self):
        pictures, since = drawn(
            [told(added=incident("a")), told(7), Unavailable("away")],
            [told(9, added=incident("b")), Compacted(20)],
            [told(added=incident("b")), told(21)],
        )
        assert since == [0, 7, 0, 21]
        assert pictures[-1] == ["b"], "what is not on the new list is gone"

    def test_an_empty_fleet_is_drawn_too(self):
        assert drawn([told(1)])[0] == [[]]


def test_json_is_a_line_for_each_change(capsys):
    found = lines(
        capsys, [told(added=incident("a")), told(2), told(3, added=incident("b")), told(4, deleted="incidents/b")]
    )
    assert found == [{"name": "incidents/a"}, {"name": "incidents/b"}, {"name": "incidents/b", "deleted": True}]


def test_json_tells_what_ended_once_as_it_is_then(capsys):
    ended = incident("a", ended=True)
    found = lines(
        capsys,
        [told(added=incident("a")), told(added=incident("old", ended=True)), told(2), told(3, modified=ended), told(4, modified=ended)],
        [told(5, deleted="incidents/a")],
    )  # fmt: skip
    assert [(one["name"], "endTime" in one or "end_time" in one, one.get("deleted", False)) for one in found] == [
        ("incidents/a", False, False),
        ("incidents/a", True, False),
    ]


def test_what_is_refused_is_told(capsys):
    with pytest.raises(PermissionDenied):
        lines(capsys, [PermissionDenied("no")])


@pytest.mark.parametrize("fmt", [Format.csv, Format.name])
def test_what_has_an_end_is_refused(fmt):
    with pytest.raises(InvalidArgument, match="jsonl"):
        watch(Streams(), fmt, lambda _: None)
