"""Which files stay: as many as fit, always the same ones."""

from hypothesis import given
from hypothesis import strategies as st

from whaleflux_agent.core.fixed_subset import fixed_subset

FILES = st.dictionaries(st.text("abc/", min_size=1, max_size=6), st.integers(0, 100), max_size=30)


@given(FILES, st.integers(0, 2000))
def test_what_stays_fits_and_nothing_that_fits_is_left_out(sizes, room):
    chosen = fixed_subset(sizes.items(), room, "c4")
    left = room - sum(sizes[path] for path in chosen)
    assert left >= 0
    assert all(size > left for path, size in sizes.items() if path not in chosen)
    assert chosen == fixed_subset(reversed(sizes.items()), room, "c4")


def test_other_datasets_keep_other_parts():
    sizes = [(str(i), 1) for i in range(100)]
    one, two = fixed_subset(sizes, 50, "one"), fixed_subset(sizes, 50, "two")
    assert len(one) == len(two) == 50
    assert 10 < len(one & two) < 40
