"""Ray clusters as the leader keeps them: made of a record, sized by what is read of them, each worker once whatever fails between."""

import asyncio
import contextlib
import zlib

import pytest

from tests.support.ray_world import ADDRESS, RayWorld, gpu_tasks
from tests.support.scheduler_world import until
from whaleflux.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Unknown
from whaleflux.v1 import agent_pb2, events_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.ray_leaving import SOON_S


async def sized(world, count, waits=None):
    """A cluster whose head runs, with so many workers that run."""
    await world.up()
    head = await world.head()
    await world.says(head, waits=waits or gpu_tasks(count))
    return head, await world.workers(count)


async def gone(world, name="rl"):
    async def is_gone():
        try:
            await world.cluster(name)
        except NotFound:
            return True
        return False

    await until(is_gone, "the record is gone")


async def said_of(world, worker):
    await world.seconds(1)
    (part,) = [part for part in (await world.cluster()).status.parts if part.job == worker.name]
    return part.message


def names_of(jobs):
    return [job.name for job in jobs]


class TestLife:
    async def test_up_workers_for_what_waits_idle_and_down(self):
        bus = MemoryBus()
        async with RayWorld(bus=bus) as world:
            head, workers = await sized(world, 4)
            assert (head.spec.kind, head.spec.ranks, head.spec.gpus) == (pb.JOB_KIND_SERVICE, 1, 0)
            assert head.submitter == workers[0].submitter == "admin/root"
            assert [job.spec.gpus for job in workers] == [1] * 4
            for worker in workers:
                assert worker.ray.address == ADDRESS
                assert f"--address={ADDRESS}" in worker.spec.command[-1]
                world.joins(worker, busy=True)
            await world.says(head, waits=[])
            await world.seconds(8, head)
            assert names_of(await world.jobs()) == names_of(workers), "who is there stays, and nobody is added"
            shown = await world.cluster()
            assert (shown.status.address, shown.status.nodes, shown.status.waiting) == (ADDRESS, len(workers), 0)
            assert not shown.status.stale
            for worker in workers:  # idle: they leave by themselves
                world.agents[worker.attempt.tasks[0].node].exit(task=worker.attempt.tasks[0].id)
                world.ray_nodes.clear()
            await world.says(head)
            await world.none()
            await world.scheduler.DeleteRayCluster(pb.DeleteRayClusterRequest(name="rayClusters/rl"), None)
            await gone(world)
            assert not [job for role in (1, 3) for job in await world.jobs(role)]
            assert await told_of(bus, "rayClusters/rl", "DELETED") == ["CREATED", "ENDING", "DELETED"]

    async def test_workers_drain_before_the_head_ends(self):
        async with RayWorld() as world:
            head, _ = await sized(world, 2)
            for agent in world.agents.values():
                agent.ends_after_s = 20.0
            await world.scheduler.DeleteRayCluster(pb.DeleteRayClusterRequest(name="rayClusters/rl"), None)
            await asyncio.sleep(10.0)
            assert (await world.cluster()).state == pb.RAY_CLUSTER_STATE_ENDING
            assert not await world.jobs(), "workers are told at once"
            assert [job.name for job in await world.jobs(pb.RAY_ROLE_HEAD)] == [head.name], "its raylets talk to it"
            with pytest.raises(FailedPrecondition, match="taken down"):
                await update(world, "max_gpus", max_gpus=1)
            await gone(world)

    async def test_a_head_that_somebody_cancels_is_made_again_and_workers_of_the_old_one_end(self):
        async with RayWorld() as world:
            head, workers = await sized(world, 2)
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=head.name), None)
            again = await world.head()
            assert again.name != head.name
            world.session = "session-2"
            await world.says(again, waits=gpu_tasks(1))
            anew = await world.workers(1)
            assert anew[0].name not in {job.name for job in workers}
            ended = {job.name: job.cause.message for job in await world.jobs(ended=True)}
            assert {ended[job.name] for job in workers} == {"its head was started anew"}

    async def test_of_an_address_there_is_a_reader_and_no_head(self):
        async with RayWorld() as world:
            await world.up(address="10.9.9.9:6379")
            reader = await world.head(pb.RAY_ROLE_READER)
            assert "--address=10.9.9.9:6379" in reader.spec.command[-1]
            assert not await world.jobs(pb.RAY_ROLE_HEAD)
            await world.says(reader, waits=gpu_tasks(1))
            (worker,) = await world.workers(1)
            assert worker.ray.address == "10.9.9.9:6379"


