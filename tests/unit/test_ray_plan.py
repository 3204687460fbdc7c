"""Nodes for what waits in a Ray cluster: per device and never by sum, gangs whole, cheapest first, in time that shapes decide."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux_scheduler.core.ray_demand import UNIT, Demand, Gang, LabelRule, Strategy, shape_of
from whaleflux_scheduler.core.ray_kinds import Kind, whole_devices
from whaleflux_scheduler.core.ray_plan import plan
from whaleflux_scheduler.core.ray_room import Devices, left_of

GIB = 1024  # MiB


def kind(name, memory_gib, usd, *, gpus=8, count=100, cpus=96, **more):
    devices = whole_devices(gpus, memory_gib * GIB)
    labels = (("whaleflux/gpu", name),)
    given = {"model": name, "labels": labels, "cpu": cpus * UNIT, "memory": 2**41 * UNIT, "parts": False} | more
    return Kind(name, devices=devices, device_memory_mib=memory_gib * GIB, count=count, usd_per_gpu_hour=usd, **given)


H200, A100, RTX = kind("H200", 141, 2.6), kind("A100", 80, 1.4), kind("RTX4090", 24, 0.4)
FLEET = (H200, A100, RTX)


def demand(*asked):
    """(resources, count) each."""
    return Demand(tuple((shape_of(resources), count) for resources, count in asked))


def gang(strategy, *bundles, count=1):
    return Demand(gangs=(Gang(tuple((shape_of(r), n) for r, n in bundles), strategy, count),))


def nodes(found):
    counts = Counter()
    for part in found.additions:
        counts[part.filling.kind.name] += part.count
    return counts


class TestEachOnItsDevice:
    def test_memory_is_counted_by_device_and_not_by_node(self):
        """282 GB hold 4 x 60 by sum; two devices of 141 hold 2 each, and three bundles of 80 would need a third device."""
        two = kind("two", 141, 2.6, gpus=2)
        assert nodes(plan(demand(({"gpu_memory": 60 * GIB}, 4)), [two])) == {"two": 1}
        assert nodes(plan(demand(({"gpu_memory": 80 * GIB}, 3)), [two])) == {"two": 2}

    def test_a_bundle_that_fits_on_two_devices_together_fits_nowhere(self):
        found = plan(demand(({"gpu_memory": 200 * GIB}, 1)), FLEET)
        assert not found.additions
        assert found.unmet[0].never
        assert found.unmet[0].why == "it asks for 204800 MiB on one GPU; the largest, H200, has 144384"

    def test_memory_of_a_bundle_of_whole_devices_is_spread_over_them(self):
        assert nodes(plan(demand(({"GPU": 2, "gpu_memory": 200 * GIB}, 4)), FLEET)) == {"H200": 1}

    def test_whole_devices_are_shared_with_nobody(self):
        found = plan(demand(({"GPU": 1, "gpu_memory": 10 * GIB}, 8), ({"gpu_memory": 10 * GIB}, 1)), [RTX])
        assert nodes(found) == {"RTX4090": 2}

    def test_shares_of_one_device_are_bounded_by_share_and_by_memory(self):
        assert nodes(plan(demand(({"GPU": 0.5}, 16)), [RTX])) == {"RTX4090": 1}
        assert nodes(plan(demand(({"GPU": 0.3}, 25)), [RTX])) == {"RTX4090": 2}, "three on a device"
        assert nodes(plan(demand(({"GPU": 0.1, "gpu_memory": 13 * GIB}, 9)), [RTX])) == {"RTX4090": 2}

    def test_processors_and_memory_of_the_host_bound_it_too(self):
        found = plan(demand(({"GPU": 1, "CPU": 48}, 4)), [RTX])
        assert nodes(found) == {"RTX4090": 2}


class TestPrice:
    def test_the_cheapest_that_fits(self):
        found = plan(demand(({"GPU": 1, "gpu_memory": 20 * GIB}, 8), ({"GPU": 1, "gpu_memory": 100 * GIB}, 8)), FLEET)
        assert nodes(found) == {"RTX4090": 1, "H200": 1}
        assert found.usd_per_hour == pytest.approx(8 * 3.0)

    def test_small_work_fills_what_large_work_leaves(self):
        asked = demand(({"GPU": 1, "gpu_memory": 100 * GIB}, 4), ({"GPU": 1, "gpu_memory": 20 * GIB}, 4))
        assert nodes(plan(asked, FLEET)) == {"H200": 1}

    def test_of_a_node_whose_parts_can_be_had_only_those_are_paid_for(self):
        found = plan(demand(({"GPU": 1}, 3)), [kind("RTX4090", 24, 0.4, parts=True)])
        assert (found.gpus, found.usd_per_hour) == (3, pytest.approx(1.2))

    def test_equal_prices_go_to_the_faster_links(self):
        slow, fast = (kind(name, 80, 1.4, link_bytes_per_s=speed) for name, speed in (("slow", 2e10), ("fast", 3e11)))
        assert nodes(plan(demand(({"GPU": 4}, 2)), [slow, fast])) == {"fast": 1}

    def test_work_without_gpus_stays_off_them(self):
        cpus = kind("cpus", 0, 0.0, gpus=0, model="")
        assert nodes(plan(demand(({"CPU": 8}, 12)), [RTX, cpus])) == {"cpus": 1}


class TestGangs:
    def test_strict_pack_lies_on_one_node(self):
        found = plan(gang(Strategy.STRICT_PACK, ({"GPU": 1, "gpu_memory": 20 * GIB}, 3), count=4), FLEET)
        assert nodes(found) == {"RTX4090": 2}, "two groups of three on each, and two devices stay free"

    def test_strict_pack_larger_than_a_node_is_never_had(self):
        unmet = plan(gang(Strategy.STRICT_PACK, ({"GPU": 1}, 9)), FLEET).unmet[0]
        assert (unmet.never, unmet.why) == (True, "it asks for 9 GPUs on one node; the largest has 8")

    def test_strict_spread_lies_on_nodes_of_its_own(self):
        assert nodes(plan(gang(Strategy.STRICT_SPREAD, ({"GPU": 1}, 4)), [RTX])) == {"RTX4090": 4}
        assert nodes(plan(gang(Strategy.STRICT_SPREAD, ({"GPU": 1}, 4), count=8), [RTX])) == {"RTX4090": 4}

    @pytest.mark.parametrize("strategy", Strategy)
    def test_whole_or_not_at_all(self, strategy):
        few = kind("few", 24, 0.4, gpus=2, count=3)
        found = plan(gang(strategy, ({"GPU": 1}, 4), ({"GPU": 1, "CPU": 1}, 3)), [few])
        assert not found.additions
        assert [(unmet.of_gang, unmet.count) for unmet in found.unmet] == [(True, 1)]

    def test_of_several_as_many_as_there_is_room_for(self):
        found = plan(gang(Strategy.PACK, ({"GPU": 1}, 4), count=5), [kind("few", 24, 0.4, gpus=8, count=2)])
        assert nodes(found) == {"few": 2}
        assert [unmet.count for unmet in found.unmet] == [1]


class TestWishes:
    def test_accelerator_types_and_labels(self):
        typed = demand(({"GPU": 1, "accelerator_type:A100": 0.001}, 8))
        assert nodes(plan(typed, FLEET)) == {"A100": 1}
        labelled = Demand(((shape_of({"GPU": 1}, [(LabelRule("whaleflux/gpu", ("H200",)),)]), 8),))
        assert nodes(plan(labelled, FLEET)) == {"H200": 1}

    def test_later_selectors_are_for_when_the_first_cannot_be_had(self):
        wish, else_ = ((LabelRule("whaleflux/gpu", (name,)),) for name in ("A100", "H200"))
        asked = Demand(((shape_of({"GPU": 1}, [wish, else_]), 16),))
        assert nodes(plan(asked, FLEET)) == {"A100": 2}
        assert nodes(plan(asked, [H200, kind("A100", 80, 1.4, count=1)])) == {"A100": 1, "H200": 1}

    def test_what_is_not_there_is_named(self):
        words = [
            plan(demand(({"GPU": 1, **more}, 1)), FLEET).unmet[0].why
            for more in ({"accelerator_type:B200": 0.001}, {"licence": 1}, {"CPU": 1000}, {"GPU": 1.5})
        ]
        assert words[0] == "no node has accelerator_type B200; there are A100, H200, RTX4090"
        assert words[1] == "it asks for the resource licence, which no node has"
        assert words[2] == "it asks for 1000 CPUs on one node; the largest has 96"
        assert words[3] == "GPU: 1.5 is no whole number; above 1 GPUs are asked for whole"


class TestWhatIsThere:
    def test_room_that_is_there_comes_first(self):
        there = kind("there", 24, 0.4, count=1, held=True)
        found = plan(demand(({"GPU": 1}, 12)), [there, RTX])
        assert sum(n for part in found.held for *_, n in part.sources) == 8
        assert nodes(found) == {"RTX4090": 1}

    def test_a_busy_node_is_said_to_have_no_more_than_it_surely_has(self):
        """Half of the memory of two devices may be a half of each."""
        total = {"GPU": 2.0, "gpu_memory": 2 * 100.0}
        assert left_of(total, total, 100) == (Devices(UNIT, 100 * UNIT, 2),)
        assert (
            left_of(total, {"GPU": 2.0, "gpu_memory": 100.0}, 100) == (Devices(UNIT, 50 * UNIT), Devices(UNIT, 0))[:1]
        )
        assert left_of(total, {"GPU": 1.0, "gpu_memory": 200.0}, 100) == (Devices(UNIT, 100 * UNIT),)
        assert left_of(total, {"GPU": 0.5, "gpu_memory": 200.0}, 100) == (Devices(UNIT // 2, 50 * UNIT),)


class Time:
    """Over after so many looks at it."""

    def __init__(self, looks):
        self.left = looks

    def __call__(self):
        self.left -= 1
        return self.left < 0


class TestWithinItsTime:
    ASKED = Demand(
        tuple((shape_of({"GPU": 1, "gpu_memory": (1 + n) * GIB}), 3) for n in range(20)),
        (Gang(((shape_of({"GPU": 2}), 3), (shape_of({"GPU": 1, "CPU": 3}), 5)), Strategy.PACK, 40),),
    )

    @pytest.mark.parametrize("looks", [0, 1, 5, 21, 22, 23, 25, 30, 40, 60])
    def test_what_it_did_not_come_to_is_said_and_no_gang_is_in_parts(self, looks):
        there = [kind("there", 80, 0.0, gpus=4, count=2, held=True), *FLEET]
        found = plan(self.ASKED, there, is_over=Time(looks))
        placed = Counter()
        for part in (*found.additions, *found.held):
            for of_gang, source, n in part.sources:
                placed[of_gang, source] += n
            assert can_be_laid(part)
        lost = _unmet(found)
        assert {(u.never, u.postponed) for u in found.unmet} <= {(False, True)}, (
            "nothing is called impossible for want of time"
        )
        assert placed[True, 0] == 8 * (40 - lost[True, 0])
        assert [placed[False, at] + lost[False, at] for at in range(20)] == [3] * 20
        assert found.missing or looks > 22

    def test_asked_again_that_comes_first_until_all_of_it_is_planned(self):
        """Each plan has time for little; what it says is started and is there at the next."""
        asked, first, there, rounds = self.ASKED.singles, frozenset(), [], 0
        while rounds < 60:
            rounds += 1
            found = plan(Demand(asked), [*there, *FLEET], is_over=Time(24), first=first)
            first = frozenset(asked[u.source][0] for u in found.unmet)
            laid = Counter()
            for part in found.additions:
                for _, source, n in part.sources:
                    laid[source] += n
            asked = tuple((shape, n - laid[at]) for at, (shape, n) in enumerate(asked) if n > laid[at])
            if not asked:
                break
        assert not asked
        assert rounds > 1


resources = st.fixed_dictionaries(
    {},
    optional={
        "CPU": st.integers(0, 8),
        "GPU": st.sampled_from([0.1, 0.25, 0.5, 1, 2, 4]),
        "gpu_memory": st.integers(1, 150 * GIB),
    },
)
singles = st.lists(st.tuples(resources, st.integers(1, 40)), max_size=6)
gangs = st.lists(
    st.builds(
        lambda strategy, bundles, count: Gang(tuple((shape_of(r), n) for r, n in bundles), strategy, count),
        st.sampled_from(Strategy),
        st.lists(st.tuples(resources, st.integers(1, 4)), min_size=1, max_size=3),
        st.integers(1, 5),
    ),
    max_size=3,
)


def can_be_laid(part):
    """Whether the bundles of one filled node find devices, by a search that knows nothing of fillings: one after another, in some order."""
    bundles, random = [shape for shape, n in part.bundles for _ in range(n)], Random(0)
    return any(
        lay_one_by_one(part.filling.kind, random.sample(bundles, len(bundles)) if n else bundles) for n in range(3000)
    )


def lay_one_by_one(kind, bundles):
    devices = [[UNIT, kind.full] for _ in range(kind.gpus)]
    cpu = sum(shape.cpu for shape in bundles)
    whole = sum(shape.devices for shape in bundles)
    shares = [shape for shape in bundles if shape.needs_gpu and not shape.devices]
    assert cpu <= kind.cpu
    assert whole <= len(devices)
    assert all(shape.memory_per_device <= kind.full for shape in bundles)
    devices = devices[whole:]
    for shape in shares:
        memory = shape.gpu_memory or -(-shape.gpu * kind.full // UNIT)
        fitting = [one for one in devices if one[0] >= shape.gpu and one[1] >= memory]
        if not fitting:
            return False
        tightest = min(fitting, key=lambda one: (one[1], one[0]))
        tightest[0] -= shape.gpu
        tightest[1] -= memory
    return True


@given(singles, gangs)
@settings(deadline=None, max_examples=60, derandomize=True)  # fillings are chosen by rules of thumb
def test_every_bundle_that_counts_has_a_device_and_none_is_lost(asked, groups):
    wanted = Demand(tuple((shape_of(r), n) for r, n in asked), tuple(groups))
    found = plan(wanted, FLEET)
    counted = Counter({("single", at): n for at, (_, n) in enumerate(wanted.singles)})
    placed = Counter()
    for part in found.additions:
        for of_gang, source, n in part.sources:
            if of_gang:
                placed["gang", source] += n
            else:
                placed["single", source] += n
    lost = Counter({("gang" if u.of_gang else "single", u.source): u.count for u in found.unmet})
    for at, single in enumerate(wanted.singles):
        assert placed["single", at] + lost["single", at] == counted["single", at] == single[1]
    for at, group in enumerate(wanted.gangs):
        each = 1 if group.strategy is Strategy.STRICT_PACK else sum(n for _, n in group.bundles)
        assert placed["gang", at] == each * (group.count - lost["gang", at]), "whole gangs only"
    for part in found.additions:
        assert can_be_laid(part)


@given(singles, gangs, singles)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_what_can_be_had_does_not_depend_on_what_else_is_asked_for(asked, groups, others):
    """On a fleet with enough nodes; and no more node types, however many of which kind, make anything impossible."""
    alone = plan(Demand(demand(*asked).singles, tuple(groups)), FLEET)
    beside = plan(Demand((*demand(*asked).singles, *demand(*others).singles), tuple(groups)), FLEET)
    counts = {(u.of_gang, u.source): u.count for u in alone.unmet}
    assert {key: n for key, n in _unmet(beside).items() if key[0] or key[1] < len(asked)} == counts
    more = plan(Demand(demand(*asked).singles, tuple(groups)), [*FLEET, kind("B200", 180, 4.0)])
    assert all(n <= counts.get(key, 0) for key, n in _unmet(more).items())


def _unmet(found):
    counts = Counter()
    for unmet in found.unmet:
        counts[unmet.of_gang, unmet.source] += unmet.count
    return counts


@given(resources, st.integers(1, 300), st.integers(1, 50))
@settings(deadline=None, max_examples=60, derandomize=True)  # fillings are chosen by rules of thumb
def test_more_of_a_shape_never_costs_less(asked, count, more):
    fewer, larger = (plan(demand((asked, n)), FLEET) for n in (count, count + more))
    assert larger.usd_per_hour >= fewer.usd_per_hour - 1e-9


def test_the_number_of_fillings_depends_on_shapes_and_not_on_bundles():
    def fillings(each):
        asked = [
            ({"GPU": (1, 0.25, 2)[n % 3], "gpu_memory": (2 + n % 20) * GIB, "CPU": 1 + n % 4}, each) for n in range(60)
        ]
        many = [kind(one.name, one.device_memory_mib // GIB, one.usd_per_gpu_hour, count=10**6) for one in FLEET]
        return len(plan(demand(*asked), many).additions)

    assert fillings(10_000) <= 2 * 60
