"""The tree of queues: limits at every level, who borrows, who makes room for whom."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.core.quota import Claimant, QueueLimit, QuotaTree


def tree(**queues):
    """Queues by id: dicts of Queue's fields."""
    return QuotaTree({id_: Queue(f"queues/{id_}", **fields) for id_, fields in queues.items()})


def test_a_limit_counts_at_every_level():
    quota = tree(org={"max_gpus": 10}, a={"parent": "org", "max_gpus": 8}, b={"parent": "org"})
    quota.hold("j1", "a", 6)
    assert quota.admit("a", 2) is None
    assert quota.admit("a", 3) == QueueLimit("a", 6, 8)
    assert quota.admit("b", 4) is None
    assert quota.admit("b", 5) == QueueLimit("org", 6, 10)
    assert quota.admit("a", 8, own=6) is None  # its own remains do not stand in its way
    quota.hold("j1", "a", 0)
    assert quota.admit("b", 10) is None
    assert quota.held("org") == 0


def test_a_queue_that_is_not_known_is_given_nothing():
    quota = tree(a={"parent": "gone"}, loop={"parent": "pool"}, pool={"parent": "loop"})
    assert quota.admit("nobody", 1) == QueueLimit("nobody", 0, None)
    assert quota.admit("a", 0) == QueueLimit("a", 0, None)
    assert {quota.admit(id_, 1).most for id_ in ("loop", "pool")} == {None}


def test_what_is_not_lent_is_kept():
    """16 of 24 GPUs are a's, which lends 6 of them."""
    quota = tree(a={"guaranteed_gpus": 16, "lending_limit_gpus": 6}, b={})
    assert quota.admit("b", 14, free=lambda: 24) is None
    assert quota.admit("b", 15, free=lambda: 24) == QueueLimit("b", 0, 0, kept=10)
    quota.hold("j", "a", 12)  # of the ten that it keeps, none is left
    assert quota.admit("b", 12, free=lambda: 12) is None
    assert quota.admit("a", 4, free=lambda: 0) is None  # whether there is room is placement's question


def test_what_cannot_give_back_takes_no_guarantee():
    quota = tree(a={"guaranteed_gpus": 16}, b={})
    assert quota.admit("b", 9, free=lambda: 24) is None
    assert quota.admit("b", 9, free=lambda: 24, lends_back=False) == QueueLimit("b", 0, 0, kept=16)
    assert quota.admit("b", 8, free=lambda: 24, lends_back=False) is None
    assert quota.admit("a", 16, free=lambda: 24, lends_back=False) is None


def test_whole_jobs_are_guaranteed_or_borrowed():
    """A job that a guarantee is too small for borrows as a whole; what fits beside it does not."""
    quota = tree(a={"guaranteed_gpus": 8})
    quota.hold("large", "a", 16, since_s=1)
    quota.hold("small", "a", 8, since_s=2)
    assert quota.covering("large") is quota.fleet
    assert quota.covering("small").id == "a"
    quota.hold("urgent", "a", 4, priority=5, since_s=3)
    assert quota.covering("urgent").id == "a"
    assert quota.covering("small") is quota.fleet
    quota.hold("urgent", "a", 0)
    assert quota.covering("small").id == "a"
    assert quota.borrowed("a") == 16


@pytest.mark.parametrize(
    ("victim", "reclaimed"),
    [("theirs", False), ("cousins", True), ("guests", True), ("own", False)],
)
def test_who_is_guaranteed_takes_back_what_others_borrow(victim, reclaimed):
    """Queue a1 is guaranteed 4 of the 8 of a; its sibling a2 borrows them, and b borrows from the fleet."""
    quota = tree(
        a={"guaranteed_gpus": 8}, a1={"parent": "a", "guaranteed_gpus": 4}, a2={"parent": "a"}, b={"guaranteed_gpus": 4}
    )
    quota.hold("cousins", "a2", 8, priority=9)
    quota.hold("theirs", "b", 4)
    quota.hold("guests", "b", 4, since_s=1)
    quota.hold("own", "a1", 8, since_s=1)
    queue_of = {"theirs": "b", "cousins": "a2", "guests": "b", "own": "a1"}
    claimant = Claimant(quota, "new", "a1", 4, 0)
    assert claimant.entitled
    assert claimant.reclaims(victim, queue_of[victim]) is reclaimed


