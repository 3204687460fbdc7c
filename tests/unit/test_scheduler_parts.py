"""Parts of GPUs: shares of one GPU side by side, MIG instances as devices; nothing is given twice, whatever came before."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.scheduler_world import GB, World, node, plan_with_queues
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import cost, lifecycle
from whaleflux_scheduler.core.model import Job, JobState, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "sites/s/nodes/a", "sites/s/nodes/b"


def cut(made, *profiles):
    """The node with its first GPU (80 GB) cut into MIG instances, listed behind the others."""
    parent = made.gpus[0]
    parts = tuple(
        replace(
            parent, index=len(made.gpus) + at, uuid=f"MIG-{parent.uuid}-{at}", model=f"{parent.model} {profile}",
            memory_bytes=gb * GB, mig_profile=profile, parent_uuid=parent.uuid, parent_memory_bytes=parent.memory_bytes,
        )
        for at, (profile, gb) in enumerate(profiles)
    )  # fmt: skip
    links = tuple(link for link in made.links if link.a)
    return replace(made, gpus=(*made.gpus[1:], *parts), links=links)


def planner(*nodes):
    made = plan_with_queues()
    made.apply(News(nodes=nodes, closed={n.name: "" for n in nodes}))
    return made


def job(name, gpus=1, at=0, **spec):
    asked = Spec(command=("x",), gpus=gpus, **spec)
    return Job(f"queues/q/jobs/{name}", asked, JobState.QUEUED, NOW + timedelta(seconds=at))


def choose(planner, asked):
    planner.apply(News(jobs=(asked,), candidates={asked.name: Candidate(asked)}))
    choices = planner.decide(NOW)
    planner.check()
    return next(c for c in choices if c.job == asked.name)


def start(planner, name, gpus=1, **spec):
    """The running job's record, or the words of why it waits (it is taken back then)."""
    asked = job(name, gpus, **spec)
    choice = choose(planner, asked)
    if choice.assignment is None:
        planner.apply(News(gone=(asked.name,)))
        return choice.decision.summary
    started = lifecycle.place(asked, choice.assignment, choice.decision, NOW)
    started = replace(started, state=JobState.RUNNING, attempt=replace(started.attempt, run_time=NOW, started=True))
    planner.apply(News(jobs=(started,)))
    return started


def gpus_of(job):
    return [uuid for task in job.attempt.tasks for uuid in task.gpus]


def end(planner, job):
    said = tuple(Report(task.id, TaskPhase.KILLED, -15) for task in job.attempt.tasks)
    over = lifecycle.advance(job, Observations(said), NOW, Timeouts())
    planner.apply(News(jobs=(over,)))
    return over


def as_stored(job):
    """The job as another scheduler reads it from its record."""
    message = convert.JOBS.read(convert.JOBS.encode(job))
    message.spec.gpus, message.spec.gpu.share_memory_bytes = job.spec.gpus, job.spec.share_memory_bytes
    message.spec.command[:] = job.spec.command
    return convert.job_of(message)


