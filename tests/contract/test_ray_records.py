"""Ray clusters in the store, the same in the model in memory and in a real etcd: made once, changed under their etag, their jobs made by who leads alone."""

import asyncio
import contextlib

import pytest

from tests.support.acting import ADMIN
from tests.support.etcd_server import EtcdServer
from whaleflux import names
from whaleflux.clock import SystemClock
from whaleflux.errors import Aborted, AlreadyExists, NotFound
from whaleflux.rpc import auth
from whaleflux.store import Delete, Fenced, Put, keys
from whaleflux.store.cache import Cache
from whaleflux.store.election import elect
from whaleflux.store.etcd import EtcdStore
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import convert
from whaleflux_scheduler.fleet_sites import FleetSites
from whaleflux_scheduler.job_access import JobAccess
from whaleflux_scheduler.ray_book import RayBook
from whaleflux_scheduler.ray_loop import RayLoop
from whaleflux_scheduler.ray_plans import RayPlans
from whaleflux_scheduler.ray_records import RAY_CLUSTERS

NAME = "rayClusters/rl"


@pytest.fixture(params=["memory", "etcd"])
async def store(request, tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            found = MemoryStore()
        else:
            server = await stack.enter_async_context(EtcdServer(tmp_path))
            found = EtcdStore([server.endpoint])
        stack.push_async_callback(found.close)
        queue = pb.Queue(name=names.DEFAULT_QUEUE)
        await found.commit(Put(keys.of_name(keys.QUEUES, names.DEFAULT_QUEUE), queue.SerializeToString()))
        yield found


@contextlib.asynccontextmanager
async def book_of(store):
    async with Cache(store, keys.QUEUES, convert.QUEUES.decode) as queues:
        with auth.acting_as(ADMIN):
            access = JobAccess(store, queues)
            yield RayBook(store, access, SystemClock(), lambda _: None, FleetSites(None)), access.sight()


def asked(**fields):
    cluster = pb.RayCluster(max_gpus=4, **fields)
    return pb.CreateRayClusterRequest(ray_cluster_id="rl", ray_cluster=cluster, request_id="once")


async def test_made_once_changed_under_its_etag_and_given_up(store):
    async with book_of(store) as (book, sight):
        made = await book.create(asked())
        assert (await book.create(asked())).etag == made.etag
        with pytest.raises(AlreadyExists):
            await book.create(asked(priority=5))
        change = pb.UpdateRayClusterRequest(ray_cluster=pb.RayCluster(name=NAME, max_gpus=8, etag=made.etag))
        change.update_mask.paths.append("max_gpus")
        changed = await book.update(change)
        assert (changed.max_gpus, changed.last_change.what) == (8, "CHANGED")
        with pytest.raises(Aborted):
            await book.update(change)
        assert (await book.get(NAME, sight)).etag == changed.etag
        ending = await book.delete(pb.DeleteRayClusterRequest(name=NAME))
        assert ending.state == pb.RAY_CLUSTER_STATE_ENDING
        assert (await book.delete(pb.DeleteRayClusterRequest(name=NAME))).etag == ending.etag, "the same again"
        with pytest.raises(NotFound):
            await book.delete(pb.DeleteRayClusterRequest(name="rayClusters/other"))
        page = await book.page(pb.ListRayClustersRequest(), sight)
        assert [one.name for one in page.items] == [NAME]


@contextlib.asynccontextmanager
async def keeping(store, leader):
    """A loop that keeps clusters by that leadership; yields its task. No planner is there, and nothing is read."""
    clusters = Cache(store, keys.RAY_CLUSTERS, RAY_CLUSTERS.decode)
    jobs = Cache(store, keys.JOBS, convert.JOBS.decode, stand_in=convert.unreadable_job)
    async with clusters, jobs:
        loop = RayLoop(store, leader, clusters, jobs, RayPlans(), None, None, lambda *_: False, SystemClock())
        task = asyncio.create_task(loop.run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def jobs_of(store):
    return [convert.JOBS.read(entry.value) for entry in (await store.list(keys.JOBS)).entries]


async def test_who_leads_makes_its_head_once_and_who_led_makes_nothing(store):
    async with book_of(store) as (book, sight), elect(store, "scheduler", "old") as old:
        await book.create(asked())
        async with keeping(store, old), asyncio.timeout(20):
            while not await jobs_of(store):
                await asyncio.sleep(0.05)
        (head,) = await jobs_of(store)
        record = await book.get(NAME, sight)
        assert (record.jobs_made, head.ray.cluster_uid, head.ray.role) == (1, record.uid, pb.RAY_ROLE_HEAD)
        await store.commit(Delete(old.key))
        async with elect(store, "scheduler", "new") as new:
            await store.commit(Delete(keys.of_name(keys.JOBS, head.name)))
            async with keeping(store, old) as late, asyncio.timeout(20):
                with pytest.raises(ExceptionGroup) as fenced:
                    await late
                assert fenced.group_contains(Fenced)
            assert not await jobs_of(store), "who leads no longer makes nothing"
            async with keeping(store, new), asyncio.timeout(20):
                while not await jobs_of(store):
                    await asyncio.sleep(0.05)
            (again,) = await jobs_of(store)
            assert again.name != head.name