def test_priority_stops_nobody_within_a_guarantee_but_for_who_is_within_the_same_one():
    quota = tree(a={"guaranteed_gpus": 4}, b={"guaranteed_gpus": 4})
    quota.hold("firm", "b", 4)
    quota.hold("guest", "b", 4, since_s=1)
    above = Claimant(quota, "new", "a", 8, 5)
    assert not above.entitled
    assert above.preempts("guest", 0)
    assert not above.preempts("firm", 0)
    assert Claimant(quota, "new", "b", 4, 5).preempts("firm", 0)
    borrows = Claimant(quota, "new", "b", 8, 5)
    assert borrows.preempts("guest", 0)
    assert not borrows.preempts("firm", 0)
    assert not above.reclaims("guest", "b")


def test_what_a_job_still_holds_itself_does_not_stand_in_its_way():
    quota = tree(a={"guaranteed_gpus": 12}, a1={"parent": "a", "guaranteed_gpus": 8})
    quota.hold("again", "a1", 8)
    quota.hold("guest", "a", 4)
    assert quota.entitled("again", "a1", 8, 0).id == "a1"
    assert quota.entitled("other", "a1", 8, 0) is None
    quota.set_queues({"a": Queue("queues/a", guaranteed_gpus=12), "a1": Queue("queues/a1", parent="a")})
    assert quota.entitled("again", "a1", 8, 0).id == "a"


IDS = "abcdefg"


@st.composite
def trees(draw):
    """Up to seven queues, each below an earlier one or none; guarantees that can be kept."""
    queues = {}
    for at, id_ in enumerate(IDS[: draw(st.integers(2, 7))]):
        parent = draw(st.sampled_from(["", *IDS[:at]]))
        own = draw(st.integers(0, 8))
        lends = draw(st.none() | st.integers(0, 8))
        queues[id_] = Queue(f"queues/{id_}", parent=parent, guaranteed_gpus=own, lending_limit_gpus=lends)
    for id_ in reversed(IDS[: len(queues)]):  # the parent's is at least what those below are guaranteed
        below = sum(q.guaranteed_gpus for q in queues.values() if q.parent == id_)
        known = queues[id_]
        queues[id_] = Queue(
            known.name, 1.0, 0, known.parent, max(below, known.guaranteed_gpus), known.lending_limit_gpus
        )
    return queues


HOLDS = st.lists(st.tuples(st.integers(0, 11), st.sampled_from(IDS), st.integers(0, 9), st.integers(0, 2)), max_size=30)


def path(queues, id_):
    while id_:
        yield id_
        id_ = queues[id_].parent


def filled(queues, holds):
    quota, jobs = QuotaTree(queues), {}
    for since, (job, queue, gpus, priority) in enumerate(holds):
        if queue not in queues:
            continue
        quota.hold(f"j{job}", queue, gpus, priority, float(since))
        jobs.pop(f"j{job}", None)
        if gpus:
            jobs[f"j{job}"] = queue, gpus, priority
        quota.covering("j0")  # what is worked out between changes is as good as what is worked out at the end
    return quota, jobs


def taken(queues, jobs, id_, kept):
    """By the definition: what it and those below take from the one above, at least what it keeps."""
    own = sum(gpus for queue, gpus, _ in jobs.values() if queue == id_)
    return max(kept(id_), own + sum(taken(queues, jobs, c, kept) for c, q in queues.items() if q.parent == id_))