class TestShares:
    def test_two_run_on_one_gpu_and_a_third_that_does_not_fit_says_how_much_is_free(self):
        made = planner(node("s/a", 1))
        one, two = (start(made, name, share_memory_bytes=30 * GB) for name in ("one", "two"))
        assert gpus_of(one) == gpus_of(two)
        assert [task.share_bytes for task in one.attempt.tasks] == [30 * GB]
        assert "largest free share: 20 GB (sites/s/nodes/a)" in start(made, "three", share_memory_bytes=30 * GB)
        assert gpus_of(start(made, "four", share_memory_bytes=20 * GB)) == gpus_of(one)

    def test_a_shared_gpu_is_nobodys_whole_and_a_whole_one_nobodys_share(self):
        made = planner(node("s/a", 2))
        shared = start(made, "shared", share_memory_bytes=1 * GB)
        whole = start(made, "whole")
        assert gpus_of(shared) != gpus_of(whole)
        assert start(made, "second").startswith("waits")
        assert gpus_of(start(made, "beside", share_memory_bytes=70 * GB)) == gpus_of(shared)
        assert "largest free share: 9 GB" in start(made, "more", share_memory_bytes=70 * GB)

    def test_it_costs_its_part_of_a_gpu_and_says_so(self):
        made = planner(node("s/a", 4, usd=2.0))
        placed = start(made, "one", 2, share_memory_bytes=20 * GB)
        assert placed.attempt.usd_per_hour == 2 * 2.0 * 20 / 80
        assert placed.decision.summary.startswith("2 x 20 GB of H100-80GB on 1 node")
        stored = as_stored(placed)
        assert cost.attempt_gpu_s(stored.attempt, NOW + timedelta(hours=1)) == 2 * 20 / 80 * 3600
        assert cost.attempt_gpu_s(start(made, "whole").attempt, NOW + timedelta(hours=1)) == 3600

    def test_ranks_of_one_job_are_on_different_gpus_of_one_node_where_they_fit(self):
        made = planner(node("s/a", 2), node("s/b", 4))
        start(made, "tight", share_memory_bytes=60 * GB)  # leaves the tightest fit alone on its node
        gang = start(made, "gang", 3, share_memory_bytes=20 * GB)
        assert len(set(gpus_of(gang))) == 3 and len(gang.attempt.tasks) == 1
        assert "waits" in start(made, "wide", 7, share_memory_bytes=1 * GB)
        assert len(start(made, "both", 6, share_memory_bytes=1 * GB).attempt.tasks) == 2
        assert "waits" in start(made, "one-node", 6, share_memory_bytes=1 * GB, max_nodes=1)

    def test_what_is_held_is_learned_from_the_records(self):
        made = planner(node("s/a", 1))
        jobs = [start(made, name, share_memory_bytes=30 * GB) for name in ("one", "two")]
        stored = [as_stored(one) for one in jobs]
        assert [task.share_bytes for one in stored for task in one.attempt.tasks] == [30 * GB, 30 * GB]
        again = planner(node("s/a", 1))
        again.apply(News(jobs=tuple(stored)))
        again.check()
        assert "largest free share: 20 GB" in start(again, "three", share_memory_bytes=30 * GB)
        end(again, stored[0])
        assert gpus_of(start(again, "four", share_memory_bytes=50 * GB)) == gpus_of(stored[1])

    def test_only_as_many_make_room_as_must(self):
        made = planner(node("s/a", 1))
        first = start(made, "first", share_memory_bytes=30 * GB)
        second = start(made, "second", share_memory_bytes=40 * GB, at=1)
        urgent = job("urgent", priority=9, share_memory_bytes=45 * GB)
        choice = choose(made, urgent)
        assert choice.claim is not None and choice.claim.victims == (second.name,)
        waiting = lifecycle.claim(urgent, choice.claim, "")
        made.apply(News(jobs=(waiting,), candidates={waiting.name: None}))
        end(made, second)
        assert "largest free share: 5 GB" in start(made, "sneaks-in", share_memory_bytes=40 * GB)
        assert made.held().keys() == {first.name}
        made.apply(News(candidates={waiting.name: Candidate(waiting)}))
        assert [c.assignment is not None for c in made.decide(NOW) if c.job == urgent.name] == [True]
        made.check()


class TestMig:
    PROFILES = (("1g.10gb", 10), ("1g.10gb", 10), ("3g.40gb", 40))

    def test_a_profile_gets_its_instance_and_whole_jobs_never_do(self):
        made = planner(cut(node("s/a", 2, usd=2.0), *self.PROFILES))
        one = start(made, "one", mig_profile="3g.40gb")
        assert gpus_of(one) == ["MIG-GPU-s/a-0-2"] and one.attempt.usd_per_hour == 1.0
        assert cost.attempt_gpu_s(one.attempt, NOW + timedelta(hours=1)) == 1800
        assert one.decision.summary.startswith("1 x H100-80GB 3g.40gb on 1 node")
        assert one.decision.reasons[0].startswith("1 x H100-80GB 3g.40gb on 1 node"), (
            "what it got, not what is first there"
        )
        assert gpus_of(start(made, "whole")) == ["GPU-s/a-1"]
        assert start(made, "second").startswith("waits")
        assert "MIG instance 7g.80gb" in start(made, "none", mig_profile="7g.80gb")

    def test_a_size_gets_the_smallest_that_has_it(self):
        made = planner(cut(node("s/a", 2), *self.PROFILES))
        got = [gpus_of(start(made, f"j{at}", mig_memory_bytes=9 * GB))[0][-1] for at in range(3)]
        assert got == ["0", "1", "2"], "the two small ones first, then the large one"
        assert start(made, "more", mig_memory_bytes=9 * GB).startswith("waits")
        assert start(made, "huge", mig_memory_bytes=500 * GB).startswith("waits")

    def test_the_smallest_is_taken_also_where_that_breaks_into_an_untouched_node(self):
        used = cut(node("s/a", 2, usd=0.0), ("3g.40gb", 40), ("3g.40gb", 40))
        made = planner(used, cut(node("s/b", 2, usd=0.0), *self.PROFILES[:2]))
        assert gpus_of(start(made, "first", mig_profile="3g.40gb"))[0].startswith("MIG-GPU-s/a")
        assert gpus_of(start(made, "small", mig_memory_bytes=9 * GB)) == ["MIG-GPU-s/b-0-0"]

    def test_several_ranks_get_an_instance_each(self):
        made = planner(cut(node("s/a", 2), *self.PROFILES))
        assert len(gpus_of(start(made, "two", 2, mig_profile="1g.10gb", any_of=("H100-80GB",)))) == 2