class TestSizing:
    async def test_a_reading_that_is_old_starts_and_ends_nothing(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            filler = await world.submit(8, job_id="filler")
            await world.reaches(filler, "RUNNING")
            await world.says(head, waits=gpu_tasks(2))
            waiting = await world.workers(2, pb.JOB_STATE_QUEUED)
            await asyncio.sleep(30.0)
            shown = await world.cluster()
            assert shown.status.stale
            assert "was silent for" in shown.status.message
            assert names_of(await world.jobs()) == names_of(waiting)
            world.waits = []
            await world.says(head)
            await world.none()

    async def test_those_that_wait_follow_the_demand(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            filler = await world.submit(8, job_id="filler")
            await world.reaches(filler, "RUNNING")
            await world.says(head, waits=gpu_tasks(3))
            await world.workers(3, pb.JOB_STATE_QUEUED)
            await world.seconds(7, head)
            await world.says(head, waits=gpu_tasks(1))
            (left,) = await world.workers(1, pb.JOB_STATE_QUEUED)
            await world.seconds(10, head)
            assert names_of(await world.jobs()) == [left.name], "nothing changes while nothing changes"

    async def test_higher_priority_gets_its_gpus_from_training(self):
        async with RayWorld() as world:
            filler = await world.submit(8, job_id="filler", checkpoint=pb.CheckpointPolicy(every_steps=10))
            await world.reaches(filler, "RUNNING")
            await world.up(priority=50)
            head = await world.head()
            await world.says(head, waits=gpu_tasks(2))
            await world.workers(2)

    async def test_no_more_gpus_than_are_allowed_and_it_says_so(self):
        async with RayWorld() as world:
            await world.up(max_gpus=3)
            head = await world.head()
            await world.says(head, waits=gpu_tasks(8))
            await world.seconds(8, head)
            assert sum(job.spec.gpus for job in await world.jobs()) <= 3
            assert "max_gpus is 3" in (await world.cluster()).status.message
            await update(world, "max_gpus", max_gpus=8)
            await world.seconds(8, head)
            assert sum(job.spec.gpus for job in await world.jobs()) == 8

    async def test_only_where_it_may_be(self):
        async with RayWorld() as world:
            await world.up(sites=["elsewhere"])
            head = await world.head()
            await world.says(head, waits=gpu_tasks(1))
            await world.seconds(3, head)
            assert not await world.jobs()
            assert (await world.cluster()).status.unmet

    async def test_what_cannot_be_read_is_said(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            await world.says(head, waits=[{"resources": {"GPU": -1}, "count": 1}])
            await world.seconds(2, head)
            assert "demand.bundles[0].resources[GPU]" in (await world.cluster()).status.message

    @pytest.mark.parametrize(
        "said", [b"no zlib", b"[" * 100_000, b"[]", b'{"bundles": 5}', b'{"nodes": [{"total": []}]}', b"null"]
    )
    async def test_whatever_a_program_says_no_leadership_ends(self, said):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            content = said if said == b"no zlib" else zlib.compress(said)
            reading = agent_pb2.RayReading(job=head.name, epoch=head.epoch, number=9, demand=content)
            world.agents[head.attempt.tasks[0].node].say(agent_pb2.SyncRequest(ray=reading))
            await world.seconds(2)
            assert "cannot be read: demand" in (await world.cluster()).status.message
            await world.says(head, waits=gpu_tasks(1))
            await world.workers(1)

    async def test_idle_workers_whose_gpus_others_wait_for_are_told_to_leave_and_only_then(self):
        async with RayWorld() as world:
            head, workers = await sized(world, 3)
            for worker in workers:
                world.joins(worker)
            world.joins(workers[0], busy=True)
            await world.says(head, waits=[])
            await world.seconds(2 * SOON_S, head)
            assert not any(told["leave"] for told in world.decisions), "nobody waits"
            waits = await world.submit(8, job_id="large")
            await world.seconds(4, head)
            assert (await world.scheduler.GetJob(pb.GetJobRequest(name=waits), None)).state == pb.JOB_STATE_QUEUED
            idle = sorted(world.ray_nodes[worker.name]["instance"] for worker in workers[1:])
            await until(lambda: sorted(world.decisions[-1]["leave"]) == idle, "the idle ones are told")
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=waits), None)
            await until(lambda: world.decisions[-1]["leave"] == [], "they may stay")

    async def test_a_reader_is_told_what_was_decided(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            await world.says(head, waits=[*gpu_tasks(1), {"resources": {"gpu_memory": 10_000_000}, "count": 2}])
            await world.workers(1)
            await until(lambda: world.decisions, "it is told")
            told = world.decisions[-1]
            assert (told["pending"], told["infeasible"]) == (
                [{"type": "H100-80GBx1", "count": 1}],
                [{"resources": {"gpu_memory": 10_000_000.0}, "count": 2}],
            )

    async def test_what_another_leader_decides_is_news_though_it_is_its_first_decision_too(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            await world.says(head, waits=gpu_tasks(1))
            await until(lambda: world.decisions, "it is told")
            (first, *_) = [one.number for agent in world.agents.values() for one in agent.ray]
            await world.restart()
            for agent in world.agents.values():
                agent.ray.clear()
            await world.says(head, waits=gpu_tasks(3))
            await until(lambda: world.decisions, "it is told")
            assert first not in [one.number for agent in world.agents.values() for one in agent.ray]

    async def test_a_worker_that_has_left_is_not_said_to_come(self):
        async with RayWorld() as world:
            head, (worker,) = await sized(world, 1)
            assert await said_of(world, worker) == "on its way"
            world.joins(worker, busy=True)
            await world.says(head, waits=[])
            assert await said_of(world, worker) == "works"
            world.ray_nodes.clear()
            await world.says(head)
            assert await said_of(world, worker) == "has left, and ends"


class TestWorkersThatDoNotJoin:
    async def test_the_next_are_started_later_each_time_and_it_says_which_and_why(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            await world.says(head, waits=gpu_tasks(2))
            for _ in range(60):
                for worker in await world.jobs():
                    if worker.state == pb.JOB_STATE_RUNNING:
                        task = worker.attempt.tasks[0]
                        world.agents[task.node].exit(127, task.id, "python3: no Ray")
                await world.seconds(1, head)
            made = await world.jobs(ended=True)
            assert 2 < len(made) <= 12, "two at first, two after 5, 10, 20 and 40 s"
            said = (await world.cluster()).status.message
            assert "ended before it had joined" in said
            assert said.rpartition("See: whaleflux logs ")[2] in names_of(made)

    async def test_one_that_joins_makes_an_end_of_it(self):
        async with RayWorld() as world:
            head, (worker,) = await sized(world, 1)
            task = worker.attempt.tasks[0]
            world.agents[task.node].exit(127, task.id, "python3: no Ray")
            await world.seconds(2, head)
            assert not await world.jobs()
            await world.seconds(5, head)
            (again,) = await world.workers(1)
            world.joins(again, busy=True)
            await world.says(head, waits=gpu_tasks(1))
            await world.workers(2)

    async def test_who_had_joined_and_fails_is_made_again_at_once(self):
        async with RayWorld() as world:
            head, (worker,) = await sized(world, 1)
            world.joins(worker, busy=True)
            await world.says(head, waits=[])
            task = worker.attempt.tasks[0]
            world.agents[task.node].exit(1, task.id)
            world.ray_nodes.clear()
            await world.says(head, waits=gpu_tasks(1))
            await world.seconds(3, head)
            (again,) = await world.workers(1)
            assert again.name != worker.name


class TestRights:
    async def test_a_head_that_has_ended_is_not_heard_any_more(self):
        async with RayWorld() as world:
            head, _ = await sized(world, 1)
            world.agents[head.attempt.tasks[0].node].slow_to_die = True
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=head.name), None)
            again = await world.head()
            world.session = "session-2"
            await world.says(again, waits=gpu_tasks(1))
            await world.says(head, waits=gpu_tasks(5))
            await world.seconds(2, again)
            shown = (await world.cluster()).status
            assert (shown.waiting, shown.stale) == (1, False)

    async def test_a_queue_stays_as_long_as_a_ray_cluster_has_its_jobs_there(self):
        async with RayWorld() as world:
            made = pb.CreateQueueRequest(queue_id="rays", queue=pb.Queue())
            await world.scheduler.CreateQueue(made, None)
            await world.up(queue="queues/rays")
            head = await world.head()
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=head.name), None)
            with pytest.raises(FailedPrecondition, match="whaleflux ray down rl"):
                await world.scheduler.DeleteQueue(pb.DeleteQueueRequest(name="queues/rays"), None)

    async def test_only_the_reader_of_a_cluster_is_heard_on_its_own_node(self):
        async with RayWorld() as world:
            await world.up()
            head = await world.head()
            other = await world.reaches(await world.submit(1, job_id="other"), "RUNNING")
            (elsewhere,) = {*world.agents} - {head.attempt.tasks[0].node}
            await world.says(other, waits=gpu_tasks(1))
            await world.says(head, waits=gpu_tasks(1), node_name=elsewhere)
            await asyncio.sleep(3.0)
            assert not await world.jobs()
            assert not (await world.cluster()).status.HasField("reading_age_s")

    async def test_whose_it_is(self):
        async with RayWorld() as world:
            ann, eve = auth.Identity("user", "ann"), auth.Identity("user", "eve")
            with auth.acting_as(ann):
                made = await world.up()
                assert made.creator == "user/ann"
            head = await world.head()
            assert head.submitter == "user/ann"
            with auth.acting_as(eve):
                seen = await world.cluster()
                assert (seen.name, seen.status.address, seen.python) == ("rayClusters/rl", "", "")
                with pytest.raises(PermissionDenied):
                    await world.scheduler.DeleteRayCluster(pb.DeleteRayClusterRequest(name="rayClusters/rl"), None)
                with pytest.raises(PermissionDenied):
                    await update(world, "max_gpus", max_gpus=1)

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"max_gpus": -1}, "ray_cluster.max_gpus"),
            ({"priority": 2000}, "ray_cluster.priority"),
            ({"sites": ["No Site"]}, "ray_cluster.sites"),
            ({"address": "nowhere"}, "ray_cluster.address"),
            ({"python": "a\nb"}, "ray_cluster.python"),
            ({"head_cpu_millicores": 5}, "ray_cluster.head_cpu_millicores"),
            ({"head_memory_bytes": 10**9}, "ray_cluster.head_memory_bytes"),
            ({"queue": "serving"}, "ray_cluster.queue"),
        ],
    )
    async def test_bad_input_changes_nothing(self, fields, said):
        async with RayWorld() as world:
            before = (await world.store.list("", limit=1)).revision
            with pytest.raises(InvalidArgument) as refused:
                await world.up(**fields)
            assert [violation.field for violation in refused.value.violations] == [said]
            assert (await world.store.list(keys.RAY_CLUSTERS)).revision == before

    async def test_sites_that_the_fleet_has_not_are_refused_naming_those_that_it_has(self):
        async with RayWorld() as world:
            await world.up(sites=["onprem"])
            before = (await world.store.list("", limit=1)).revision
            with pytest.raises(
                InvalidArgument, match="'atlantis' is no site of the fleet; name some of elsewhere, onprem"
            ):
                await world.up("other", sites=["onprem", "atlantis"])
            with pytest.raises(InvalidArgument, match="did you mean 'onprem'"):
                await update(world, "sites", sites=["onprim"])
            allowed = pb.UpdateRayClusterRequest(
                ray_cluster=pb.RayCluster(name="rayClusters/rl", sites=["elsewhere"]), validate_only=True
            )
            allowed.update_mask.paths.append("sites")
            assert (await world.scheduler.UpdateRayCluster(allowed, None)).sites == ["elsewhere"]
            assert (await world.store.list("", limit=1)).revision == before

    async def test_sites_of_machines_that_can_be_rented_count(self):
        async with RayWorld() as world:
            world.inventory.offers.append(inventory_pb2.Offer(name="offers/a", site="sites/cloud"))
            assert (await world.up(sites=["cloud"])).sites == ["cloud"]

    async def test_a_name_is_one_cluster(self):
        async with RayWorld() as world:
            first = await world.up()
            assert (await world.up()).uid == first.uid, "the same request again"
            with pytest.raises(AlreadyExists):
                await world.up(max_gpus=5)
            with pytest.raises(InvalidArgument, match="at most 36"):
                await world.up("a" * 37)
            with pytest.raises(NotFound):
                await world.up("other", queue="queues/nowhere")


