"""Reservations, pure: what may be kept, which GPUs, and what a plan does about them until they are over."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import node
from whaleflux_scheduler.core import reservation_rules, reservations, reserved_gpus
from whaleflux_scheduler.core.lifecycle import place
from whaleflux_scheduler.core.model import Job, JobState, Queue, Spec
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News, Plan
from whaleflux_scheduler.core.reservations import Reservation, ReservationState
from whaleflux_scheduler.core.reserved_gpus import Fleet
from whaleflux_scheduler.core.steady_time import BELIEVED_AFTER_S, SteadyTime
from whaleflux_scheduler.simulation.records import Spans
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.timeline import BEGIN, second_of
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

NOW = datetime(2026, 5, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SCHEDULED, ACTIVE, ENDED = ReservationState.SCHEDULED, ReservationState.ACTIVE, ReservationState.ENDED


def at(hours):
    return NOW + hours * HOUR


def reserved(id_="r", start=1.0, end=2.0, gpus=4, **more):
    if not more.get("maintenance"):
        more = {"queue": "q", "gpus": gpus} | more
    return Reservation(f"reservations/{id_}", at(start), at(end), **more)


def maintenance(id_="m", start=1.0, end=2.0, nodes=("sites/s/nodes/n0",), **more):
    return reserved(id_, start, end, nodes=nodes, maintenance=True, **more)


def fleet(nodes=4, gpus=4, **more):
    known = [node(f"s/n{number}", gpus, **more) for number in range(nodes)]
    return Fleet({one.name: one for one in known}, {one.name for one in known})


def admit(asked, *others, among=None):
    kept, wrong = reservation_rules.admitted(asked, others, among or fleet())
    assert not wrong, wrong
    return kept


def refused(asked, *others, among=None):
    _, wrong = reservation_rules.admitted(asked, others, among or fleet())
    return [(one.field, one.description) for one in wrong]


def uuids(kept):
    return {uuid for _, part in kept.held for uuid in part}


MIXED = [node(f"s/n{n}", 4, model=model) for n, model in enumerate(["A100-80GB", "H100-80GB", "H100-80GB", "L40S"])]


class TestTypes:
    def fleet(self, *closed):
        known = {one.name: one for one in MIXED}
        return Fleet(known, known.keys() - set(closed))

    def types(self, kept):
        models = {gpu.uuid: gpu.model for one in MIXED for gpu in one.gpus}
        return {models[uuid] for uuid in uuids(kept)}

    def test_all_are_of_one_type_or_it_is_refused_with_what_would_do(self):
        assert self.types(admit(reserved(gpus=8), among=self.fleet())) == {"H100-80GB"}
        field, why = refused(reserved(gpus=9), among=self.fleet())[0]
        assert field == "reservation.gpus"
        assert "of one type 8 can be kept in that time (the fleet has 8 H100-80GB, 4 A100-80GB, 4 L40S)" in why
        assert why.endswith("ask for at most 8, or take several types: --gpu-type any")

    def test_several_types_are_taken_where_any_will_do_and_no_type_has_enough(self):
        assert len(self.types(admit(reserved(gpus=8, gpu_type="any"), among=self.fleet()))) == 1
        kept = admit(reserved(gpus=16, gpu_type="any"), among=self.fleet())
        assert (kept.count(), len(self.types(kept))) == (16, 3)
        assert "the fleet has 16" in refused(reserved(gpus=17, gpu_type="any"), among=self.fleet())[0][1]

    def test_what_is_lost_is_replaced_by_the_same_type(self):
        kept = admit(
            reserved(gpus=4, nodes=()), among=self.fleet("sites/s/nodes/n0", "sites/s/nodes/n2", "sites/s/nodes/n3")
        )
        lost = replace(kept, held=((kept.held[0][0], kept.held[0][1][:2]),))
        again = reserved_gpus.replan(lost, (), self.fleet("sites/s/nodes/n2"))
        assert (self.types(again), again.short) == ({"H100-80GB"}, 0)
        full = reserved("s", gpus=2, gpu_type="H100-80GB", held=(("sites/s/nodes/n1", kept.held[0][1][2:]),))
        few = reserved_gpus.replan(lost, (full,), self.fleet("sites/s/nodes/n2"))
        assert (self.types(few), few.short) == ({"H100-80GB"}, 2), "not of others, which its jobs may not run on"


class TestAskedFor:
    @pytest.mark.parametrize(
        ("asked", "field", "says"),
        [
            (reserved(start=-1), "start_time", "begin now or later"),
            (reserved(start=9_000, end=9_001), "start_time", "366 days ahead"),
            (reserved(end=1.001), "end_time", "60 s"),
            (reserved(start=-3, end=-1), "end_time", "is over"),
            (reserved(end=9_000), "end_time", "366 days"),
            (reserved(gpus=0), "gpus", "1 to 20000"),
            (reserved(gpus=20_001), "gpus", "1 to 20000"),
            (reserved(queue=""), "queue", "name the queue"),
            (reserved(members=("ann",)), "members", "users/NAME"),
            (reserved(members=("users/ann",) * 1_001), "members", "at most 1000"),
            (reserved(reason="a\nb"), "reason", "one line"),
            (maintenance(nodes=()), "nodes", "is empty"),
            (replace(maintenance(), gpus=3), "gpus", "leave it out"),
            (maintenance(queue="q"), "queue", "leave it out"),
            (maintenance(members=("users/ann",)), "members", "leave it out"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_limit(self, asked, field, says):
        wrong = {one.field: one.description for one in reservation_rules.mistakes(asked, NOW)}
        assert says in wrong[f"reservation.{field}"], wrong

    def test_what_is_right_is_not_and_one_that_has_begun_keeps_its_start(self):
        assert not [*reservation_rules.mistakes(reserved(), NOW), *reservation_rules.mistakes(maintenance(), NOW)]
        assert not list(reservation_rules.mistakes(reserved(start=-1), NOW, begun=True))

    def test_more_than_there_is_is_refused_with_what_there_is(self):
        assert "the fleet has 16" in refused(reserved(gpus=17))[0][1]
        field, why = refused(reserved(gpu_type="H300"))[0]
        assert (field, "H100-80GB" in why) == ("reservation.gpu_type", True)
        assert "no such node" in refused(reserved(nodes=("sites/s/nodes/x",)))[0][1]
        assert "these nodes have 4" in refused(reserved(gpus=5, nodes=("sites/s/nodes/n1",)))[0][1]

    def test_what_is_kept_by_another_is_nobody_elses_in_that_time(self):
        first = admit(reserved(gpus=12))
        assert (
            "4 of 16 GPUs can be kept in that time, beside reservations/r"
            in refused(reserved("s", gpus=5), first)[0][1]
        )
        assert not uuids(first) & uuids(admit(reserved("s", gpus=4), first))
        assert len(uuids(admit(reserved("s", start=2, end=3, gpus=16), first))) == 16, "one after the other"
        assert len(uuids(admit(reserved("s", gpus=16), replace(first, state=ENDED)))) == 16

    def test_maintenance_does_not_touch_what_is_kept_nor_is_it_touched(self):
        kept = admit(reserved(gpus=4))
        (where, _), *_ = kept.held
        assert "kept by reservations/r" in refused(maintenance(nodes=(where,)), kept)[0][1]
        assert "kept by reservations/m" in refused(maintenance("m2", nodes=(where,)), maintenance(nodes=(where,)))[0][1]
        admit(maintenance(nodes=(where,), start=2, end=3), kept)
        beside = admit(reserved("s", gpus=12), maintenance(nodes=(where,)))
        assert where not in dict(beside.held)

    def parts(self, model="H100-80GB 1g.10gb"):
        """A node of MIG instances alone."""
        one = next(iter(fleet().nodes.values()))
        gpus = tuple(replace(gpu, model=model, parent_uuid="GPU-whole") for gpu in one.gpus)
        return Fleet({one.name: replace(one, gpus=gpus)}, {one.name})

    def test_parts_of_gpus_are_kept_where_they_are_asked_for_by_name_alone(self):
        ((field, why),) = refused(reserved(gpus=1), among=self.parts())
        assert (field, "no whole ones; to keep parts of them (MIG), name the type" in why) == (
            "reservation.gpus",
            True,
        ), why
        kept = reservation_rules.admitted(reserved(gpus=3, gpu_type="H100-80GB 1g.10gb"), [], self.parts())
        assert (kept[1], len(uuids(kept[0]))) == ([], 3)
        beside = reserved("s", gpus=2, gpu_type="H100-80GB 1g.10gb")
        assert (
            "1 of 4 H100-80GB 1g.10gb GPUs can be kept in that time"
            in refused(beside, kept[0], among=self.parts())[0][1]
        )

    @pytest.mark.parametrize("part", ["H200 1g.18gb", "1g.18gb", "MIG-5c1a6b2e", "MIG 3g.71gb"])
    def test_who_asks_for_parts_that_nobody_has_is_told_what_there_is(self, part):
        ((field, why),) = refused(reserved(gpus=1, gpu_type=part), among=self.parts())
        assert field == "reservation.gpu_type" and part in why and "there are H100-80GB 1g.10gb" in why

    def test_a_queue_keeps_no_more_than_it_may(self):
        queues = {
            "top": Queue("queues/top", max_gpus=12),
            "q": Queue("queues/q", guaranteed_gpus=8, parent="top"),
            "p": Queue("queues/p", parent="top"),
        }

        def wrong(asked, *others, guarantee=True):
            return [
                one.description for one in reservation_rules.within_quota(asked, others, queues, guarantee=guarantee)
            ]

        assert not wrong(reserved(gpus=8)) and not wrong(reserved(gpus=12), guarantee=False)
        (why,) = wrong(reserved("s", gpus=5), reserved(gpus=4))
        assert "queues/q is guaranteed 8 GPUs, and 4 are kept in that time already; ask for at most 4" in why
        (why,) = wrong(reserved("s", gpus=5), reserved(gpus=8, queue="p"))
        assert "queues/top may hold at most 12 GPUs, and 8 are kept" in why and "queue set top --max-gpus" in why
        assert not wrong(reserved("s", gpus=5), reserved(gpus=8, queue="p", start=5, end=6))
        assert "guaranteed 0 GPUs" in wrong(reserved(gpus=1, queue="p"))[0]
        assert "whaleflux queue ls" in wrong(reserved(queue="absent"))[0]


class TestChoice:
    def test_whole_nodes_of_one_leaf_and_one_type_that_nobody_has(self):
        nodes = [node(f"s/n{n}", 4, leaf=f"l{n // 2}", model="A100-80GB" if n > 5 else "H100-80GB") for n in range(8)]
        held = {f"GPU-s/n{n}-0" for n in (0, 1, 4, 6)}
        among = Fleet({one.name: one for one in nodes}, {one.name for one in nodes}, lambda uuid: int(uuid in held))
        kept = admit(reserved(gpus=8), among=among)
        assert dict(kept.held).keys() == {nodes[2].name, nodes[3].name}
        assert {name for name, _ in admit(reserved(gpus=8, gpu_type="A100-80GB"), among=among).held} == {
            nodes[6].name,
            nodes[7].name,
        }

    def test_a_node_that_takes_no_work_or_a_sick_gpu_is_not_chosen(self):
        among = fleet(nodes=2)
        shut = Fleet(among.nodes, {"sites/s/nodes/n1"})
        assert {name for name, _ in admit(reserved(), among=shut).held} == {"sites/s/nodes/n1"}
        sick = replace(among.nodes["sites/s/nodes/n1"].gpus[0], healthy=False)
        one = among.nodes["sites/s/nodes/n1"]
        ill = Fleet({one.name: replace(one, gpus=(sick, *one.gpus[1:]))}, {one.name})
        assert "3 of 3" not in refused(reserved(), among=ill)[0][1]

    def test_lost_gpus_are_replaced_and_the_others_stay(self):
        kept = admit(reserved(gpus=8))
        lost = kept.held[0][0]
        among = fleet()
        left = Fleet(among.nodes, among.open - {lost})
        again = reserved_gpus.replan(kept, (), left)
        assert (again.short, len(uuids(again))) == (0, 8)
        assert lost not in dict(again.held) and dict(kept.held)[kept.held[1][0]] == dict(again.held)[kept.held[1][0]]
        few = reserved_gpus.replan(kept, (), Fleet(among.nodes, {kept.held[1][0]}))
        assert (few.short, len(uuids(few))) == (4, 4)

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 8), st.integers(1, 6), st.integers(1, 16), st.booleans(), st.sets(st.integers(0, 3))
            ),
            max_size=12,
        ),
        st.lists(st.sets(st.integers(0, 3)), max_size=4),
    )
    def test_no_gpu_is_ever_kept_twice_at_a_time(self, asked, losses):
        among, kept = fleet(), list[Reservation]()
        for number, (start, hours, gpus, under, on) in enumerate(asked):
            nodes = tuple(f"sites/s/nodes/n{n}" for n in sorted(on))
            one = (
                maintenance(f"r{number}", start, start + hours, nodes)
                if under
                else reserved(f"r{number}", start, start + hours, gpus)
            )
            admitted, wrong = reservation_rules.admitted(one, kept, among)
            if not wrong and (nodes or not under):
                kept.append(admitted)
        for lost in losses:
            left = Fleet(among.nodes, among.open - {f"sites/s/nodes/n{n}" for n in lost})
            for at_, one in enumerate(kept):
                if not one.maintenance:
                    kept[at_] = reserved_gpus.replan(one, kept, left)
        for one in kept:
            others = [other for other in kept if other is not one]
            taken = reserved_gpus.taken_by(one, others)
            assert not taken & uuids(one) and not taken & {name for name, _ in one.held}
            assert one.maintenance or one.count() + one.short == one.gpus
        for now in range(15):
            now_kept = [
                (name, uuid)
                for name, parts in reservations.kept_now(
                    [one for one in kept if one.end > at(now)], among.nodes
                ).items()
                for part in parts.values()
                for uuid in part
            ]
            assert len({uuid for _, uuid in now_kept}) == len(now_kept)

    def test_a_state_never_goes_back(self):
        one = reserved()
        assert [reservations.state_at(one, at(hour)) for hour in (0, 1, 2)] == [SCHEDULED, ACTIVE, ENDED]
        assert reservations.state_at(replace(one, state=ACTIVE), at(0)) is ACTIVE, "a clock that was set back"
        assert reservations.state_at(replace(one, state=ENDED), at(0)) is ENDED


class World:
    """A plan, what is stored of its jobs and reservations, and time."""

    def __init__(self, nodes=2, queues=("q",)):
        self.plan, self.now, self.jobs, self.kept = Plan(), NOW, dict[str, Job](), dict[str, Reservation]()
        known = [node(f"s/n{number}", 4) for number in range(nodes)]
        self.moves = []
        self.step(
            nodes=tuple(known),
            closed={one.name: "" for one in known},
            queues={name: Queue(f"queues/{name}") for name in queues},
        )

    def step(self, hours=0.0, **news):
        self.now += hours * HOUR
        for _ in range(6):
            made = self.plan.step(News(**news), self.now)
            news = {"jobs": (), "candidates": {}}
            for move in made:
                if move.reservation is not None:
                    self.kept[move.job] = move.reservation
                    news["reservations"] = dict(self.kept)
                elif move.assignment is not None:
                    job = place(self.jobs[move.job], move.assignment, move.decision, self.now)
                    self.write(replace(job, state=JobState.RUNNING, attempt=replace(job.attempt, run_time=self.now)))
                    news["jobs"] = (*news["jobs"], self.jobs[move.job])
                    news["candidates"] = {**news["candidates"], move.job: None}
                self.moves.append(move)
            if not made:
                break
        self.plan.check()
        return made

    def write(self, job):
        self.jobs[job.name] = job
        return job

    def submit(self, name, gpus=1, queue="q", hours=0.0, **more):
        spec = Spec(command=("x",), gpus=gpus, **more)
        job = self.write(Job(f"queues/{queue}/jobs/{name}", spec, JobState.QUEUED, self.now, uid=name))
        self.step(hours, candidates={job.name: Candidate(job)}, jobs=(job,))
        return job.name

    def keep(self, asked):
        kept = admit(asked, *self.kept.values(), among=self.plan.reservation_fleet())
        self.kept[kept.name] = kept
        self.step(reservations=dict(self.kept))
        return kept

    def ends(self, *names, state=JobState.SUCCEEDED):
        gone = [self.write(replace(self.jobs[name], state=state, attempt=None)) for name in names]
        self.step(jobs=tuple(gone))

    def where(self, name):
        attempt = self.jobs[name].attempt
        return {uuid for task in attempt.tasks for uuid in task.gpus} if attempt is not None else set()

    def why(self, name):
        return self.plan.explain(self.jobs[name], (), self.now)


class TestPlan:
    def test_until_it_begins_its_gpus_are_for_who_is_over_by_then(self):
        world = World()
        kept = world.keep(reserved(gpus=8))
        short, long = world.submit("short", 4, time_limit_s=1_800.0), world.submit("long", 4, expected_s=7_200.0)
        assert world.where(short) <= uuids(kept) and not world.where(long)
        assert any("reservations/r (reserved 2026-05-01T01:00" in reason for reason in world.why(long).reasons)
        world.ends(short)
        world.step(0.99)
        assert not world.where(world.submit("late", 1, time_limit_s=600.0))

    def test_from_then_on_they_are_its_members_alone_and_afterwards_everybodys(self):
        world = World()
        kept = world.keep(reserved(gpus=4))
        member = world.submit("member", 2, reservation=kept.name)
        other = world.submit("other", 4, expected_s=36_000.0)
        assert not world.where(member), "it has not begun"
        assert "begins at 2026-05-01T01:00" in world.why(member).summary
        assert not world.where(other) & uuids(kept) and world.where(other)
        world.step(1.0)
        assert world.kept[kept.name].state is ACTIVE
        assert world.where(member) < uuids(kept)
        stranger = world.submit("stranger", 1, time_limit_s=1.0)
        assert not world.where(stranger)
        assert any("until they end, only their members use them" in reason for reason in world.why(stranger).reasons)
        second, third = world.submit("m2", 2, reservation=kept.name), world.submit("m3", 2, reservation=kept.name)
        assert world.where(member) | world.where(second) == uuids(kept)
        assert "0 of the 4 GPUs of reservations/r are free" in world.why(third).summary
        world.ends(second)
        assert world.where(third) and not world.where(stranger), "members go first"
        world.ends(third)
        world.step(1.0)
        assert world.kept[kept.name].state is ENDED
        assert world.where(stranger) and world.where(member), "it goes on as ordinary work"

    def test_who_is_there_in_spite_of_its_estimate_leaves_in_time_and_a_member_does_not(self):
        world = World()
        fillers = [world.submit(f"f{n}", 4) for n in range(2)]
        kept = world.keep(reserved(gpus=8))
        world.step(0.9)
        assert not world.kept[kept.name].victims
        look = world.plan.next_look
        grace = timedelta(seconds=world.jobs[fillers[0]].grace_s + 15)
        assert look == kept.start - grace
        world.step((look - world.now) / HOUR)
        assert set(world.kept[kept.name].victims) == set(fillers)
        world.step((kept.start - world.now) / HOUR)
        assert world.plan.next_look > world.now, "who does not leave is not asked all the time"
        world.ends(*fillers, state=JobState.SUCCEEDED)
        member = world.submit("member", 8, reservation=kept.name)
        assert world.where(member) == uuids(kept)
        world.step(0.5)
        assert member not in world.kept[kept.name].victims

    def test_who_said_too_little_and_started_late_is_asked_to_leave_in_time(self):
        world = World(nodes=1)
        kept = world.keep(reserved(gpus=4))
        late = world.submit("late", 4, expected_s=60.0)
        assert world.where(late) == uuids(kept)
        assert world.plan.next_look == kept.start - timedelta(seconds=world.jobs[late].grace_s + 15)

    def test_members_of_another_queue_wait_and_say_so(self):
        world = World(queues=("q", "p"))
        kept = world.keep(reserved(start=0.0))
        outsider = world.submit("outsider", 1, queue="p", reservation=kept.name)
        assert not world.where(outsider) and "for jobs of queue q" in world.why(outsider).summary

    def test_nobody_is_stopped_for_others_on_reserved_gpus_and_no_priority_gets_them(self):
        world = World(nodes=1)
        kept = world.keep(reserved(start=0.0, gpus=4))
        member = world.submit("member", 2, reservation=kept.name)
        high = world.submit("high", 4, priority=1_000)
        assert world.where(member) and not world.where(high)
        assert not [move for move in world.moves if move.claim is not None]

    def test_maintenance_empties_its_nodes_lets_nobody_in_and_ends_by_itself(self):
        world = World(nodes=2)
        runs, cpu = world.submit("runs", 4), world.submit("cpu", 0, ranks=1)
        (where,) = {task.node for task in world.jobs[runs].attempt.tasks}
        nodes = tuple(sorted({where, *(task.node for task in world.jobs[cpu].attempt.tasks)}))
        kept = world.keep(maintenance(nodes=nodes))
        fits = world.submit("fits", 1, time_limit_s=600.0)
        assert world.where(fits)
        world.ends(fits)
        world.step(0.999)
        assert {runs, cpu} <= set(world.kept[kept.name].victims)
        world.ends(runs, cpu)
        world.step(0.001)
        assert world.kept[kept.name].state is ACTIVE
        free = 8 - 4 * len(nodes)
        after = world.submit("after", 8)
        light = world.submit("light", 0, ranks=1, time_limit_s=60.0)
        assert not world.where(after)
        assert {task.node for task in getattr(world.jobs[light].attempt, "tasks", ())}.isdisjoint(nodes) or not free
        world.step(closed={nodes[0]: ""})
        assert not world.where(after), "health alone does not open it"
        world.step(1.0)
        assert world.kept[kept.name].state is ENDED and world.where(after)

    def test_work_without_gpus_does_not_start_where_it_would_reach_into_maintenance(self):
        world = World(nodes=1)
        world.keep(maintenance())
        long, short = (world.submit(n, 0, ranks=1, time_limit_s=s) for n, s in (("long", 7_200.0), ("short", 600.0)))
        assert world.jobs[long].attempt is None and world.jobs[short].attempt is not None

    def test_a_node_that_was_repaired_with_another_gpu_stays_empty_until_the_end(self):
        world = World(nodes=1)
        kept = world.keep(maintenance(start=0.5))
        waits = world.submit("waits", 1, expected_s=36_000.0)
        known = node("s/n0", 4)
        fresh = replace(known, gpus=(*known.gpus[:3], replace(known.gpus[3], uuid="GPU-new")))
        world.step(nodes=(fresh,))
        assert not world.where(waits)
        world.step(0.5)
        assert not world.where(waits)
        world.step(1.5)
        assert world.kept[kept.name].state is ENDED and world.where(waits)

    def test_a_lost_node_is_replaced_after_a_while_and_what_is_short_is_said(self):
        world = World(nodes=3)
        kept = world.keep(reserved(gpus=8))
        lost = kept.held[0][0]
        world.step(closed={lost: "unreachable"})
        assert world.kept[kept.name] == kept, "it may come back"
        world.step(0.02)
        again = world.kept[kept.name]
        assert (again.short, len(uuids(again)), lost in dict(again.held)) == (0, 8, False)
        other = again.held[0][0]
        world.step(closed={other: "unreachable"})
        world.step(0.02)
        assert world.kept[kept.name].short == 4
        world.step(closed={other: ""})
        world.step(0.02)
        assert world.kept[kept.name].short == 0

    def test_another_plan_goes_on_with_what_is_stored(self):
        world = World()
        kept = world.keep(reserved(start=0.0))
        member = world.submit("member", 2, reservation=kept.name)
        world.plan, before = Plan(), world.plan
        known = [node(f"s/n{number}", 4) for number in range(2)]
        world.step(
            nodes=tuple(known),
            closed={one.name: "" for one in known},
            queues={"q": Queue("queues/q")},
            jobs=tuple(world.jobs.values()),
            reservations=dict(world.kept),
        )
        assert world.plan.held() == before.held()
        assert world.where(world.submit("rest", 4)).isdisjoint(uuids(kept))
        assert world.where(world.submit("second", 2, reservation=kept.name)) == uuids(kept) - world.where(member)

    def test_a_member_starts_when_another_plan_hears_of_its_nodes_after_it_was_tried(self):
        world = World()
        kept = world.keep(reserved(gpus=8, start=0.5))
        member = world.submit("member", 8, reservation=kept.name)
        world.plan, known = Plan(), [node(f"s/n{number}", 4) for number in range(2)]
        world.step(
            1.0,
            nodes=tuple(known),
            closed={one.name: "not heard of" for one in known},
            queues={"q": Queue("queues/q")},
            jobs=tuple(world.jobs.values()),
            candidates={member: Candidate(world.jobs[member])},
            reservations=dict(world.kept),
        )
        assert not world.where(member)
        for one in known:
            world.step(closed={one.name: ""})
        assert world.where(member) == uuids(kept)

    def test_what_was_deleted_is_everybodys_and_its_members_are_ordinary(self):
        world = World(nodes=1)
        kept = world.keep(reserved(gpus=4))
        member, other = world.submit("member", 2, reservation=kept.name), world.submit("other", 2)
        assert not world.where(member) and not world.where(other)
        world.kept.clear()
        world.step(reservations={})
        assert world.where(member) and world.where(other)


SLOT_S = 600.0
ENDED_STATES = (JobState.SUCCEEDED, JobState.FAILED)  # a restart may take a job over its limit


class TestTime:
    """Through the simulator: the production plan, whatever comes."""

    def simulate(self, asked, jobs, *, expected=True):
        known = [node(f"s/n{number}", 4) for number in range(3)]
        among, kept = Fleet({one.name: one for one in known}, {one.name for one in known}), list[Reservation]()
        for number, (start, slots, gpus, under) in enumerate(asked):
            times = {
                "start": BEGIN + timedelta(seconds=start * SLOT_S),
                "end": BEGIN + timedelta(seconds=(start + slots) * SLOT_S),
            }
            one = (
                replace(maintenance(f"r{number}", nodes=(f"sites/s/nodes/n{gpus % 3}",)), **times)
                if under
                else replace(reserved(f"r{number}", gpus=gpus), **times)
            )
            admitted, wrong = reservation_rules.admitted(one, kept, among)
            kept += [] if wrong else [admitted]
        submitted = [
            Submission(
                f"queues/q/jobs/j{number}",
                Spec(
                    command=("x",),
                    gpus=gpus,
                    time_limit_s=minutes * 60.0 + 1.0,
                    expected_s=minutes * 60.0 + 1.0 if expected else None,  # else what was learned of others
                    priority=priority,
                    reservation=f"reservations/r{of}" if of < len(asked) else "",
                ),
                at_ * SLOT_S / 3,
                minutes * 60.0,
            )
            for number, (at_, minutes, gpus, priority, of) in enumerate(sorted(jobs))
        ]
        spans = Spans(frozenset(one.name for one in known), 10_000)
        workload = Workload(submitted, {"q": Queue("queues/q")}, Delays(save_s=10.0, restart_s=30.0), (), tuple(kept))
        simulation = Simulation(known, workload, spans=spans)
        result = simulation.run(200 * SLOT_S)
        simulation.check()
        return kept, {one.name: one.spec for one in submitted}, spans, result

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(1, 12), st.booleans()), max_size=4),
        st.lists(
            st.tuples(
                st.integers(0, 60),
                st.integers(1, 90),
                st.integers(1, 8),
                st.sampled_from((0, 0, 50)),
                st.integers(0, 8),
            ),
            max_size=16,
        ),
    )
    def test_with_right_limits_nobody_is_ever_in_a_reservation_that_is_not_its_own(self, asked, jobs):
        kept, specs, spans, result = self.simulate(asked, jobs)
        for span in spans.kept:
            for one in kept:
                own = specs[span.job].reservation == one.name and not one.maintenance
                theirs = one.nodes if one.maintenance else [uuid for _, part in one.held for uuid in part]
                touches = span.node in theirs or not set(span.gpus).isdisjoint(theirs)
                within = span.from_s < second_of(one.end) and second_of(one.start) < span.to_s
                assert own or not (touches and within), (span, one)
            alike = not any(spec.priority for spec in specs.values())
            in_nobodys_way = span.why == "suspended" and alike and not specs[span.job].reservation
            assert not in_nobodys_way, span
        assert all(outcome.state in ENDED_STATES for outcome in result.outcomes), "nobody waits for ever"

    def test_who_is_quick_as_a_rule_is_held_to_its_limit_and_who_starts_late_is_asked_in_time(self):
        quick, late = [(0, 1, 1, 0, 9)] * 3, [(42, 10, 1, 0, 9), (42, 10, 3, 0, 9), (42, 11, 5, 0, 9)]
        _, _, spans, _ = self.simulate([(15, 1, 12, False)], [*quick, *late], expected=False)
        assert not [span for span in spans.kept if span.why == "suspended"]
        assert not [span for span in spans.kept if span.from_s < 15 * SLOT_S < span.to_s]

    def test_members_of_one_that_is_over_leave_for_the_next_one_in_time(self):
        _, _, spans, _ = self.simulate([(0, 3, 12, False), (3, 3, 12, False)], [(0, 80, 8, 0, 0), (0, 10, 8, 0, 1)])
        ran = [(span.job.rpartition("/")[2], span.from_s, span.to_s) for span in spans.kept]  # j0: of the second one
        assert [to_s for name, from_s, to_s in ran if name == "j1" and from_s == 0.0 and to_s < 3 * SLOT_S]
        assert {from_s for name, from_s, _ in ran if name == "j0"} == {3 * SLOT_S}
        assert all(to_s <= 3 * SLOT_S or from_s >= 6 * SLOT_S for name, from_s, to_s in ran if name == "j1")

    def test_members_start_at_its_begin_to_the_second_and_are_not_kept_by_a_full_queue(self):
        _, _, spans, _ = self.simulate([(3, 6, 8, False)], [(0, 90, 8, 0, 9), (0, 30, 8, 0, 0), (1, 10, 4, 0, 9)])
        begun = {span.job.rpartition("/")[2]: span.from_s for span in spans.kept}
        assert begun["j0"] == 3 * SLOT_S


class TestSteadyTime:
    def test_a_jump_counts_once_it_has_held_and_one_that_went_back_never(self):
        time, hour = SteadyTime(), 3600.0
        assert time.ahead_s(NOW, 0.0) == 0.0
        assert time.ahead_s(NOW + HOUR, hour) == 0.0, "as time goes"
        assert time.ahead_s(NOW + 3 * HOUR, hour) == 2 * hour
        assert time.ahead_s(NOW + HOUR + timedelta(seconds=60), hour + 60.0) == 0.0, "and back"
        late = NOW - HOUR
        assert time.ahead_s(late, hour + 60.0) == pytest.approx(-2 * hour - 60.0)
        after = BELIEVED_AFTER_S
        assert time.ahead_s(late + timedelta(seconds=after - 1), hour + 60 + after - 1) < 0
        assert time.ahead_s(late + timedelta(seconds=after), hour + 60 + after) == 0.0

    def test_small_corrections_are_followed(self):
        time = SteadyTime()
        assert [time.ahead_s(NOW + timedelta(seconds=11.0 * at), 10.0 * at) for at in range(50)] == [0.0] * 50
