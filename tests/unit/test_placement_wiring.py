"""Inside one node: islands, rings and the best subset of GPUs."""

import math
from dataclasses import replace
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fleets import node, nvlink
from whaleflux.fleet import Link, LinkKind
from whaleflux.fleet.links import all_reduce_s, expected_slowdown
from whaleflux.fleet.wiring import Wiring, bits, mask_of, wiring_of


def brute_ring(wiring: Wiring, members: tuple[int, ...]) -> float:
    """Every closed tour, the slow way."""
    from itertools import permutations

    first, others = members[0], members[1:]
    return max(
        min(wiring.matrix[a][b] for a, b in zip((first, *order), (*order, first), strict=True))
        for order in permutations(others)
    )


def test_islands_are_the_components_over_nvlink():
    wiring = wiring_of(node("n", gpus=8, links=nvlink(range(4), range(4, 8))))
    assert wiring.islands == (0b1111, 0b11110000)
    assert wiring_of(node("n", gpus=3, links=())).islands == (1, 2, 4)


def test_a_pair_without_nvlink_talks_through_host_memory():
    wiring = wiring_of(node("n", gpus=8, links=nvlink(range(4), range(4, 8))))
    assert wiring.ring_bytes_per_s(0b1111) == 347e9
    assert wiring.ring_bytes_per_s(0b11111) == 26e9
    assert wiring.slowest_kind(0b11111) is LinkKind.PCIE_HOST
    assert math.isinf(wiring.ring_bytes_per_s(0b1))


@settings(deadline=None)
@given(st.data())
def test_the_ring_bound_equals_trying_every_tour(data):
    size = data.draw(st.integers(3, 6))
    speeds = data.draw(st.lists(st.sampled_from([10e9, 26e9, 347e9]), min_size=size * size, max_size=size * size))
    links = tuple(Link(a, b, LinkKind.NVLINK, speeds[a * size + b]) for a, b in combinations(range(size), 2))
    wiring = wiring_of(node("n", gpus=size, links=links))
    members = tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=2))))
    assert wiring.ring_bytes_per_s(mask_of(members)) == brute_ring(wiring, members)


def test_a_broken_link_is_avoided():
    whole = node("n", gpus=4)
    broken = replace(whole, links=tuple(l for l in whole.links if (l.a, l.b) != (0, 1)))
    wiring = wiring_of(broken)
    assert wiring.ring_bytes_per_s(0b0011) == 26e9
    assert wiring.choose(0b1111, 2) != 0b0011
    assert wiring.choose(0b1111, 3) in (0b1101, 0b1110), "three without one of the pair"
    assert wiring.ring_bytes_per_s(0b1111) == 347e9, "a ring through four can go around it"


def test_the_smallest_island_that_suffices_is_used_first():
    wiring = wiring_of(node("n", gpus=6, links=nvlink(range(4), range(4, 6))))
    assert wiring.choose(0b111111, 2) == 0b110000, "the pair is whole and leaves the four whole"
    assert wiring.choose(0b111111, 4) == 0b001111


def test_ranks_of_a_subgroup_are_neighbours():
    wiring = wiring_of(node("n", gpus=4, links=nvlink((0, 2), (1, 3))))
    order = wiring.rank_order(0b1111, 2)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


@settings(deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_bits_and_masks_are_inverse(mask):
    assert mask_of(bits(mask)) == mask


def test_foreign_flows_slow_the_slowest_flow():
    assert expected_slowdown(0.0, 8) == 1.0
    assert 1.0 < expected_slowdown(0.1, 8) < expected_slowdown(0.5, 8) < expected_slowdown(0.5, 64)
    assert expected_slowdown(3.0, 8, hashed=False) == 3.0


def test_expected_slowdown_is_the_mean_of_the_maximum():
    """Against a plain simulation of Poisson draws with a fixed seed."""
    import numpy as np

    draws = np.random.default_rng(1).poisson(0.8, size=(20_000, 16)).max(axis=1)
    assert abs(expected_slowdown(0.8, 16) - (1 + draws.mean())) < 0.02


def test_all_reduce_moves_twice_the_buffer_almost():
    assert all_reduce_s(1e9, 1, 1e9) == 0
    assert all_reduce_s(1e9, 2, 1e9) == 1.0
    assert all_reduce_s(1e9, 1000, 1e9) > 1.99
