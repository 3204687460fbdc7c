"""The book of datasets held on nodes: room, quotas and eviction are exact, and nobody is ever refused."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from benchmarks.placement_lab.locality import PinBook, Source

SIZES = {"a": 10, "b": 40, "c": 60, "d": 100}


def book(**capacity: int) -> PinBook:
    made = PinBook({"small": 60})
    for node, room in capacity.items():
        made.set_capacity(node, room)
    return made


def test_a_second_reader_finds_the_copy():
    made = book(n=100)
    assert made.hold("j1", "x", "n", "c", 60, 0).source is Source.FETCH
    assert made.hold("j2", "x", "n", "c", 60, 1).source is Source.LOCAL
    assert made.holders_of("c") == ("n",)


def test_idle_copies_give_way_longest_unused_first():
    made = book(n=100)
    for at, (job, name) in enumerate((("j1", "a"), ("j2", "b"))):
        made.hold(job, "x", "n", name, SIZES[name], at)
        made.release(job)
    made.hold("j3", "x", "n", "a", 10, 5)
    made.release("j3")
    assert made.hold("j4", "x", "n", "c", 60, 6).evicted == ("b",), "a was used after b"
    assert set(made.datasets_on("n")) == {"a", "c"}


def test_what_jobs_hold_is_never_evicted_and_the_newcomer_reads_from_afar():
    made = book(n=100)
    made.hold("j1", "x", "n", "c", 60, 0)
    assert made.hold("j2", "x", "n", "d", 100, 1).source is Source.REMOTE
    assert made.hold("j3", "x", "n", "b", 40, 2).source is Source.FETCH
    assert set(made.datasets_on("n")) == {"b", "c"}


def test_a_quota_bounds_what_an_owner_holds_over_all_nodes():
    made = book(n=100, m=100)
    assert made.hold("j1", "small", "n", "b", 40, 0).source is Source.FETCH
    assert made.hold("j1", "small", "m", "b", 40, 0).source is Source.REMOTE
    made.release("j1")
    assert made.hold("j2", "small", "m", "b", 40, 1).source is Source.FETCH
    assert made.hold("j3", "small", "n", "b", 40, 1).source is Source.LOCAL, "a copy may be read beyond the quota"
    assert made.held_bytes("small") == 40


def test_a_node_without_nvme_holds_nothing():
    assert book().hold("j", "x", "n", "a", 10, 0).source is Source.REMOTE


def test_a_node_that_goes_takes_its_copies_along():
    made = book(n=100)
    made.hold("j", "small", "n", "b", 40, 0)
    made.remove_node("n")
    assert made.held_bytes("small") == 0
    assert made.holders_of("b") == ()
    made.release("j")
    made.check()


class Histories(RuleBasedStateMachine):
    """Any order of holds, releases, shrinking and loss of nodes keeps every promise of `check`."""

    def __init__(self) -> None:
        super().__init__()
        self.book, self.now = book(n=100, m=150), 0.0

    @rule(
        job=st.sampled_from("pqrs"),
        owner=st.sampled_from(["small", "large"]),
        node=st.sampled_from("nm"),
        name=st.sampled_from(sorted(SIZES)),
    )
    def hold(self, job, owner, node, name):
        self.now += 1
        before = set(self.book.datasets_on(node))
        got = self.book.hold(job, owner, node, name, SIZES[name], self.now)
        after = set(self.book.datasets_on(node))
        assert (name in before) == (got.source is Source.LOCAL)
        assert (name in after) == (got.source is not Source.REMOTE)
        assert after == (before - set(got.evicted)) | ({name} if got.source is Source.FETCH else set())

    @rule(job=st.sampled_from("pqrs"))
    def release(self, job):
        self.book.release(job)

    @rule(node=st.sampled_from("nm"), room=st.integers(0, 200))
    def resize(self, node, room):
        self.book.set_capacity(node, room)

    @rule(node=st.sampled_from("nm"))
    def lose(self, node):
        self.book.remove_node(node)

    @invariant()
    def holds(self):
        self.book.check()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
