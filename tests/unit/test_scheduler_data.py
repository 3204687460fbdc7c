"""Data of jobs: its room is taken when they are placed or promised a place, and it is pulled to that place before they start."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import World, node, plan_with_queues, until
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import agent_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import data_claims
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.data_ahead import MOST_MOVES, DataAhead
from whaleflux_scheduler.core.model import Claim, Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.plan import News
from whaleflux_scheduler.core.queue_order import Turns
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S, QueueShares

NOW = datetime(2026, 5, 1, tzinfo=UTC)
A, B = "sites/s/nodes/a", "sites/s/nodes/b"
TEXT, IMAGES = "datasets/text", "datasets/images"
TB = 10**12


def job(name, gpus=4, at=0, priority=0, **spec):
    created = NOW + timedelta(seconds=at)
    return Job(
        f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, priority=priority, **spec), JobState.QUEUED, created
    )


def planner_of(*names, room=10 * TB, sizes=((TEXT, 6 * TB), (IMAGES, 6 * TB))):
    planner = plan_with_queues()
    nodes = [replace(node(f"s/{name}"), dataset_cache_bytes=room) for name in names]
    facts = tuple(DatasetFact(name, size) for name, size in sizes)
    planner.apply(News(nodes=tuple(nodes), closed={n.name: "" for n in nodes}, datasets=facts))
    return planner


def decide(planner, *jobs):
    planner.apply(News(jobs=jobs, candidates={j.name: Candidate(j) for j in jobs}))
    return {move.job: move for move in planner.decide(NOW)}


def run(planner, waiting):
    """The job as it is when all of it runs, and the planner knows that."""
    move = decide(planner, waiting)[waiting.name]
    after = lifecycle.place(waiting, move.assignment, move.decision, NOW)
    for phase in (TaskPhase.ACCEPTED, TaskPhase.RUNNING):
        said = tuple(Report(task.id, phase, rendezvous="h:1") for task in after.attempt.tasks)
        after = lifecycle.advance(after, Observations(said), NOW, Timeouts())
    planner.apply(News(jobs=(after,)))
    return after


class TestRoom:
    def test_two_that_are_placed_in_one_step_do_not_count_the_same_room(self):
        planner = planner_of("a", "b")
        moves = decide(planner, job("one", 1, datasets=("text",)), job("two", 1, at=1, datasets=("images",)))
        places = {move.assignment.nodes[0][0] for move in moves.values()}
        assert len(places) == 2, "each has room for one of them"
        assert {planner.data_book.held_bytes(name) for name in places} == {6 * TB}

    def test_what_a_job_left_is_room_again_and_a_new_leader_learns_who_holds_what(self):
        planner = planner_of("a")
        running = run(planner, job("one", 1, datasets=("text",)))
        fresh = planner_of("a")
        fresh.apply(News(jobs=(running,)))
        for known in (planner, fresh):
            assert known.data_book.held_by(running.name) == {(A, TEXT)}
            known.apply(News(gone=(running.name,)))
            assert known.data_book.held_bytes(A) == 0

    def test_who_insists_on_a_copy_gets_the_room_that_a_pin_of_others_leaves(self):
        planner = planner_of("a")
        pinned = DatasetFact(IMAGES, 6 * TB, (A,), held_on=(A,))
        planner.apply(News(datasets=(pinned, DatasetFact(TEXT, 6 * TB, (A,)))))
        local = job("one", 1, datasets=("text",), require_local_data=True)
        assert [move.assignment for move in decide(planner, local).values()] == [None]
        planner.apply(News(datasets=(replace(pinned, held_on=()),)))
        assert [move.assignment is not None for move in planner.decide(NOW)] == [True]

    def test_data_that_is_read_where_it_is_takes_no_room(self):
        planner = planner_of("a")
        running = run(planner, job("one", 1, datasets=("text",)))
        remote = replace(running, attempt=replace(running.attempt, remote_datasets=(TEXT,)))
        fresh = planner_of("a")
        fresh.apply(News(jobs=(remote,)))
        assert fresh.data_book.held_bytes(A) == 0


class TestDivided:
    """Data that the ranks of a job divide: each node has the room, and the queue the charge, of what its own ranks read."""

    def test_each_node_holds_the_part_of_its_ranks_and_the_queue_all_of_it_once(self):
        planner = planner_of("a", "b", room=4 * TB)
        running = run(planner, job("one", 8, datasets=("text",), datasets_by_rank=("text",)))
        assert planner.data_book.held_bytes(A) == planner.data_book.held_bytes(B) == 3 * TB
        assert planner.data_book.charged_bytes("q") == 6 * TB
        fresh = planner_of("a", "b", room=4 * TB)
        fresh.apply(News(jobs=(running,)))
        assert fresh.data_book.held_by(running.name) == planner.data_book.held_by(running.name)
        assert not fresh.data_book.nodes_of(TEXT), "nobody takes a part for the whole"

    def test_beyond_the_quota_it_is_read_where_it_is(self):
        planner = planner_of("a", "b")
        planner.apply(News(queues={"q": Queue("queues/q", data_quota_bytes=5 * TB)}))
        (move,) = decide(planner, job("one", 8, datasets=("text",), datasets_by_rank=("text",))).values()
        assert move.assignment.remote_datasets == (TEXT,)
        planner.apply(News(queues={"q": Queue("queues/q", data_quota_bytes=6 * TB)}))
        (move,) = decide(planner, job("one", 8, datasets=("text",), datasets_by_rank=("text",))).values()
        assert move.assignment.remote_datasets == ()

    def test_with_other_ranks_it_holds_other_parts(self):
        planner = planner_of("a", "b")
        running = run(planner, job("one", 8, datasets=("text",), datasets_by_rank=("text",)))
        smaller = replace(running, attempt=replace(running.attempt, tasks=running.attempt.tasks[:1]))
        planner.apply(News(jobs=(smaller,)))
        (task,) = smaller.attempt.tasks
        assert planner.data_book.held_bytes(task.node) == 6 * TB == planner.data_book.charged_bytes("q")

    def test_nothing_of_it_is_pulled_ahead(self):
        planner = planner_of("a")
        run(planner, job("low"))
        high = job("high", at=1, priority=10, datasets=("text", "images"), datasets_by_rank=("text",))
        assert decide(planner, high)[high.name].claim.datasets == (IMAGES,)


class TestAhead:
    def claimed(self, planner, **spec):
        run(planner, job("low"))
        high = job("high", at=1, priority=10, **spec)
        return high, decide(planner, high)[high.name].claim

    def test_the_nodes_of_a_claim_pull_its_data_at_once_with_its_room(self):
        planner = planner_of("a")
        high, claim = self.claimed(planner, datasets=("text", "images"))
        assert claim.datasets == (TEXT,), "both do not fit"
        assert planner.data_book.held_by(high.name) == {(A, TEXT)}
        after = lifecycle.claim(high, claim, "x")
        planner.apply(News(jobs=(after,), candidates={after.name: Candidate(after)}))
        assert planner.data_book.held_by(high.name) == {(A, TEXT)}
        planner.apply(News(gone=(high.name,)))
        assert planner.data_book.held_bytes(A) == 0

    def test_what_only_a_task_may_fetch_waits_for_the_task(self):
        planner = planner_of("a", sizes=())
        planner.apply(News(datasets=(DatasetFact(TEXT, 6 * TB, for_tasks_only=True),)))
        assert self.claimed(planner, datasets=("text",))[1].datasets == ()

    def test_a_claim_that_moves_and_moves_has_nothing_pulled_ahead_any_more(self):
        ahead, high = DataAhead(Engine(), QueueShares(HALF_LIFE_S)), job("high", datasets=("text",))
        claims = [Claim(((name, ("g",)),), (), NOW) for name in (A, A, B, A, B, A, B)]
        pulled = [ahead.with_data(high, claim).datasets for claim in claims]
        assert pulled == [(TEXT,)] * (2 + MOST_MOVES) + [()] * 2
        ahead.forget(high.name)
        assert ahead.with_data(high, claims[0]).datasets == (TEXT,)


class TestQuota:
    """Data that the jobs of a queue hold on nodes, against what it may hold; queues above count it, too."""

    def planner(self, *nodes, quota=6 * TB, above=0):
        planner = planner_of(*nodes, room=100 * TB)
        planner.apply(News(queues=self.queues(quota, above)))
        return planner

    def queues(self, quota, above=0):
        top = Queue("queues/top", data_quota_bytes=above)
        below = {name: Queue(f"queues/{name}", parent="top", data_quota_bytes=quota) for name in ("q", "r")}
        return {"top": top, **below}

    def test_what_is_beyond_it_is_read_where_it_is_and_the_plan_says_so(self):
        planner = self.planner("a", "b")
        run(planner, job("one", 4, datasets=("text",)))
        (move,) = decide(planner, job("two", 4, at=1, datasets=("text",))).values()
        assert move.assignment.remote_datasets == (TEXT,)
        assert move.decision.reasons[0] == (
            f"reads {TEXT} where it is: queue q holds 6 TB of at most 6 TB of data on nodes, and 6 TB more would be needed"
        )
        assert planner.data_book.held_by("queues/q/jobs/two") == frozenset()
        placed = lifecycle.place(job("two", 4), move.assignment, move.decision, NOW)
        assert placed.attempt.remote_datasets == (TEXT,), "its agents are told"

    def test_a_copy_that_the_queue_holds_already_costs_it_nothing_more(self):
        planner = self.planner("a")
        run(planner, job("one", 2, datasets=("text",)))
        (move,) = decide(planner, job("two", 2, at=1, datasets=("text",))).values()
        assert move.assignment.remote_datasets == ()
        assert planner.data_book.charged_bytes("q") == 6 * TB

    def test_other_queues_have_their_own_and_the_one_above_counts_both(self):
        planner = self.planner("a", "b", above=11 * TB)
        run(planner, job("one", 4, datasets=("text",)))
        theirs = replace(job("two", 4, at=1, datasets=("text",)), name="queues/r/jobs/two")
        (move,) = decide(planner, theirs).values()
        assert move.assignment.remote_datasets == (TEXT,)
        assert "queue top holds 6 TB of at most 11 TB" in move.decision.reasons[0]
        assert planner.queue_use(["top", "q", "r"])["top"].data_bytes == 6 * TB

    def test_who_insists_on_a_copy_waits_with_the_numbers_until_there_is_less_or_more_is_allowed(self):
        planner = self.planner("a", "b")
        planner.apply(News(datasets=(DatasetFact(TEXT, 6 * TB, (A, B)),)))
        first = run(planner, job("one", 4, datasets=("text",)))
        local = job("two", 4, at=1, datasets=("text",), require_local_data=True)
        (told,) = decide(planner, local).values()
        words = "queue q holds 6 TB of at most 6 TB of data on nodes, and 6 TB more would be needed"
        assert told.assignment is None and words in told.decision.summary
        assert "--data-quota" in told.decision.smallest_change
        assert words in planner.explain(local, (), NOW).summary
        planner.apply(News(queues=self.queues(12 * TB)))
        assert [move.assignment is not None for move in planner.decide(NOW)] == [True]
        planner = self.planner("a", "b")
        planner.apply(News(datasets=(DatasetFact(TEXT, 6 * TB, (A, B)),), jobs=(first,)))
        assert [move.assignment for move in decide(planner, local).values()] == [None]
        planner.apply(News(gone=(first.name,)))
        assert [move.assignment is not None for move in planner.decide(NOW)] == [True]

    def test_pins_that_name_the_queue_count_and_free_what_they_held(self):
        planner = self.planner("a", "b")
        pinned = DatasetFact(IMAGES, 6 * TB, (A, B), charged_on=(("q", B),))
        planner.apply(News(datasets=(pinned, DatasetFact(TEXT, 6 * TB, (A, B)))))
        local = job("one", 4, datasets=("text",), require_local_data=True)
        assert [move.assignment for move in decide(planner, local).values()] == [None]
        planner.apply(News(datasets=(replace(pinned, charged_on=()),)))
        assert [move.assignment is not None for move in planner.decide(NOW)] == [True]

    def test_nothing_is_pulled_ahead_beyond_it(self):
        planner = self.planner("a", "b")
        run(planner, job("one", 4, datasets=("text",)))
        run(planner, job("low", 4, at=1))
        high = job("high", 4, at=2, priority=10, datasets=("images",))
        assert decide(planner, high)[high.name].claim.datasets == ()

    def test_who_runs_and_is_to_move_holds_what_it_reads_until_it_is_there(self):
        planner = self.planner("a", "b")
        running = run(planner, job("one", 4, datasets=("text",)))
        (here,) = running.attempt.nodes
        there = B if here == A else A
        claim = Claim(((there, ("g",)),), (), NOW)
        ahead = planner.data_ahead
        assert ahead.with_data(running, claim).datasets == (), "both copies are twice the quota"
        planner.apply(News(queues=self.queues(12 * TB)))
        assert ahead.with_data(running, claim).datasets == (TEXT,)
        waiting = replace(running, state=JobState.QUEUED)
        planner.apply(News(queues=self.queues(6 * TB), jobs=(waiting,)))
        assert ahead.with_data(waiting, claim).datasets == (TEXT,), "it has left"

    def test_who_waits_for_the_quota_is_looked_at_when_data_changed_and_not_at_all_other_news(self, monkeypatch):
        planner = self.planner("a", "b")
        planner.apply(News(datasets=(DatasetFact(TEXT, 6 * TB, (A, B)),)))
        run(planner, job("one", 4, datasets=("text",)))
        decide(planner, job("two", 4, at=1, datasets=("text",), require_local_data=True))
        looks, unpark = [], Turns.unpark
        monkeypatch.setattr(Turns, "unpark", lambda turns, line: looks.append(line) or unpark(turns, line))
        planner.apply(News(closed={A: ""}))
        assert not looks
        planner.apply(News(datasets=(DatasetFact(IMAGES, 1, (A,)),)))
        assert looks

    def test_data_that_only_a_task_may_fetch_waits_too(self):
        planner = self.planner("a", quota=TB)
        planner.apply(News(datasets=(DatasetFact(TEXT, 6 * TB, for_tasks_only=True),)))
        assert [move.assignment for move in decide(planner, job("one", datasets=("text",))).values()] == [None]


class TestWords:
    CLAIM = Claim(((A, ("g",)), (B, ("g",))), (), NOW, datasets=(TEXT,))

    def said(self, node, done, size=100, **more):
        return node, agent_pb2.DataProgress(dataset=TEXT, done_bytes=done, size_bytes=size, **more)

    def test_how_far_it_is(self):
        words = data_claims.words
        assert words(self.CLAIM, []) == [f"its data is to be pulled to {A}, {B}: {TEXT}"]
        assert words(self.CLAIM, [self.said(A, 100, ready=True), self.said(B, 100, ready=True)]) == [
            f"its data is there: {TEXT} on {A}, {B}"
        ]
        assert words(self.CLAIM, [self.said(A, 64), self.said(B, 20, bytes_per_s=80 / 180)]) == [
            f"its data is being pulled to {A}, {B}: {TEXT} (42 %, ready in about 3m)"
        ]
        (failed,) = words(self.CLAIM, [self.said(A, 0, message="no room")])
        assert failed == f"its data does not come to {A}: {TEXT}: no room; it is asked for again"

    @pytest.mark.parametrize(
        ("bad", "field"),
        [
            ({"dataset": "text"}, "dataset"),
            ({"done_bytes": -1}, "done_bytes"),
            ({"done_bytes": 101}, "done_bytes"),
            ({"bytes_per_s": float("nan")}, "bytes_per_s"),
            ({"bytes_per_s": -1.0}, "bytes_per_s"),
            ({"message": "x" * 513}, "message"),
        ],
    )
    def test_what_an_agent_cannot_mean_is_refused_by_name(self, bad, field):
        one = agent_pb2.DataProgress(**{"dataset": TEXT, "done_bytes": 1, "size_bytes": 100, **bad})
        with pytest.raises(InvalidArgument) as refused:
            data_claims.checked(agent_pb2.DataReport(datasets=[one]))
        assert refused.value.violations[0].field == f"data.datasets[0].{field}"

    def test_and_more_than_it_was_asked_for(self):
        many = agent_pb2.DataReport(datasets=[agent_pb2.DataProgress(dataset=TEXT)] * 1001)
        with pytest.raises(InvalidArgument, match="at most 1000"):
            data_claims.checked(many)


async def test_an_agent_hears_of_a_claim_says_how_far_it_is_and_hears_when_it_is_over():
    async with World(let_end_s=0.0) as world:
        world.inventory.datasets[TEXT] = inventory_pb2.Dataset(name=TEXT, uri="/data", size_bytes=10)
        (agent,) = await world.add(node("s/a"))
        low = await world.submit(4)
        await world.reaches(low, "RUNNING")
        agent.slow_to_die = True
        high = await world.submit(4, priority=50, datasets=["text"])
        await until(lambda: agent.ahead, "it is told of the claim")
        assert [(one.dataset, one.job, one.job_uid) for one in agent.ahead] == [
            (TEXT, high, (await world.job(high)).uid)
        ]
        other = agent_pb2.DataProgress(dataset=IMAGES, done_bytes=1, size_bytes=2)
        half = agent_pb2.DataProgress(dataset=TEXT, done_bytes=5, size_bytes=10)
        agent.say(agent_pb2.SyncRequest(data=agent_pb2.DataReport(datasets=[half, other])))

        async def told():
            return "(50 %)" in (await world.job(high)).state_message

        await until(told, "the job says how far its data is")
        shown = await world.job(high)
        sentence = f"its data is being pulled to {agent.node}: {TEXT} (50 %)"
        assert sentence in shown.decision.reasons
        explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=high), None)
        assert sentence in explained.decision.reasons
        await agent.disconnect()
        agent.ahead = []
        await agent.connect()
        await until(lambda: agent.ahead, "a new stream is told of all of it")
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=high), None)
        await until(lambda: not agent.ahead, "it is told that the claim is over")


async def test_an_agent_that_says_what_cannot_be_is_told_so():
    async with World() as world:
        (agent,) = await world.add(node("s/a"))
        bad = agent_pb2.DataProgress(dataset=TEXT, done_bytes=5, size_bytes=1)
        agent.say(agent_pb2.SyncRequest(data=agent_pb2.DataReport(datasets=[bad])))
        await until(lambda: agent.error)
        assert isinstance(agent.error, InvalidArgument)


async def test_a_dataset_that_is_new_is_asked_for_before_its_first_job_is_placed():
    async with World() as world:
        await world.add(node("s/a"))
        await world.caught_up()
        world.inventory.datasets[TEXT] = inventory_pb2.Dataset(name=TEXT, uri="/data", size_bytes=10**12)
        queue = pb.Queue(data_quota_bytes=1)
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="small", queue=queue), None)
        name = await world.submit(1, queue="small", datasets=["text"])
        placed = await world.reaches(name, "RUNNING")
        assert list(placed.attempt.remote_datasets) == [TEXT], "its size counted"
        assert "at most 1 B of data on nodes" in placed.decision.reasons[0]


async def test_an_inventory_that_does_not_answer_holds_up_no_job():
    async with World() as world:
        await world.add(node("s/a"))
        world.inventory.datasets[TEXT] = inventory_pb2.Dataset(name=TEXT, uri="/data", size_bytes=10)

        async def away(request, timeout=None):
            raise Unavailable("nobody answers")

        world.inventory.ListDatasets = away
        await world.reaches(await world.submit(1, datasets=["text"]), "RUNNING")
