"""Subjects, filters and the streams behind them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.events import Subject, change_id, observation_id, pattern
from whaleflux.events.subjects import check, check_filters, matches, overlap
from whaleflux.events.topology import (
    ACCOUNTING,
    AUDIT,
    EVENTS,
    USAGE,
    hub_streams,
    site_streams,
    streams_for,
    taken_stream,
)

ids = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
subjects = st.builds(Subject, ids, ids, st.lists(ids, min_size=1, max_size=3).map(tuple), ids)
filters = st.lists(st.sampled_from(["*", "a", "b"]), min_size=4, max_size=4).flatmap(
    lambda tokens: st.sampled_from([tokens, [*tokens[:1], ">"], [*tokens[:2], ">"], [">"]])
).map(lambda tokens: ".".join(["wf.v1", *tokens]))  # fmt: skip


@given(subjects)
def test_a_subject_survives_being_written_and_read(subject):
    assert Subject.parse(str(subject)) == subject
    assert check(str(subject))


def test_a_resource_name_gives_kind_and_joined_ids():
    assert str(Subject.of("sites/a/nodes/n1", "LINK_LOST")) == "wf.v1.hub.node.a_n1.link-lost"
    assert str(Subject.of("queues/q/jobs/j", "running", site="b")) == "wf.v1.b.job.q_j.running"
    assert Subject.parse("wf.v1.b.job.q_j.running").ids == ("q", "j")


@pytest.mark.parametrize(
    "name", ["", "nodes", "sites/a/nodes", "sites/a/nodes/N 1", "sites/a.b/nodes/n", "sites/a/nodes/*"]
)
def test_what_is_no_resource_name_is_refused(name):
    with pytest.raises(InvalidArgument):
        Subject.of(name, "x")


@pytest.mark.parametrize(
    "subject",
    ["", "wf.v1.a.node.n1", "wf.v2.a.node.n1.x", "wf.v1.a.node.n1.x.y", "wf.v1.*.node.n1.x", "wf.v1.a..n1.x", "wf.v1.a.node.n 1.x",
     "wf.v1.a.node.n1.x\r\nPUB y", "wf.v1.a.node." + "n" * 300 + ".x", "wf.v1.A.node.n1.x"],
)  # fmt: skip
def test_bad_subjects_are_refused_with_the_form_to_use(subject):
    with pytest.raises(InvalidArgument, match=r"wf\.v1\.<site>"):
        check(subject)


@pytest.mark.parametrize(
    "filter",
    ["wf.v1", "wf.>", "wf.v1.>.x", "wf.v1.a", "wf.v1.a.node.*", "wf.v1.a.*.*.*.*", "x.v1.>", "wf.v1.a*.>"],
)
def test_bad_filters_are_refused(filter):
    with pytest.raises(InvalidArgument):
        check_filters([filter])


def test_overlapping_filters_are_refused_naming_both():
    with pytest.raises(InvalidArgument, match=r"wf\.v1\.a\.> *'? and"):
        check_filters(["wf.v1.a.>", "wf.v1.*.node.>"])
    with pytest.raises(InvalidArgument):
        check_filters([])


@given(filters, filters)
def test_filters_overlap_exactly_when_some_subject_matches_both(one, other):
    every = [f"wf.v1.{a}.{b}.{c}.{d}" for a in "abz" for b in "abz" for c in "abz" for d in "abz"]
    assert overlap(one, other) == any(matches(one, s) and matches(other, s) for s in every)


def test_a_greater_sign_needs_at_least_one_token():
    assert matches("wf.v1.>", "wf.v1.a")
    assert not matches("wf.v1.a.>", "wf.v1.a")


def test_pattern_leaves_open_what_is_not_given():
    assert pattern(kind="node", what="running") == "wf.v1.*.node.*.running"
    assert pattern(site="a", what=">") == "wf.v1.a.*.*.>"


def test_ids_name_the_key_and_the_revision_or_the_node_and_its_boot():
    key = "/whaleflux/v1/jobs/q/j"
    assert (change_id(key, 7, None), change_id(key, 7, b"", 9)) == (f"{key}@7", f"{key}@7-00000000~9")
    assert change_id(key, 7, b"1") != change_id(key, 7, b"2")
    assert observation_id("sites/a/nodes/n", "b1", 3) != observation_id("sites/b/nodes/n", "b1", 3)


def test_a_hub_without_sites_is_one_stream_and_sites_add_sources():
    alone, accounting, trail, samples = hub_streams()
    assert (alone.name, alone.subjects, alone.sources) == (EVENTS, ("wf.v1.>",), ())
    assert (accounting.name, accounting.subjects, accounting.limits.max_per_subject) == (
        ACCOUNTING,
        ("wf.account.>",),
        1,
    )
    assert (trail.name, trail.subjects, trail.sealed) == (AUDIT, ("wf.audit.>",), True), "nobody deletes of it"
    assert (samples.name, samples.subjects, samples.limits.max_per_subject) == (USAGE, ("wf.usage.>",), 0)
    linked, *_ = hub_streams(["a", "b", "a"])
    assert [(s.stream, s.subjects) for s in linked.sources] == [("TAKEN-a", "wf.v1.a.>"), ("TAKEN-b", "wf.v1.b.>")]
    assert linked.without_sources() == alone


def test_a_site_has_its_own_events_and_the_hub_keeps_apart_what_it_took_of_them():
    (own,) = site_streams("a")
    assert (own.subjects, own.sources) == (("wf.v1.a.>",), ())
    taken = taken_stream("a")
    assert taken.subjects == (), "no client of the hub says anything into it"
    assert [(s.stream, s.api, s.subjects) for s in taken.sources] == [(EVENTS, "$JS.a.API", "wf.v1.a.>")]


def test_a_site_may_not_be_called_hub():
    with pytest.raises(InvalidArgument):
        hub_streams(["hub"])


def test_each_event_is_read_from_exactly_one_stream():
    assert streams_for("hub", ["wf.v1.a.>"]) == ((EVENTS, ("wf.v1.a.>",)),)
    both = streams_for("hub", ["wf.account.>", "wf.v1.a.>"])
    assert both == ((EVENTS, ("wf.v1.a.>",)), (ACCOUNTING, ("wf.account.>",)))
    assert streams_for("hub", ["wf.usage.a.>"]) == ((USAGE, ("wf.usage.a.>",)),)
    assert streams_for("a", ["wf.v1.a.node.>"]) == ((EVENTS, ("wf.v1.a.node.>",)),)
    assert streams_for("a", ["wf.v1.*.node.>"]) == ((EVENTS, ("wf.v1.a.node.>",)),)
    assert streams_for("a", ["wf.v1.>"]) == ((EVENTS, ("wf.v1.a.>",)),)
    with pytest.raises(InvalidArgument, match="the hub has all"):
        streams_for("a", ["wf.v1.hub.>"])
