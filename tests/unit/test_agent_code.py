"""The node's cache of code: pulled once, whole or not there, whatever breaks on the way."""

import asyncio
import contextlib
import errno

import pytest

from tests.support.agent_tasks import until
from tests.support.virtual_time import LoopClock
from whaleflux.code.pack import contents, pack
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, Unavailable
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent import code_cache
from whaleflux_agent.code_cache import CodeCache
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.api import LaunchFailed


def archive(folder, text):
    """A packed folder and its digest."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(text)
    made = pack(contents(folder))
    with made.file as file:
        file.seek(0)
        return file.read(), made.digest


class Scheduler:
    """Sends the code of every job, piece by piece; breaks, errs and waits as a test says."""

    def __init__(self, *archives):
        self.archives = {digest: content for content, digest in archives}
        self.codes = {}  # by job
        self.offsets, self.faults, self.may = [], [], asyncio.Event()
        self.may.set()

    def work(self, job, digest):
        self.codes[job] = digest
        return Work(f"{job}.1.0", job, 1, ("GPU-0",), spec=Spec(code=digest))

    @contextlib.asynccontextmanager
    async def DownloadCode(self, request):
        self.offsets.append(request.offset)
        yield self._answers(request)

    async def _answers(self, request):
        await self.may.wait()
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        content = self.archives.get(self.codes[request.job])
        if content is None:
            raise NotFound("code", self.codes[request.job], "submit the job again: that sends it")
        if request.offset > len(content):
            raise InvalidArgument(FieldViolation("offset", "is too large"))
        for begin in range(request.offset, len(content), 50):
            yield pb.DownloadCodeResponse(size_bytes=len(content), data=content[begin : begin + 50])
            if fault == "break":
                raise Unavailable("the stream broke")
            if fault == "damage":
                yield pb.DownloadCodeResponse(data=b"x")
                return


@pytest.fixture
def packed(tmp_path):
    return archive(tmp_path / "one", "print(1)")


def cache_of(tmp_path, scheduler, limit_bytes=1 << 30):
    return CodeCache(tmp_path / "cache", limit_bytes, scheduler, LoopClock())


async def nobody(text):
    pass


async def test_it_is_pulled_once_for_all_and_unpacked_for_each(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache = cache_of(tmp_path, scheduler)
    works = [scheduler.work(f"queues/q/jobs/{n}", packed[1]) for n in range(3)]
    await asyncio.gather(*(cache.unpack(work, tmp_path / work.task / "code", nobody) for work in works))
    assert [(tmp_path / work.task / "code" / "train.py").read_text() for work in works] == ["print(1)"] * 3
    (tmp_path / works[0].task / "code" / "old.txt").write_text("of an earlier start")
    await cache.unpack(works[0], tmp_path / works[0].task / "code", nobody)
    assert [p.name for p in (tmp_path / works[0].task / "code").iterdir()] == ["train.py"]
    assert scheduler.offsets == [0]


async def test_a_broken_download_goes_on_behind_what_came_and_says_what_it_waits_for(tmp_path, packed):
    scheduler, said = Scheduler(packed), []
    scheduler.faults = ["break", Unavailable("NATS is away"), Unavailable("NATS is away"), "break"]

    async def tell(text):
        said.append(text)

    await cache_of(tmp_path, scheduler).unpack(scheduler.work("queues/q/jobs/j", packed[1]), tmp_path / "code", tell)
    assert scheduler.offsets == [0, 50, 50, 50, 100]
    assert [text.partition(" (")[2].partition(")")[0] for text in said] == [
        "the stream broke", "NATS is away", "the stream broke",
    ]  # fmt: skip
    assert (tmp_path / "code" / "train.py").exists()


async def test_what_came_damaged_is_pulled_anew_and_given_up_in_the_end(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache, work = cache_of(tmp_path, scheduler), scheduler.work("queues/q/jobs/j", packed[1])
    scheduler.faults = ["damage"] * 3
    with pytest.raises(LaunchFailed, match="came damaged 3 times"):
        await cache.unpack(work, tmp_path / "code", nobody)
    assert [p.name for p in tmp_path.iterdir() if p.name == "code"] == []
    scheduler.faults = ["damage"]
    await cache.unpack(work, tmp_path / "code", nobody)
    assert scheduler.offsets == [0] * 5


async def test_code_that_does_not_come_ends_the_start_in_time(tmp_path, packed):
    scheduler, said = Scheduler(packed), []
    scheduler.may.clear()  # it neither answers nor hangs up

    async def tell(text):
        said.append(text)

    began_s = asyncio.get_running_loop().time()
    with pytest.raises(LaunchFailed, match=r"could not be had within 60 minutes .* see whether NATS"):
        await cache_of(tmp_path, scheduler).unpack(
            scheduler.work("queues/q/jobs/j", packed[1]), tmp_path / "code", tell
        )
    took_s = asyncio.get_running_loop().time() - began_s
    assert code_cache.LONGEST_S <= took_s <= code_cache.LONGEST_S + 2 * code_cache.STREAM_S
    assert "did not send all of it within 600 s" in said[0] and len(scheduler.offsets) == took_s // code_cache.STREAM_S


async def test_code_that_is_gone_is_refused_with_what_to_do(tmp_path, packed):
    scheduler = Scheduler()
    with pytest.raises(LaunchFailed, match="submit the job again"):
        await cache_of(tmp_path, scheduler).unpack(
            scheduler.work("queues/q/jobs/j", packed[1]), tmp_path / "code", nobody
        )


async def test_who_gives_up_leaves_the_pull_to_who_still_waits(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache = cache_of(tmp_path, scheduler)
    scheduler.may.clear()
    one, other = (
        asyncio.create_task(cache.unpack(scheduler.work(f"queues/q/jobs/{n}", packed[1]), tmp_path / f"{n}", nobody))
        for n in range(2)
    )
    await until(lambda: scheduler.offsets)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    scheduler.may.set()
    await other
    assert scheduler.offsets == [0]
    assert (tmp_path / "1" / "train.py").exists()


async def test_a_job_whose_pull_is_refused_does_not_end_those_that_joined_it(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache = cache_of(tmp_path, scheduler)
    scheduler.may.clear()
    scheduler.faults = [NotFound("job", "0")]
    works = [scheduler.work(f"queues/q/jobs/{n}", packed[1]) for n in range(2)]
    both = [asyncio.create_task(cache.unpack(work, tmp_path / work.task, nobody)) for work in works]
    await until(lambda: scheduler.offsets)
    scheduler.may.set()
    ended = await asyncio.gather(*both, return_exceptions=True)
    assert {type(one) for one in ended} == {LaunchFailed, type(None)}, "whichever of them pulled"


async def test_what_was_used_longest_ago_makes_room(tmp_path):
    made = [archive(tmp_path / f"{n}", f"print({n})") for n in range(3)]
    scheduler = Scheduler(*made)
    cache = cache_of(tmp_path, scheduler, limit_bytes=100 * 10**6 + len(made[0][0]) + 10)
    for _, digest in made:
        await cache.unpack(scheduler.work("queues/q/jobs/j", digest), tmp_path / "code", nobody)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {digest for _, digest in made[1:]}


async def test_a_full_disk_is_said(tmp_path, packed, monkeypatch):
    def full(archive, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("whaleflux_agent.code_cache.unpack", full)
    scheduler = Scheduler(packed)
    with pytest.raises(LaunchFailed, match=r"no room for the job's code in .*: the disk is full"):
        await cache_of(tmp_path, scheduler).unpack(
            scheduler.work("queues/q/jobs/j", packed[1]), tmp_path / "code", nobody
        )


async def test_what_a_disk_has_damaged_is_pulled_again(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache, work = cache_of(tmp_path, scheduler), scheduler.work("queues/q/jobs/j", packed[1])
    await cache.unpack(work, tmp_path / "code", nobody)
    kept = tmp_path / "cache" / packed[1]
    for damaged in (b"", kept.read_bytes()[:-9] + b"x" * 9):  # a power cut; bits that flipped behind the last file
        kept.write_bytes(damaged)
        await cache.unpack(work, tmp_path / "code", nobody)
        assert (tmp_path / "code" / "train.py").read_text() == "print(1)"
    assert scheduler.offsets == [0] * 3


async def test_a_rest_of_an_earlier_download_that_is_too_long_does_not_stay(tmp_path, packed):
    scheduler = Scheduler(packed)
    cache, work = cache_of(tmp_path, scheduler), scheduler.work("queues/q/jobs/j", packed[1])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{packed[1]}.partial").write_bytes(bytes(100_000))
    with pytest.raises(LaunchFailed, match="offset"):
        await cache.unpack(work, tmp_path / "code", nobody)
    await cache.unpack(work, tmp_path / "code", nobody)
    assert (tmp_path / "code" / "train.py").exists()


async def test_what_made_room_for_others_before_it_was_opened_is_pulled_again(tmp_path, packed, monkeypatch):
    scheduler, opened = Scheduler(packed), []

    def unpack(archive, folder):
        opened.append(archive)
        if len(opened) == 1:
            archive.unlink()
        code_cache_unpack(archive, folder)

    code_cache_unpack = code_cache.unpack
    monkeypatch.setattr(code_cache, "unpack", unpack)
    await cache_of(tmp_path, scheduler).unpack(scheduler.work("queues/q/jobs/j", packed[1]), tmp_path / "code", nobody)
    assert (tmp_path / "code" / "train.py").exists()
    assert scheduler.offsets == [0] * 2


async def test_a_digest_that_is_none_reaches_no_disk(tmp_path):
    scheduler = Scheduler()
    with pytest.raises(LaunchFailed, match="is no sha256"):
        await cache_of(tmp_path, scheduler).unpack(scheduler.work("queues/q/jobs/j", "../x"), tmp_path / "c", nobody)