LAST_COMMIT = 7  # of jobs and clusters until two workers run


class Failing:
    """The store of a scheduler that dies at its n-th commit: before the write, or when the answer is lost."""

    def __init__(self, store, at, *, after):
        self._store, self._left, self._after, self.died = store, at, after, False

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def commit(self, *writes, when=()):
        if self.died:
            await asyncio.Event().wait()
        if any(write.key.startswith((keys.RAY_CLUSTERS, keys.JOBS)) for write in writes):
            self._left -= 1
        if self._left:
            return await self._store.commit(*writes, when=when)
        if self._after:
            await self._store.commit(*writes, when=when)
        self.died = True
        await asyncio.Event().wait()
        raise Unknown("never comes")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, LAST_COMMIT + 2))
async def test_wherever_the_leader_dies_each_worker_is_made_once(at, after):
    """Its commits of jobs and clusters are counted; at each of them once it dies, and the next leader goes on."""
    async with RayWorld() as world:
        await world.up()
        store, dies = world.store, Failing(world.store, at, after=after)
        world.store = dies
        await world.restart()
        with contextlib.suppress(TimeoutError):
            await two_workers(world)
        assert dies.died or at > LAST_COMMIT
        world.store = store
        await world.restart()
        await two_workers(world)
        assert len(await world.jobs(pb.RAY_ROLE_HEAD)) == 1
        assert len(await world.jobs(ended=True)) == 2, "none twice, and none that ended"


async def told_of(bus, resource, last):
    """What was told of it, until it is told that."""
    found = []
    async with bus.subscribe(["wf.v1.>"], durable="test") as news, asyncio.timeout(60):
        async for message in news:
            event = events_pb2.Event.FromString(message.data)
            if event.resource == resource:
                found.append(event.what)
            await message.ack()
            if found[-1:] == [last]:
                return found


async def two_workers(world):
    async with asyncio.timeout(8.0):
        head = await world.head()
        await world.says(head, waits=gpu_tasks(2))
        await world.workers(2)
        await world.seconds(2, head)


async def update(world, *paths, **fields):
    request = pb.UpdateRayClusterRequest(ray_cluster=pb.RayCluster(name="rayClusters/rl", **fields))
    request.update_mask.paths.extend(paths)
    return await world.scheduler.UpdateRayCluster(request, None)
