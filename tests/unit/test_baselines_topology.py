"""The re-implemented rivals follow their own rules on cases small enough to do by hand; the exact solver knows the answers."""

from benchmarks.baselines_topology import Tree, blind_first_fit, blind_random, kai_order, kueue_best_fit, slurm_block
from benchmarks.topology_exact import compare
from benchmarks.yardstick import REFERENCE

# two spines of three leaves of four hosts
TREE = Tree(tuple(h // 4 for h in range(24)), tuple(h // 12 for h in range(24)))


def fleet(**free_hosts: int) -> list[int]:
    """Free GPUs per host: `leaf0=2` leaves two whole hosts free there; other leaves are full of work."""
    free = [0] * 24
    for leaf, count in free_hosts.items():
        at = 4 * int(leaf.removeprefix("leaf"))
        free[at : at + count] = [8] * count
    return free


def leaves(given) -> dict[int, int]:
    found: dict[int, int] = {}
    for host, gpus in given:
        found[TREE.leaf[host]] = found.get(TREE.leaf[host], 0) + gpus // 8
    return found


class TestKueue:
    def test_the_smallest_leaf_that_fits(self):
        assert leaves(kueue_best_fit(TREE, fleet(leaf0=4, leaf1=3, leaf4=2), 2, 8)) == {4: 2}

    def test_ties_go_to_the_first_name(self):
        assert leaves(kueue_best_fit(TREE, fleet(leaf1=3, leaf4=3), 2, 8)) == {1: 2}

    def test_no_leaf_fits_so_the_smallest_spine_does(self):
        given = kueue_best_fit(TREE, fleet(leaf0=3, leaf1=3, leaf2=3, leaf3=3, leaf4=2, leaf5=1), 5, 8)
        assert leaves(given) == {3: 3, 4: 2}, (
            "spine 1 has six hosts, spine 0 nine: largest leaf first, then the best fit"
        )

    def test_the_last_leaf_is_the_tightest_that_holds_the_rest(self):
        assert leaves(kueue_best_fit(TREE, fleet(leaf0=4, leaf1=3, leaf2=2), 6, 8)) == {0: 4, 2: 2}

    def test_over_all_spines_when_none_is_enough(self):
        assert leaves(kueue_best_fit(TREE, fleet(leaf0=4, leaf3=3, leaf4=2), 8, 8)) == {0: 4, 3: 3, 4: 1}

    def test_pods_of_one_gpu_fill_leftovers_of_the_smallest_leaf(self):
        free = fleet(leaf0=2)
        free[4:8] = [3, 3, 2, 1]
        given = kueue_best_fit(TREE, free, 8, 1)
        assert {TREE.leaf[h] for h, _ in given} == {1}, (
            "nine scattered GPUs are a tighter fit than sixteen on whole hosts"
        )

    def test_nothing_when_nothing_fits(self):
        assert kueue_best_fit(TREE, fleet(leaf0=4), 5, 8) is None


class TestKai:
    def test_the_highest_ratio_of_request_to_free(self):
        assert leaves(kai_order(TREE, fleet(leaf0=4, leaf1=3), 3, 8)) == {1: 3}

    def test_leaves_beyond_ten_collide_and_names_decide(self):
        """Thirty leaves in one spine: those of one tenth have equal scores, so the first names win whatever fits best."""
        tree = Tree(tuple(h // 2 for h in range(60)), (0,) * 60)
        free = [8] * 60
        free[0] = 0  # leaf 0 has one host and is last in the order
        given = kai_order(tree, free, 3, 8)
        assert [h for h, _ in given] == [2, 3, 4]

    def test_climbs_to_the_spine(self):
        assert set(leaves(kai_order(TREE, fleet(leaf0=3, leaf1=3, leaf3=4, leaf4=4, leaf5=4), 6, 8))) == {0, 1}


class TestSlurm:
    def test_the_fewest_sufficient_nodes_in_one_block(self):
        assert leaves(slurm_block(TREE, fleet(leaf0=4, leaf5=2), 2, 8)) == {5: 2}

    def test_aggregates_are_aligned_powers_of_two(self):
        """Blocks 1 and 2 have room together but belong to different pairs."""
        given = slurm_block(TREE, fleet(leaf1=4, leaf2=4), 8, 8)
        assert leaves(given) == {1: 4, 2: 4}, "found only one size up, in the aggregate of four blocks"
        assert leaves(slurm_block(TREE, fleet(leaf0=4, leaf1=4, leaf2=4, leaf3=4), 8, 8)) == {0: 4, 1: 4}

    def test_inside_an_aggregate_the_block_that_holds_the_rest(self):
        assert leaves(slurm_block(TREE, fleet(leaf0=4, leaf1=2), 5, 8)) == {0: 4, 1: 1}

    def test_aggregates_may_span_spines(self):
        assert leaves(slurm_block(TREE, fleet(leaf2=4, leaf3=4), 8, 8)) == {2: 4, 3: 4}


def test_blind_placement_places_and_counts():
    for policy in (blind_random(1), blind_first_fit(1)):
        given = policy(TREE, [8] * 24, 16, 1)
        assert sum(gpus for _, gpus in given) == 16
        assert policy(TREE, [0] * 24, 1, 1) is None


def test_the_engine_is_as_good_as_trying_everything():
    rows, targets = compare(seed=7000, states=10)
    assert all(t.met(REFERENCE) for t in targets), rows
