"""Which chunk a pull brings next, and from whom: all of them come, the source is read once, nobody who is gone is waited for."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.data.manifest import Chunk
from whaleflux_agent.piece_order import BUSY_S, PATIENCE_S, REST_S, PieceOrder

SIZE = 10


def chunks(count, per_file=7):
    return [Chunk(i, i // per_file, i % per_file * SIZE, SIZE) for i in range(count)]


def order(me="n1", count=20, lanes=4, run_bytes=SIZE, **more):
    return PieceOrder(me, "v", chunks(count), lanes=lanes, run_bytes=run_bytes, **more)


def bits(*indices):
    return sum(1 << i for i in indices)


class Site:
    """Nodes that pull one version at once, step by step: each step every lane that is free takes something, then some of it ends."""

    def __init__(self, count, nodes, dead=()):
        self.names = [f"n{i}" for i in range(nodes)]
        self.orders = {name: order(name, count) for name in self.names}
        self.have = dict.fromkeys(self.names, 0)
        self.source, self.dead, self.now_s = Counter(), set(dead), 0.0

    def alive(self):
        return [name for name in self.names if name not in self.dead]

    def step(self):
        self.now_s += 1.0
        for name in self.alive():
            others = [other for other in self.alive() if other != name]
            self.orders[name].seen({o: self.have[o] for o in others}, frozenset(others), self.now_s)
            for take in self._taken(self.orders[name]):
                self._end(name, take)

    def _taken(self, one):
        takes = []
        while len(takes) < 4 and (take := one.next(self.now_s)):
            takes.append(take)
        return takes

    def _end(self, name, take):
        for chunk in take.chunks:
            if not take.peer:
                self.source[chunk.index] += 1
            else:
                assert self.have[take.peer] >> chunk.index & 1
            self.have[name] |= 1 << chunk.index
            self.orders[name].have(chunk.index)
        self.orders[name].ended(take)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 6))
def test_nodes_that_hear_each_other_read_each_chunk_once_at_the_source(count, nodes):
    site = Site(count, nodes)
    for _ in range(5 * count + 20):
        site.step()
    assert all(one.over for one in site.orders.values())
    assert site.source == Counter(range(count))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(2, 5), st.data())
def test_all_of_it_comes_whoever_dies_on_the_way(count, nodes, data):
    site = Site(count, nodes)
    for _ in range(data.draw(st.integers(0, 8))):
        site.step()
    site.dead = set(data.draw(st.lists(st.sampled_from(site.names), max_size=nodes - 1, unique=True)))
    for _ in range(5 * count + 50):
        site.step()
    assert all(site.orders[name].over for name in site.alive())


def test_what_another_reads_at_the_source_now_is_read_there_once_unless_it_never_comes():
    one = order(lanes=20, count=10)
    theirs = bits(*range(6))
    one.seen({}, frozenset({"n2"}), 0.0, coming=theirs)
    took = 0
    while take := one.next(1.0):
        took |= bits(*(chunk.index for chunk in take.chunks))
    assert one.coming == took and not took & theirs
    while take := one.next(PATIENCE_S + 1.0):
        took |= bits(*(chunk.index for chunk in take.chunks))
    assert took == bits(*range(10))


def test_what_a_take_read_is_not_coming_any_more():
    one = order(count=3)
    take = one.next(0.0)
    assert one.coming == bits(*(chunk.index for chunk in take.chunks))
    one.ended(take)
    assert one.coming == 0


def test_what_nobody_brings_is_read_at_the_source_after_a_while():
    one = order(count=20)
    one.seen({}, frozenset({"n2"}), 0.0)
    own = []
    while take := one.next(1.0):
        own += take.chunks
        one.have(take.chunks[0].index)
        one.ended(take)
    assert 0 < len(own) < 20, "the rest is the other's"
    assert one.next(PATIENCE_S - 0.1) is None
    assert one.next(PATIENCE_S + 0.1).peer == ""


def test_a_peer_that_failed_rests_and_one_that_lied_is_asked_no_more():
    one = order(count=1)
    one.seen({"n2": 1, "n3": 1}, frozenset(), 0.0)
    first = one.next(0.0)
    one.rest(first.peer, 0.0)
    one.ended(first, first.chunks)
    second = one.next(0.0)
    assert {first.peer, second.peer} == {"n2", "n3"}
    one.drop(second.peer)
    one.ended(second, second.chunks)
    third = one.next(0.0)
    assert third.peer == "", "the source has it"
    one.ended(third, third.chunks)
    assert one.next(REST_S + 1).peer == first.peer


def test_nobody_goes_to_the_source_because_a_peer_is_busy():
    one = order(count=1)
    one.seen({"n2": 1}, frozenset(), 0.0)
    take = one.next(0.0)
    one.busy("n2", 0.0)
    one.ended(take, take.chunks)
    assert one.next(BUSY_S / 2) is None
    assert one.next(BUSY_S).peer == "n2"


def test_chunks_that_do_not_exist_are_no_pieces():
    one = order(count=2)
    one.seen({"n2": bits(0, 1, 2, 500)}, frozenset(), 0.0)
    taken = [one.next(0.0).chunks[0].index for _ in range(2)]
    assert sorted(taken) == [0, 1]
    assert one.next(0.0) is None
    assert not one.over, "they are on their way"


def test_a_source_without_ranges_is_read_by_one_node_in_one_go():
    both = {name: order(name, 10, ranged=False) for name in ("n1", "n2")}
    for name, one in both.items():
        one.seen({}, frozenset(both) - {name}, 0.0)
    takes = {name: take for name, one in both.items() if (take := one.next(0.0))}
    [(reader, take)] = takes.items()
    assert [chunk.index for chunk in take.chunks] == list(range(7)), "all of the first file"
    assert both[reader].next(0.0) is None, "one stretch at a time"


def test_runs_of_the_source_are_as_long_as_one_request_goes():
    one = order(count=20, run_bytes=3 * SIZE)
    sizes = []
    while take := one.next(0.0):
        assert len({chunk.file for chunk in take.chunks}) == 1
        sizes.append(len(take.chunks))
    assert max(sizes) == 3
    assert sum(sizes) == 20
