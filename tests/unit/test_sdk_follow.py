"""Following a job: to its end over broken streams, and not for ever."""

import asyncio
import contextlib

import pytest

from whaleflux.errors import NotFound, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import channel
from whaleflux.rpc.pki import Tls
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import scheduler_pb2 as pb

NAME = "queues/default/jobs/j"
AWAY = Unavailable("connection refused", reason=ErrorReason.SERVER_UNREACHABLE)


def added(etag, state=pb.JOB_STATE_RUNNING):
    return pb.WatchJobsResponse(added=pb.Job(name=NAME, etag=etag, state=state))


def mark():
    response = pb.WatchJobsResponse()
    response.bookmark.SetInParent()
    return response


class Scheduler:
    """Each stream says what one script says; after the last the server is away."""

    def __init__(self, *scripts):
        self.scripts, self.opened = list(scripts), 0

    @contextlib.asynccontextmanager
    async def WatchJobs(self, request):
        self.opened += 1
        yield self.changes(self.scripts.pop(0) if self.scripts else [AWAY])

    async def changes(self, script):
        for said in script:
            if isinstance(said, Exception):
                raise said
            yield said


async def followed(*scripts):
    """Etags that were told, and the scheduler."""
    client = AsyncClient(channel.connect("127.0.0.1:1", Tls(b"", b"", b"")))
    client.scheduler = Scheduler(*scripts)
    try:
        return [job.etag async for job in client.follow_job(NAME)], client.scheduler
    finally:
        await client.channel.close()


async def test_each_state_once_over_broken_streams_until_the_end():
    last = added("3", pb.JOB_STATE_SUCCEEDED)
    told, _ = await followed([added("1"), mark(), AWAY], [added("1"), mark(), added("2")], [AWAY], [last])
    assert told == ["1", "2", "3"]


async def test_a_job_that_never_was_is_not_waited_for():
    with pytest.raises(NotFound):
        await followed([mark()])


async def test_a_job_that_was_deleted_meanwhile_is_not_waited_for():
    with pytest.raises(NotFound):
        await followed([added("1"), mark(), AWAY], [mark()])


async def test_a_control_plane_that_does_not_come_back_is_given_up_after_minutes():
    begun_s = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable):
        await followed([added("1"), mark()])
    assert 500 < asyncio.get_running_loop().time() - begun_s < 700
