"""What the engine promises for gangs, parts of GPUs, preferences, preemption and explanations."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fleets import GB, Level, node, nodes, nvlink
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from whaleflux.fleet import Disk, Price, PriceKind
from whaleflux_scheduler.core.placement.api import (
    DatasetFact,
    Goal,
    GpuOption,
    GpuRequirement,
    GroupRequest,
    NoPlacement,
    Placement,
    PlaceRequest,
    PreemptionPlan,
    Preference,
    Share,
    Subgroup,
    Victim,
)
from whaleflux_scheduler.core.placement.engine import Engine


def engine(*fleet) -> Engine:
    made = Engine()
    for one in fleet:
        made.upsert_node(one)
    return made


def want(gpus: int, id_: str = "job", **more) -> PlaceRequest:
    group = {k: more.pop(k) for k in ("subgroups", "share", "level") if k in more}
    return PlaceRequest(id_, GroupRequest(gpus, **group), **more)


def placed(answer) -> Placement:
    assert isinstance(answer, Placement), answer
    return answer


def refused(answer) -> NoPlacement:
    assert isinstance(answer, NoPlacement), answer
    return answer


def take(made: Engine, where: str, gpus: int, id_: str) -> None:
    """Occupies GPUs of one node."""
    labelled = [n for n in made.nodes if n != where]
    made.apply(placed(made.place(want(gpus, id_, exclude_nodes=tuple(labelled)))))


class TestGangs:
    def test_one_gpu_goes_to_the_fullest_node(self):
        made = engine(*nodes())
        take(made, "sites/s0/nodes/s0-p1-l2-n3", 5, "a")
        assert placed(made.place(want(1))).node_names == ("sites/s0/nodes/s0-p1-l2-n3",)
        assert placed(made.place(want(3))).node_names == ("sites/s0/nodes/s0-p1-l2-n3",)
        assert placed(made.place(want(4))).node_names != ("sites/s0/nodes/s0-p1-l2-n3",)

    def test_whole_nodes_stay_whole_while_broken_ones_suffice(self):
        made = engine(*nodes(leaves=1, spines=1, per_leaf=3))
        take(made, "sites/s0/nodes/s0-p0-l0-n1", 4, "a")
        made.apply(placed(made.place(want(4, "b"))))
        assert placed(made.place(want(16))).gpus == 16

    def test_a_gang_takes_the_smallest_domain_and_the_tightest(self):
        made = engine(*nodes(spines=2, leaves=2, per_leaf=4))
        take(made, "sites/s0/nodes/s0-p1-l0-n0", 8, "a")
        found = placed(made.place(want(24)))
        assert all("p1-l0" in name for name in found.node_names), "three whole nodes are left in that leaf"
        assert found.bottleneck.level is Level.LEAF
        assert placed(made.place(want(32))).bottleneck.level is Level.LEAF
        assert placed(made.place(want(40))).bottleneck.level is Level.SPINE
        assert placed(made.place(want(96))).bottleneck.level is Level.ZONE

    def test_required_levels_hold_or_nothing_is_placed(self):
        made = engine(*nodes(spines=1, leaves=2, per_leaf=2))
        assert placed(made.place(want(16, level=Level.LEAF)))
        answer = refused(made.place(want(32, level=Level.LEAF)))
        assert answer.smallest_change == "would fit within one spine (level)"
        assert not answer.ever

    def test_ranks_follow_the_tree(self):
        found = placed(engine(*nodes(spines=2, leaves=2, per_leaf=2)).place(want(64)))
        assert [r for part in found.nodes for r in part.ranks] == list(range(64))
        leaves = [name.rsplit("-", 1)[0] for name in found.node_names]
        assert leaves == sorted(leaves), "each leaf is entered once"

    def test_a_tensor_group_never_leaves_its_island(self):
        two_islands = nvlink(range(4), range(4, 8))
        made = engine(*nodes(spines=1, leaves=1, per_leaf=3, links=two_islands))
        found = placed(made.place(want(16, subgroups=(Subgroup(4),))))
        for part in found.nodes:
            for at in range(0, len(part.gpus), 4):
                assert len({g // 4 for g in part.gpus[at : at + 4]}) == 1
        assert isinstance(made.place(want(8, subgroups=(Subgroup(8),))), NoPlacement)

    def test_no_island_is_split_while_a_whole_one_is_free(self):
        made = engine(node("a", leaf="x", links=nvlink(range(4), range(4, 8))))
        made.apply(placed(made.place(want(2, "first"))))
        second = placed(made.place(want(4, "second")))
        assert {g // 4 for g in second.nodes[0].gpus} == {1}
        third = placed(made.place(want(2, "third")))
        assert {g // 4 for g in third.nodes[0].gpus} == {0}

    def test_pipeline_slices_stay_inside_a_leaf(self):
        made = engine(*nodes(spines=1, leaves=3, per_leaf=3))
        found = placed(made.place(want(48, subgroups=(Subgroup(16, Level.LEAF), Subgroup(8)))))
        for at in range(0, 48, 16):
            inside = {p.node.rsplit("-", 1)[0] for p in found.nodes if set(p.ranks) & set(range(at, at + 16))}
            assert len(inside) == 1, "a slice of two nodes crossed a leaf"

    def test_uneven_numbers_are_spread_evenly(self):
        found = placed(engine(*nodes()).place(want(12)))
        assert sorted(len(p.gpus) for p in found.nodes) == [6, 6]

    def test_min_and_max_nodes(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=4))
        assert len(placed(made.place(want(4, min_nodes=2))).node_names) == 2
        assert len(placed(made.place(want(4, min_nodes=4))).node_names) == 4
        assert refused(made.place(want(24, max_nodes=2))).smallest_change == "would fit without max_nodes"

    def test_scraps_are_used_when_nothing_even_fits(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=3))
        for at, gpus in enumerate((7, 5, 2)):
            take(made, f"sites/s0/nodes/s0-p0-l0-n{at}", gpus, f"x{at}")
        found = placed(made.place(want(10)))
        assert sorted(len(p.gpus) for p in found.nodes) == [1, 3, 6]

    def test_a_recovered_gang_stays_where_its_healthy_nodes_are(self):
        made = engine(*nodes(spines=2, leaves=4, per_leaf=4))
        near = tuple(f"sites/s0/nodes/s0-p1-l2-n{n}" for n in (0, 2))
        made.set_schedulable("sites/s0/nodes/s0-p1-l2-n1", False, "unreachable")
        found = placed(made.place(want(24, near_nodes=near)))
        assert set(near) < set(found.node_names)
        assert all("p1-l2" in n for n in found.node_names)

    def test_less_loaded_uplinks_are_preferred(self):
        """A gang that must cross leaves takes those whose uplinks nobody uses yet, although others would be tighter."""
        made = engine(*nodes(spines=1, leaves=4, per_leaf=3))
        crossing = [n for n in made.nodes if n.endswith(("l0-n0", "l1-n0"))]
        made.apply(
            placed(made.place(want(16, "noise", max_nodes=2, exclude_nodes=tuple(set(made.nodes) - set(crossing)))))
        )
        found = placed(made.place(want(48, "quiet")))
        assert {n.rsplit("-", 1)[0][-2:] for n in found.node_names} == {"l2", "l3"}

    def test_names_do_not_decide_between_unequal_places(self):
        """Renaming every node moves the answer with the hardware, not with the names."""
        fleet = nodes(spines=2, leaves=2, per_leaf=2)
        renamed = [replace(n, name=f"sites/s0/nodes/z{99 - at:02}") for at, n in enumerate(fleet)]
        back = {r.name: n.name for r, n in zip(renamed, fleet, strict=True)}
        plain, other = engine(*fleet), engine(*renamed)
        for made, full in ((plain, fleet[5].name), (other, renamed[5].name)):
            take(made, full, 6, "a")
        assert placed(plain.place(want(2))).node_names == tuple(
            back[n] for n in placed(other.place(want(2))).node_names
        )

    def test_decisions_do_not_depend_on_the_order_of_joining(self):
        fleet = nodes(sites=2)
        assert repr(engine(*fleet).place(want(40))) == repr(engine(*reversed(fleet)).place(want(40)))


class TestRequirements:
    def test_capability_rather_than_name(self):
        made = engine(
            node("small", model="RTX4090", memory=24 * GB), node("large", model="H200", memory=141 * GB, usd=5)
        )
        need = GpuRequirement(min_memory_bytes=100 * GB)
        assert placed(made.place(want(1, requirement=need))).node_names == ("sites/a/nodes/large",)
        assert placed(made.place(want(1))).node_names == ("sites/a/nodes/small",), "the lesser GPU suffices"

    def test_one_of_several_options_may_take_more_gpus(self):
        need = GpuRequirement(any_of=(GpuOption("H200"), GpuOption("A100-80GB", per_unit=2, throughput=0.9)))
        made = engine(*(node(f"a{n}", model="A100-80GB") for n in range(4)))
        found = placed(made.place(want(8, requirement=need)))
        assert (found.gpus, found.option.model) == (16, "A100-80GB")

    def test_a_gang_does_not_mix_models_while_one_suffices(self):
        made = engine(
            node("a", model="H200", leaf="x"),
            node("b", model="A100-80GB", leaf="x"),
            node("c", model="A100-80GB", leaf="y"),
        )
        found = placed(made.place(want(16)))
        assert {made.nodes[n].node.gpus[0].model for n in found.node_names} == {"A100-80GB"}

    def test_cpu_memory_labels_and_nvme(self):
        plain, marked = node("plain"), node("marked", labels=(("pool", "x"),), disks=(Disk("/d", 10**12),))
        made = engine(plain, marked)
        for need in (GpuRequirement(labels=(("pool", "x"),)), GpuRequirement(nvme=True)):
            assert placed(made.place(want(8, requirement=need))).node_names == ("sites/a/nodes/marked",)
        hungry = GpuRequirement(cpu_millicores_per_gpu=24_000)
        assert placed(made.place(want(4, "c", requirement=hungry)))
        answer = refused(made.place(want(16, requirement=hungry)))
        assert "cpu_millicores_per_gpu" in answer.smallest_change

    def test_no_spot_for_those_who_do_not_want_it(self):
        spot, owned = replace(node("spot"), price=Price(PriceKind.SPOT, 1.0)), node("owned", usd=3.0)
        made = engine(spot, owned)
        assert placed(made.place(want(8, preference=Preference(goal=Goal.CHEAPEST)))).node_names == (
            "sites/a/nodes/spot",
        )
        steady = GpuRequirement(no_spot=True)
        assert placed(made.place(want(8, "x", requirement=steady))).node_names == ("sites/a/nodes/owned",)
        answer = refused(made.place(want(16, "y", requirement=steady)))
        assert [b.constraint for b in answer.blocked] == ["without a price that is not spot"]
        assert answer.smallest_change == "would fit without its conditions on the node"

    def test_sites_and_exclusions(self):
        made = engine(*nodes(sites=2, spines=1, leaves=1, per_leaf=1))
        assert "s1" in placed(made.place(want(1, sites=("s1",)))).node_names[0]
        assert "s1" in placed(made.place(want(1, exclude_nodes=("sites/s0/nodes/s0-p0-l0-n0",)))).node_names[0]


class TestParts:
    def test_memory_is_counted_per_device(self):
        """30 and 30 GB of two GPUs do not make room for 60."""
        made = engine(node("n", gpus=2))
        for at in range(2):
            made.apply(placed(made.place(want(1, f"x{at}", share=Share(50 * GB)))))
        assert isinstance(made.place(want(1, share=Share(60 * GB))), NoPlacement)
        assert placed(made.place(want(1, share=Share(30 * GB))))

    def test_parts_fill_a_device_before_they_open_another(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=2))
        for at in range(4):
            made.apply(placed(made.place(want(1, f"x{at}", share=Share(10 * GB)))))
        assert made.free_gpus() == 15

    def test_the_last_part_to_leave_makes_the_gpu_whole(self):
        made = engine(node("n", gpus=1))
        for at in range(2):
            made.apply(placed(made.place(want(1, f"x{at}", share=Share(10 * GB)))))
        assert isinstance(made.place(want(1)), NoPlacement)
        made.release("x0")
        assert isinstance(made.place(want(1)), NoPlacement)
        made.release("x1")
        assert placed(made.place(want(1)))

    def test_a_mig_instance_is_a_device_for_those_who_ask_for_one(self):
        whole = node("n", gpus=2, usd=4.0)
        cut = replace(
            whole.gpus[0], model="A100 3g.40gb", mig_profile="3g.40gb", parent_uuid="GPU-0",
            memory_bytes=20 * GB, parent_memory_bytes=80 * GB,
        )  # fmt: skip
        made = engine(replace(whole, gpus=(cut, whole.gpus[1], replace(cut, index=2, uuid="MIG-2"))))
        instance = GpuRequirement(mig_profile="3g.40gb")
        found = placed(made.place(want(2, "x", requirement=instance)))
        assert found.nodes[0].gpus == (0, 2) and found.cost.usd_per_hour == 2.0, "a quarter of a GPU's price each"
        made.apply(found)
        none = refused(made.place(want(1, "y", requirement=GpuRequirement(any_of=(GpuOption("A100 3g.40gb"),)))))
        assert none.ever
        assert placed(made.place(want(1, "z"))).nodes[0].gpus == (1,), "who asks for a GPU gets a whole one"
        assert not refused(made.place(want(2, "w"))).ever
        assert not refused(made.place(want(1, "v", share=Share(40 * GB), requirement=instance))).ever

    def test_parts_that_are_kept_apart_lie_on_different_gpus(self):
        made = engine(node("n", gpus=2))
        found = placed(made.place(want(2, "x", share=Share(10 * GB, apart=True))))
        assert found.nodes[0].gpus == (0, 1)
        made.apply(found)
        assert not refused(made.place(want(3, "y", share=Share(10 * GB, apart=True)))).ever
        assert isinstance(made.place(want(2, "z", share=Share(75 * GB, apart=True))), NoPlacement)


class TestPreferences:
    def fleet(self) -> Engine:
        fast = [node(f"h{n}", model="H200", leaf="h", usd=4.0) for n in range(2)]
        slow = [node(f"a{n}", model="A100-80GB", leaf="a", usd=1.5) for n in range(2)]
        return engine(*fast, *slow)

    def request(self, **wish) -> PlaceRequest:
        need = GpuRequirement(any_of=(GpuOption("H200"), GpuOption("A100-80GB", throughput=0.5)))
        return want(8, requirement=need, preference=Preference(work_gpu_s=8 * 3600, **wish))

    def test_cheapest_that_meets_the_deadline(self):
        made = self.fleet()
        relaxed = placed(made.place(self.request(goal=Goal.CHEAPEST, deadline_s=3 * 3600)))
        assert (relaxed.option.model, round(relaxed.cost.total_usd)) == ("A100-80GB", 24)
        pressed = placed(made.place(self.request(goal=Goal.CHEAPEST, deadline_s=1.5 * 3600)))
        assert pressed.option.model == "H200"

    def test_fastest_within_the_budget(self):
        made = self.fleet()
        assert placed(made.place(self.request(goal=Goal.FASTEST, budget_usd=100))).option.model == "H200"
        assert placed(made.place(self.request(goal=Goal.FASTEST, budget_usd=25))).option.model == "A100-80GB"

    def test_a_deadline_that_cannot_be_met_gets_the_soonest_end(self):
        found = placed(self.fleet().place(self.request(goal=Goal.CHEAPEST, deadline_s=600)))
        assert found.option.model == "H200" and found.cost.run_s > 600

    def test_of_unknown_work_the_cheapest_is_that_per_speed_and_the_fastest_the_fastest(self):
        made = self.fleet()
        unknown = {goal: replace(self.request(), preference=Preference(goal=goal)) for goal in Goal}
        assert placed(made.place(unknown[Goal.CHEAPEST])).option.model == "A100-80GB"  # 1.5 / 0.5 is below 4
        assert placed(made.place(unknown[Goal.FASTEST])).option.model == "H200"

    def test_cheaper_nodes_of_the_same_kind_are_used_when_price_matters(self):
        made = engine(node("dear", usd=4.0), node("spot", usd=1.0))
        wish = Preference(goal=Goal.CHEAPEST)
        assert placed(made.place(want(8, preference=wish))).node_names == ("sites/a/nodes/spot",)

    def test_of_equally_close_places_the_cheaper_is_taken(self):
        own = [node(f"own/p/l/n{i}", usd=2.0) for i in range(4)]
        rented = [node(f"rented/p/l/n{i}", usd=4.0) for i in range(2)]  # the tighter leaf
        found = placed(engine(*own, *rented).place(want(16)))
        assert found.cost.usd_per_hour == 16 * 2.0
        assert placed(engine(*own[:1], *rented).place(want(16))).cost.usd_per_hour == 16 * 4.0, "closer comes first"

    def test_one_node_of_a_gang_is_rented_where_only_one_is_missing(self):
        own = [node(f"s/p/l/own{i}", usd=3.0) for i in range(3)]
        rented = [node(f"s/p/l/a{i}", usd=6.0) for i in range(4)]
        assert placed(engine(*own, *rented).place(want(32))).cost.usd_per_hour == 24 * 3.0 + 8 * 6.0

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from([1.0, 2.0, 3.5, 4.0, 7.0]), min_size=2, max_size=8), st.integers(2, 8))
    def test_no_nodes_beside_those_of_a_gang_are_as_close_and_cheaper(self, prices, count):
        made = engine(*(node(f"s/p/l/n{i}", usd=usd) for i, usd in enumerate(prices)))
        count = min(count, len(prices))
        assert placed(made.place(want(8 * count))).cost.usd_per_hour == 8 * sum(sorted(prices)[:count])


class TestData:
    def test_nodes_with_the_data_are_preferred_softly(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=3))
        holder = "sites/s0/nodes/s0-p0-l0-n2"
        made.upsert_dataset(DatasetFact("c4", 10**12, (holder,)))
        found = placed(made.place(want(8, datasets=("c4",))))
        assert found.node_names == (holder,)
        assert found.cost.fetch_s == 0
        assert "its data is here: 0 s; elsewhere 800 s" in found.reasons
        made.apply(found)
        elsewhere = placed(made.place(want(8, "next", datasets=("c4",))))
        assert elsewhere.cost.fetch_s == pytest.approx(10**12 / 1.25e9)

    def test_room_that_others_hold_is_none_and_what_does_not_fit_is_read_again_and_again(self):
        first, second = nodes(spines=1, leaves=1, per_leaf=2)
        made = engine(*(replace(one, dataset_cache_bytes=10**12) for one in (first, second)))
        made.upsert_dataset(DatasetFact("pinned", 6 * 10**11, held_on=(first.name,)))
        made.upsert_dataset(DatasetFact("c4", 5 * 10**11))
        wish = want(8, datasets=("c4",), data_reads=3.0)
        assert placed(made.place(wish)).node_names == (second.name,)
        assert placed(made.place(wish)).cost.fetch_s == pytest.approx(400)
        made.upsert_dataset(DatasetFact("filler", 6 * 10**11, held_on=(second.name,)))
        assert placed(made.place(wish)).cost.fetch_s == pytest.approx(3 * 400), "there is room nowhere"
        made.upsert_dataset(DatasetFact("c4", 5 * 10**11, held_on=(second.name,)))
        assert placed(made.place(wish)).node_names == (second.name,), "where its own room is kept for it"
        made.remove_dataset("pinned")
        made.upsert_dataset(DatasetFact("c4", 5 * 10**11))
        assert placed(made.place(wish)).node_names == (first.name,)

    def test_hard_locality_waits_instead(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=2))
        made.upsert_dataset(DatasetFact("c4", 10**12, ("sites/s0/nodes/s0-p0-l0-n1",)))
        assert (
            refused(made.place(want(16, datasets=("c4",), hard_locality=True))).smallest_change
            == "would fit with soft data locality"
        )


class TestPreemption:
    def full(self) -> tuple[Engine, list[Victim]]:
        made = engine(*nodes(spines=1, leaves=2, per_leaf=2))
        victims = []
        for at in range(4):
            made.apply(placed(made.place(want(8, f"low{at}"))))
            victims.append(Victim(f"low{at}", at % 2, lost_gpu_s=100.0 * at))
        return made, victims

    def test_the_least_valuable_goes(self):
        made, victims = self.full()
        before = made.digest()
        plan = made.preempt(want(8, priority=5), victims)
        assert isinstance(plan, PreemptionPlan)
        assert plan.victims == ("low0",)
        assert made.digest() == before, "planning changes nothing"

    def test_no_one_is_stopped_in_vain(self):
        made, victims = self.full()
        plan = made.preempt(want(16, priority=5, level=Level.LEAF), victims)
        assert isinstance(plan, PreemptionPlan)
        nodes_ = {made.placements[v].node_names[0].rsplit("-", 1)[0] for v in plan.victims}
        assert len(plan.victims) == 2
        assert len(nodes_) == 1, "both victims come from one leaf"

    def test_equal_priority_is_safe(self):
        made, victims = self.full()
        assert isinstance(made.preempt(want(8, priority=0), victims), NoPlacement)


class TestState:
    def test_a_gpu_is_never_given_twice(self):
        made = engine(node("n"))
        found = placed(made.place(want(4)))
        made.apply(found)
        with pytest.raises(AlreadyExists):
            made.apply(found)
        with pytest.raises(Aborted):
            made.apply(replace(found, id="other"))
        made.check()

    @given(st.lists(st.integers(0, 8), min_size=4, max_size=4), st.integers(0, 4), st.integers(1, 32), st.data())
    @settings(max_examples=60, deadline=None)
    def test_what_fits_is_never_more_than_the_freest_nodes_have_room_for(self, taken, most_nodes, gpus, data):
        fleet = [node(f"n{at}") for at in range(4)]
        made = engine(*fleet)
        for at, count in enumerate(taken):
            if count:
                take(made, fleet[at].name, count, f"t{at}")
        asked = want(gpus, max_nodes=most_nodes)
        room, left = made.room_of(asked), [8 - count for count in taken]
        assert room.total == sum(left)
        for at in data.draw(st.lists(st.integers(0, 3), max_size=4, unique=True)):
            if taken[at]:
                made.release(f"t{at}")
                room.frees(fleet[at].name, taken[at])
                left[at] = 8
        room.frees("unknown", 8)
        assert room.most == sum(sorted(left, reverse=True)[: most_nodes or 4])
        assert made.fits(asked) is None or gpus <= room.most

    def test_a_transaction_leaves_no_trace(self):
        made = engine(*nodes())
        made.apply(placed(made.place(want(40, "a"))))
        before = made.digest()
        with made.transaction():
            made.release("a")
            made.apply(placed(made.place(want(100, "b"))))
            made.set_schedulable("sites/s0/nodes/s0-p0-l0-n0", False, "cordoned")
        assert made.digest() == before
        with made.transaction() as kept:
            made.release("a")
            kept.commit()
        assert made.digest() != before
        made.check()

    def test_an_exception_rolls_back(self):
        made = engine(*nodes())
        before = made.digest()
        with pytest.raises(RuntimeError), made.transaction():
            made.apply(placed(made.place(want(8))))
            raise RuntimeError
        assert made.digest() == before

    def test_nodes_do_not_come_or_go_inside_a_transaction(self):
        made = engine(*nodes())
        with made.transaction(), pytest.raises(FailedPrecondition):
            made.remove_node("sites/s0/nodes/s0-p0-l0-n0")

    def test_what_is_placed_survives_its_node(self):
        fleet = nodes(spines=1, leaves=1, per_leaf=2)
        made = engine(*fleet)
        made.apply(placed(made.place(want(8, "a", exclude_nodes=(fleet[1].name,)))))
        made.remove_node(fleet[0].name)
        assert made.free_gpus() == 8
        made.upsert_node(fleet[0])
        assert made.free_gpus() == 8, "the GPUs of the node that came back are still held"
        made.release("a")
        assert made.free_gpus() == 16

    def test_part_of_a_gang_can_be_left_behind(self):
        made = engine(*nodes(spines=1, leaves=1, per_leaf=2))
        found = placed(made.place(want(16, "a")))
        made.apply(found)
        lost = found.node_names[0]
        made.release("a", nodes=[n for n in found.node_names if n != lost])
        assert made.free_gpus() == 8
        assert made.placements["a"].node_names == (lost,)
        made.release("a")
        assert made.free_gpus() == 16

    def test_a_broken_gpu_is_not_offered(self):
        whole = node("n", gpus=2)
        made = engine(replace(whole, gpus=(replace(whole.gpus[0], healthy=False), whole.gpus[1])))
        assert placed(made.place(want(1))).nodes[0].gpus == (1,)
        assert isinstance(made.place(want(2)), NoPlacement)

    def test_unknown_things_are_not_found(self):
        made = engine()
        for call in (lambda: made.release("x"), lambda: made.remove_node("x"), lambda: made.explain_placed("x")):
            with pytest.raises(NotFound):
                call()
        assert refused(made.place(want(1))).total_matching_gpus == 0


class TestExplain:
    def test_each_node_counts_once_under_its_first_obstacle(self):
        small = [node(f"r{n}", model="RTX4090", memory=24 * GB) for n in range(12)]
        made = engine(*small, *(node(f"h{n}", leaf="x") for n in range(5)), node("c", leaf="x"))
        made.set_schedulable("sites/a/nodes/c", False, "cordoned")
        for n in range(5):
            take(made, f"sites/a/nodes/h{n}", 8, f"x{n}")
        answer = refused(made.place(want(8, requirement=GpuRequirement(min_memory_bytes=40 * GB))))
        counted = {b.constraint: b.nodes for b in answer.blocked}
        assert counted == {"gpu memory < 40 GB": 12, "cordoned": 1, "no free GPU": 5}
        assert answer.ever
        assert answer.smallest_change == "would fit without min_memory_bytes"
        assert "48 GPUs" not in answer.nearest_miss

    def test_the_nearest_miss_and_fewer_gpus(self):
        made = engine(*nodes(spines=1, leaves=2, per_leaf=2))
        take(made, "sites/s0/nodes/s0-p0-l0-n0", 2, "a")
        answer = refused(made.place(want(32)))
        assert answer.nearest_miss == "the fleet has 30 of 32 GPUs free"
        assert answer.smallest_change == "would fit with 30 GPUs"

    def test_placed_work_tells_why_it_is_there(self):
        made = engine(*nodes())
        made.apply(placed(made.place(want(16, "a"))))
        told = made.explain_placed("a").reasons
        assert told[0].startswith("16 x H100-80GB on 2 nodes, site s0, spine p0, leaf")

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (want(0), "group.gpus"),
            (want(10**9), "group.gpus"),
            (want(6, subgroups=(Subgroup(4),)), "group.subgroups[0].size"),
            (want(1, share=Share(-1)), "group.share.memory_bytes"),
            (want(1, share=Share()), "group.share.memory_bytes"),
            (want(2, min_nodes=3), "min_nodes"),
            (want(1, requirement=GpuRequirement(min_memory_bytes=-5)), "requirement.min_memory_bytes"),
            (want(1, requirement=GpuRequirement(any_of=())), "requirement.any_of"),
            (want(1, preference=Preference(deadline_s=-1.0)), "preference"),
            (PlaceRequest(""), "id"),
        ],
    )
    def test_nonsense_is_refused_by_field(self, request_, field):
        with pytest.raises(InvalidArgument) as caught:
            engine(*nodes()).place(request_)
        assert field in [v.field for v in caught.value.violations]
