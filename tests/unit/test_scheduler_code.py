"""Code that jobs bring: what is taken, who gets it, and when it goes."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.scheduler_world import USER, World, node
from whaleflux.code.api import StoredCode
from whaleflux.code.limits import CHUNK_BYTES, MAX_PACKED_BYTES
from whaleflux.code.retention import deletable
from whaleflux.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from whaleflux.rpc import auth
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.code_collection import CodeCollection

CODE = bytes(range(256)) * (3 * CHUNK_BYTES // 512)  # one and a half chunks
DIGEST = hashlib.sha256(CODE).hexdigest()
AGENT = auth.Identity("agent", "s/n1")


async def messages(content=CODE, digest=DIGEST, size_bytes=None, step=100_000):
    yield pb.UploadCodeRequest(digest=digest, size_bytes=len(content) if size_bytes is None else size_bytes)
    for begin in range(0, len(content), step):
        yield pb.UploadCodeRequest(data=content[begin : begin + step])


async def upload(world, by=USER, **sent):
    with auth.acting_as(by):
        return await world.scheduler.UploadCode(messages(**sent), None)


async def download(world, job, *, caller=AGENT, epoch=1, offset=0):
    with auth.acting_as(caller):
        request = pb.DownloadCodeRequest(job=job, epoch=epoch, offset=offset)
        return b"".join([answer.data async for answer in world.scheduler.DownloadCode(request, None)])


async def test_what_is_sent_is_there_whole_and_is_sent_once():
    async with World() as world:
        with pytest.raises(NotFound, match="UploadCode"):
            await world.scheduler.GetCode(pb.GetCodeRequest(digest=DIGEST), None)
        assert (await upload(world)).size_bytes == len(CODE)
        with auth.acting_as(USER):
            assert (await world.scheduler.GetCode(pb.GetCodeRequest(digest=DIGEST), None)).size_bytes == len(CODE)
        assert (await upload(world, content=b"", size_bytes=len(CODE))).digest == DIGEST, "it is there, no byte is read"


async def test_who_knows_the_digest_of_others_code_has_neither_the_code_nor_whether_it_is_there():
    other = auth.Identity("user", "eve")
    async with World() as world:
        await upload(world)
        with auth.acting_as(other):
            with pytest.raises(NotFound, match="UploadCode"):
                await world.scheduler.GetCode(pb.GetCodeRequest(digest=DIGEST), None)
            request = pb.CreateJobRequest(
                parent="queues/default", job=pb.Job(spec=pb.JobSpec(command=["x"], gpus=1, code=DIGEST))
            )
            with pytest.raises(FailedPrecondition, match="not stored by you"):
                await world.scheduler.CreateJob(request, None)
        with pytest.raises(FailedPrecondition, match="were announced"):
            await upload(world, by=other, content=b"", size_bytes=len(CODE))
        with pytest.raises(FailedPrecondition, match="announced was"):
            await upload(world, by=other, content=b"x" * len(CODE))
        assert await upload(world, by=other), "who has the bytes shows them"
        with auth.acting_as(auth.Identity("operator", "eve")):
            await world.scheduler.CreateJob(request, None)
        assert (await upload(world, content=b"", size_bytes=len(CODE))).digest == DIGEST, "the first has it still"


@pytest.mark.parametrize(
    ("sent", "error", "words"),
    [
        ({"digest": "abc"}, InvalidArgument, "digest: must be the sha256"),
        ({"size_bytes": 0}, InvalidArgument, "size_bytes: 0 is not in 1 to"),
        ({"size_bytes": MAX_PACKED_BYTES + 1}, InvalidArgument, "size_bytes"),
        ({"size_bytes": len(CODE) - 1}, FailedPrecondition, "were announced"),
        ({"size_bytes": len(CODE) + 1}, FailedPrecondition, "were announced"),
        ({"content": CODE[:-1] + b"x"}, FailedPrecondition, "announced was"),
        ({"step": 2 << 20, "content": b"x" * (3 << 20)}, FailedPrecondition, "at most 1 MiB"),
    ],
)
async def test_what_is_not_what_was_announced_is_not_there(sent, error, words):
    async with World() as world:
        with pytest.raises(error, match=words):
            await upload(world, **sent)
        assert await world.code.find(DIGEST) is None


async def test_uploads_are_bounded_and_a_silent_one_is_cut_off():
    async def silent():
        yield pb.UploadCodeRequest(digest=DIGEST, size_bytes=len(CODE))
        await asyncio.Event().wait()

    async with World() as world:
        with auth.acting_as(USER):
            held = [asyncio.create_task(world.scheduler.UploadCode(silent(), None)) for _ in range(16)]
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhausted, match="try again"):
                await upload(world)
            cut_off = await asyncio.gather(*held, return_exceptions=True)
            assert {type(error) for error in cut_off} == {Unavailable}
        assert (await upload(world)).digest == DIGEST


async def test_an_upload_that_only_drips_is_cut_off_too():
    async def dripping():
        yield pb.UploadCodeRequest(digest=DIGEST, size_bytes=len(CODE))
        for byte in CODE:
            await asyncio.sleep(20)
            yield pb.UploadCodeRequest(data=bytes([byte]))

    async with World() as world:
        with auth.acting_as(USER), pytest.raises(Unavailable, match="longer than 15 min"):
            await world.scheduler.UploadCode(dripping(), None)
        assert (await upload(world)).digest == DIGEST


async def test_a_job_whose_code_is_not_there_is_refused_and_a_plan_is_not():
    async with World() as world:
        assert (await world.create(code=DIGEST, dry=True)).decision
        with pytest.raises(FailedPrecondition, match="send it first") as refused:
            await world.submit(code=DIGEST)
        assert refused.value.reason == "CODE_MISSING"
        with pytest.raises(InvalidArgument, match=r"job\.spec\.code: 'x' is not a sha256"):
            await world.submit(code="x")
        with pytest.raises(InvalidArgument, match="excludes directory"):
            await world.submit(code=DIGEST, working_directory="/src")
        await upload(world)
        assert (await world.job(await world.submit(code=DIGEST))).spec.code == DIGEST


async def test_only_the_agent_of_a_placed_task_gets_it_and_from_where_it_stopped():
    async with World() as world:
        await world.add(node("s/n1"))
        await upload(world)
        job = await world.submit(code=DIGEST)
        await world.reaches(job, "RUNNING")
        for offset in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 7, len(CODE)):
            assert await download(world, job, offset=offset) == CODE[offset:]
        with pytest.raises(InvalidArgument, match="offset"):
            await download(world, job, offset=len(CODE) + 1)
        for caller, epoch in ((auth.Identity("agent", "s/n2"), 1), (AGENT, 2), (USER, 1)):
            with pytest.raises(PermissionDenied, match="is placed on"):
                await download(world, job, caller=caller, epoch=epoch)
        with auth.acting_as(USER):
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=job), None)
        with pytest.raises(PermissionDenied):
            await download(world, job)


async def test_code_goes_a_while_after_the_last_record_that_names_it():
    async with World() as world:
        collection = CodeCollection(world.code, world.service.jobs.cache, world.clock, grace_s=60.0)
        await upload(world)
        job = await world.submit(code=DIGEST)
        await asyncio.sleep(61)
        await collection.collect()
        assert await world.code.find(DIGEST), "a job names it"
        with auth.acting_as(USER):
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=job), None)
            await world.scheduler.DeleteJob(pb.DeleteJobRequest(name=job), None)
        await world.caught_up()
        await world.code.keep(DIGEST)
        await collection.collect()
        assert await world.code.find(DIGEST), "it was wanted just now"
        await asyncio.sleep(61)
        await collection.collect()
        assert await world.code.find(DIGEST) is None


def test_what_may_go():
    now = datetime(2026, 1, 10, tzinfo=UTC)

    def code(digest, days, whole=True):
        return StoredCode(digest, 1, whole, now - timedelta(days=days), 1)

    kept = [code("named", 30), code("new", 6), code("being written", 0.5, False)]
    gone = [code("old", 8), code("abandoned", 2, False)]
    assert deletable([*kept, *gone], {"named"}, now, 7 * 86_400.0, max_bytes=100) == gone
    crowded = deletable([*kept, *gone], {"named"}, now, 7 * 86_400.0, max_bytes=6)
    assert [one.digest for one in crowded] == ["new", "being written", "old", "abandoned"], "an hour is enough then"