class Parts(RuleBasedStateMachine):
    """Random jobs of all kinds come and go, the planner is started anew, GPUs fail and come back."""

    @initialize()
    def fleet(self):
        self.nodes = {A: cut(node("s/a", 3), *TestMig.PROFILES), B: node("s/b", 2)}
        self.planner = planner(*self.nodes.values())
        self.jobs = {}
        self.count = 0

    @rule(
        gpus=st.integers(1, 3),
        asked=st.one_of(
            st.just({}),
            st.builds(lambda gb: {"share_memory_bytes": gb * GB}, st.sampled_from((1, 15, 30, 45, 80))),
            st.sampled_from(({"mig_profile": "1g.10gb"}, {"mig_memory_bytes": 9 * GB}, {"mig_profile": "3g.40gb"})),
        ),
    )
    def comes(self, gpus, asked):
        self.count += 1
        started = start(self.planner, f"j{self.count}", gpus, **asked)
        if not isinstance(started, str):
            self.jobs[started.name] = started

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def goes(self, data):
        end(self.planner, self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs)))))

    @rule()
    def restarts(self):
        self.planner = planner(*self.nodes.values())
        self.planner.apply(News(jobs=tuple(self.jobs.values())))

    @rule(at=st.integers(0, 4), name=st.sampled_from((A, B)))
    def fails_or_returns(self, at, name):
        known = self.nodes[name]
        changed = tuple(replace(g, healthy=g.healthy ^ (i == at)) for i, g in enumerate(known.gpus))
        self.nodes[name] = replace(known, gpus=changed)
        self.planner.apply(News(nodes=(self.nodes[name],)))

    @invariant()
    def nothing_is_given_twice(self):
        self.planner.check()
        memory = {g.uuid: g.memory_bytes for n in self.nodes.values() for g in n.gpus}
        held = defaultdict(list)
        for one in self.jobs.values():
            for task in one.attempt.tasks:
                assert len(set(task.gpus)) == len(task.gpus)
                for uuid in task.gpus:
                    assert uuid.startswith("MIG-") == one.spec.wants_mig
                    held[uuid].append(task.share_bytes)
        for uuid, parts in held.items():
            assert len(parts) == 1 or (all(parts) and sum(parts) <= memory[uuid]), f"{uuid}: {parts}"

    def teardown(self):
        for one in getattr(self, "jobs", {}).values():
            end(self.planner, one)
        if hasattr(self, "planner"):
            assert self.planner.held() == {}
            healthy = sum(g.healthy and not g.mig_profile for g in self.nodes[B].gpus)
            placed = start(self.planner, "last", max(healthy, 1), any_of=("H100-80GB",))
            assert isinstance(placed, str) == (healthy == 0 and not any(g.healthy for g in self.nodes[A].gpus[:2]))


TestParts = Parts.TestCase
TestParts.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


async def test_agents_are_told_the_share_and_an_urgent_one_stops_only_who_must_go():
    def asks(gb):
        return {"gpu": pb.GpuRequirement(share_memory_bytes=gb * GB)}

    async with World() as world:
        (agent,) = await world.add(node("s/a", 1))
        first = await world.submit(1, **asks(30))
        await world.reaches(first, "RUNNING")
        second = await world.submit(1, **asks(40))
        await world.reaches(second, "RUNNING")
        told = {task.job: (list(task.task.gpu_uuids), task.task.share_memory_bytes) for task in agent.tasks.values()}
        assert told == {first: (["GPU-s/a-0"], 30 * GB), second: (["GPU-s/a-0"], 40 * GB)}
        await world.restart()  # a new leader learns the same from the records
        await world.planner.ask(lambda planner: planner.check())
        planned = await world.create(1, dry=True, priority=9, **asks(45))
        assert list(planned.decision.preempts) == [second]
        urgent = await world.submit(1, priority=9, **asks(45))
        await world.reaches(urgent, "RUNNING")
        states = [(await world.job(name)).state for name in (first, second)]
        assert states == [pb.JOB_STATE_RUNNING, pb.JOB_STATE_QUEUED], "the neighbour that leaves room stays"
        await world.planner.ask(lambda planner: planner.check())
