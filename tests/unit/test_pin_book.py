"""The book of held data: a copy has its room once, counts once in each queue that holds it, and no two count the same room."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.fleets import node
from whaleflux_scheduler.core.placement.api import DatasetFact, GroupRequest, NoPlacement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.pin_book import PinBook, part_of

SIZES = {"a": 10, "b": 40, "c": 60}
PARTS = [part_of("c", 1, 4, "p"), part_of("c", 3, 4, "p"), part_of("c", 1, 4, "q"), part_of("b", 2, 3, "r")]


def want(gpus, id_, **more):
    return PlaceRequest(id_, GroupRequest(gpus), **more)


def book():
    made = PinBook()
    for name, size in SIZES.items():
        made.resize(name, size)
    return made


def test_a_copy_that_several_share_has_its_room_once():
    made = book()
    assert made.hold("one", [("n", "c")], "q") == {"n"}
    assert made.hold("two", [("n", "c"), ("m", "c")], "r") == {"m"}
    assert (made.held_bytes("n"), made.held_bytes("m")) == (60, 60)
    assert (made.charged_bytes("q"), made.charged_bytes("r")) == (60, 120), "it counts in each queue that holds it"
    assert made.hold("one", []) == set()
    assert made.holds("n", "c") and made.charged_bytes("q") == 0
    made.check()


def test_what_more_a_queue_would_hold():
    made = book()
    made.hold("one", [("n", "c")], "q")
    assert made.more_bytes("q", "two", [("n", "c"), ("n", "a")]) == 10, "it holds the other already"
    assert made.more_bytes("q", "one", [("n", "b")]) == -20, "what a holder leaves counts no more"
    assert made.more_bytes("r", "two", [("n", "c")]) == 60


def test_a_size_that_is_known_later_counts_where_it_is_held():
    made = PinBook()
    made.hold("one", [("n", "late"), ("m", "late")], "q")
    assert (made.held_bytes("n"), made.charged_bytes("q")) == (0, 0)
    assert set(made.resize("late", 7)) == {"n", "m"}
    assert (made.held_bytes("n"), made.charged_bytes("q")) == (7, 14)
    made.hold("one", [])
    made.check()


def test_a_part_is_as_large_as_its_ranks_share_and_never_the_whole():
    made, part = book(), part_of("c", 3, 8, "job")
    made.hold("job", [("n", part)], "q")
    assert (made.held_bytes("n"), made.charged_bytes("q")) == (23, 23), "22.5, and no byte less"
    assert not made.holds("n", "c") and not made.nodes_of("c")
    assert set(made.resize("c", 80)) == {"n"}
    assert made.held_bytes("n") == 30
    made.hold("job", [])
    assert made.held_bytes("n") == 0
    made.check()


class Histories(RuleBasedStateMachine):
    """Whatever holders take, leave and share, in any order: the sums are those of what is held."""

    def __init__(self):
        super().__init__()
        self.book = book()

    @rule(
        holder=st.sampled_from("pqr"),
        queue=st.sampled_from(["", "x", "y"]),
        copies=st.sets(st.tuples(st.sampled_from("nm"), st.sampled_from([*sorted(SIZES), *PARTS]))),
    )
    def hold(self, holder, queue, copies):
        before = {node: self.book.held_bytes(node) for node in "nm"}
        more, had = self.book.more_bytes(queue, holder, copies), self.book.charged_bytes(queue)
        changed = self.book.hold(holder, copies, queue)
        assert {node for node in "nm" if self.book.held_bytes(node) != before[node]} <= changed
        assert not queue or self.book.charged_bytes(queue) == had + more

    @rule(name=st.sampled_from(sorted(SIZES)), size=st.integers(0, 99))
    def resize(self, name, size):
        self.book.resize(name, size)

    @invariant()
    def adds_up(self):
        self.book.check()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TestInTheEngine:
    def engine(self, unit=1):
        made = Engine()
        for name in ("n", "m"):
            made.upsert_node(replace(node(name), dataset_cache_bytes=100 * unit))
        for name, size in SIZES.items():
            made.upsert_dataset(DatasetFact(name, size * unit))
        return made

    def test_two_never_count_the_same_room(self):
        made = self.engine()
        n, m = sorted(made.nodes)
        made.hold_data("one", [(n, "c")])
        made.hold_data("two", [(n, "b"), (n, "a")])
        assert made.book.held_bytes(n) == 70, "60 and 40 are all the room, and b came second in the order of names"
        assert made.book.held_by("two") == {(n, "a")}
        made.hold_data("two", [(n, "b"), (n, "a"), (m, "b")])
        assert made.book.held_by("two") == {(n, "a"), (m, "b")}, "what it has it keeps"
        made.hold_data("one", ())
        assert made.could_keep(n, ["c"]) and not made.could_keep(n, ["b", "c"])

    def test_a_second_job_goes_where_its_data_has_room_or_comes_for_the_first(self):
        made = self.engine(unit=10**11)
        first = made.place(want(1, "first", datasets=("c",)))
        made.apply(first)
        made.hold_data("first", [(name, "c") for name in first.node_names])
        beside = made.place(want(1, "beside", datasets=("c",)))
        assert beside.node_names == first.node_names, "it is on its way there"
        other = made.place(want(1, "other", datasets=("b", "a"), data_reads=9.0))
        assert other.node_names != first.node_names, "there is no room for both beside it"

    def test_who_insists_on_a_copy_goes_only_where_it_can_be_kept(self):
        made = self.engine()
        n, m = sorted(made.nodes)
        made.upsert_dataset(DatasetFact("c", 60, (n,)))
        made.hold_data("others", [(n, "b"), (n, "a")])
        refused = made.place(want(1, "local", datasets=("c",), hard_locality=True))
        assert isinstance(refused, NoPlacement)
        assert [(one.constraint, one.nodes) for one in refused.blocked] == [
            ("without the datasets", 1),
            ("without room to keep the datasets beside what others hold", 1),
        ]
        assert not made.feasible(want(1, "local", datasets=("c",), hard_locality=True))
        made.hold_data("others", [(n, "a")])
        assert made.place(want(1, "local", datasets=("c",), hard_locality=True)).node_names == (n,)
        assert m not in made.book.nodes_of("c")