@settings(max_examples=50, deadline=None)
@given(trees(), HOLDS)
def test_counts_are_those_of_the_definition(queues, holds):
    quota, jobs = filled(queues, holds)
    held = Counter()
    for queue, gpus, _ in jobs.values():
        held.update(dict.fromkeys(path(queues, queue), gpus))
    assert {id_: quota.held(id_) for id_ in queues} == {id_: held[id_] for id_ in queues}

    def lends(id_):
        limit = queues[id_].lending_limit_gpus
        return 0 if limit is None else max(0, queues[id_].guaranteed_gpus - limit)

    for kept, lends_back in ((lends, True), (lambda id_: queues[id_].guaranteed_gpus, False)):
        now = sum(taken(queues, jobs, id_, kept) for id_, q in queues.items() if not q.parent)
        for id_ in queues:
            more = {**jobs, "new": (id_, 3, 0)}
            then = sum(taken(queues, more, i, kept) for i, q in queues.items() if not q.parent)
            unused = now - sum(gpus for _, gpus, _ in jobs.values())
            for free in (0, unused + then - now - 1, unused + then - now):
                fits = quota.admit(id_, 3, free=lambda free=free: free, lends_back=lends_back) is None
                assert fits == (then == now or unused == 0 or free >= unused + then - now)


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(1, 40), st.integers(0, 60), st.booleans())
def test_in_an_idle_fleet_a_queue_may_take_what_the_fleet_is_large_enough_for(queues, gpus, fleet, lends_back):
    quota = QuotaTree(queues)
    for id_ in queues:
        kept = quota.admit(id_, gpus, free=lambda: fleet, lends_back=lends_back)
        idle, needed = (quota.fleet_needed(id_, many, lends_back=lends_back) for many in (0, gpus))
        assert (kept is not None) == (0 < idle < needed and fleet < needed)


@settings(max_examples=50, deadline=None)
@given(trees(), HOLDS)
def test_guarantees_are_given_to_whole_jobs_and_to_no_more_than_they_cover(queues, holds):
    quota, jobs = filled(queues, holds)
    covered = Counter()
    for job, (queue, gpus, _) in jobs.items():
        at = quota.covering(job).id
        ups = list(path(queues, queue))
        assert at in ("", *ups)
        covered.update(dict.fromkeys(path(queues, at), gpus))
    for id_, queue in queues.items():
        assert covered[id_] <= queue.guaranteed_gpus
    for job, (queue, gpus, _) in jobs.items():  # nothing borrows while a guarantee on its way has room for it
        for up in path(queues, queue):
            if up == quota.covering(job).id:
                break
            assert covered[up] + gpus > queues[up].guaranteed_gpus


@settings(max_examples=80, deadline=None)
@given(trees(), HOLDS, st.sampled_from(IDS), st.integers(1, 8), st.integers(0, 2), st.integers(0, 4))
def test_who_is_guaranteed_room_finds_it_and_takes_nothing_that_is_not_borrowed(
    queues, holds, queue, gpus, priority, spare
):
    """The fleet is as large as all guarantees together, and a bit."""
    queue = queue if queue in queues else "a"
    quota, jobs = filled(queues, holds)
    fleet = spare + sum(q.guaranteed_gpus for q in queues.values() if not q.parent)
    if sum(held for _, held, _ in jobs.values()) > fleet:
        fleet = sum(held for _, held, _ in jobs.values())
    claimant = Claimant(quota, "new", queue, gpus, priority)
    mine = set(path(queues, queue))
    room = fleet - sum(held for _, held, _ in jobs.values())
    taken_back = {job: quota.covering(job) for job, (owner, _, _) in jobs.items() if claimant.reclaims(job, owner)}
    for job, (owner, held, its) in jobs.items():
        stopped = job in taken_back or claimant.preempts(job, its)
        inside = {up for up in path(queues, owner) if up not in mine}
        assert not stopped or quota.covering(job).id not in inside  # no guarantee that is not the claimant's, too
        room += held if stopped or (owner == queue and quota.covering(job).id != queue) else 0
    entitled = claimant.entitled
    assert not entitled or room >= gpus
    assert entitled or not taken_back
    quota.hold("new", queue, gpus, priority, 1e9)
    at = quota.covering("new")
    assert not entitled or at is not quota.fleet  # so that nobody takes it back at once
    assert all(covering.depth < at.depth for covering in taken_back.values())  # nothing that the same guarantee covers


def test_of_an_elastic_job_a_size_that_it_can_run_with_is_counted_and_the_rest_is_borrowed():
    quota = tree(top={"guaranteed_gpus": 12}, a={"guaranteed_gpus": 5, "parent": "top"})
    quota.hold("j", "a", 14, least=2, step=2)
    assert quota.covered("j", "a") == {"a": 4, "top": 8}
    assert quota.covering("j").id == "a"
    assert quota.borrowed("top") == 2
    quota.hold("j", "a", 14, least=6, step=2)
    assert quota.covered("j", "a") == {"top": 12}
    quota.hold("j", "a", 14)
    assert quota.covered("j", "a") == {}
    assert quota.covering("j") is quota.fleet
