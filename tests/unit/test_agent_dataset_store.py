"""Which copies make room: those that cost least to have again, and in the end those that nobody used."""

import pytest

from whaleflux.data.manifest import File, Manifest
from whaleflux_agent.dataset_store import DatasetStore, NoRoom

SIZE = 10
CHUNK_BYTES = 8 << 20


@pytest.fixture
def store(tmp_path):
    made = DatasetStore(tmp_path / "cache", 3 * SIZE)
    made.open()
    return made


def nobody(_):
    return False


def have(store, name, cost):
    """A whole copy, for which others may have gone; their names."""
    found = Manifest(CHUNK_BYTES, (File("data", SIZE, (name.encode().ljust(32, b"."),)),))
    gone = store.reserve(name, SIZE, nobody)
    partial = store.partial(name)
    (partial / "files").mkdir(parents=True)
    (partial / "files" / "data").write_bytes(bytes(SIZE))
    store.publish(f"datasets/{name}", found, partial, 0, cost)
    store.release(name)
    return [copy.dataset.removeprefix("datasets/") for copy in gone]


def test_what_costs_least_to_have_again_goes_first(store):
    have(store, "far", 5.0)
    have(store, "near", 1.0)
    have(store, "middle", 2.0)
    assert have(store, "new", 1.0) == ["near"]


def test_of_what_costs_the_same_the_longest_unused_goes_first(store):
    for name in ("a", "b", "c"):
        have(store, name, 1.0)
    store.touch(store.find("datasets/a"))
    assert have(store, "d", 1.0) == ["b"]


def test_what_nobody_uses_goes_in_the_end_whatever_it_cost(store):
    have(store, "far", 3.5)
    have(store, "x0", 1.0)
    have(store, "x1", 1.0)
    gone = [name for i in range(2, 12) for name in have(store, f"x{i}", 1.0)]
    assert "far" in gone
    assert gone.index("far") > 2, "not at once"


def test_what_a_copy_cost_is_known_to_the_next_agent(store, tmp_path):
    have(store, "far", 5.0)
    have(store, "near", 1.0)
    have(store, "middle", 2.0)
    again = DatasetStore(tmp_path / "cache", 3 * SIZE)
    again.open()
    assert have(again, "new", 1.0) == ["near"]


def test_nothing_goes_when_it_would_not_be_enough(store):
    have(store, "a", 1.0)
    with pytest.raises(NoRoom, match="more are needed"):
        store.leaving("large", 4 * SIZE, nobody)
    assert store.find("datasets/a")
