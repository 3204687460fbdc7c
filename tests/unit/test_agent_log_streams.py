"""Each request for logs has an end, also where the log cannot be read."""

import asyncio
from types import SimpleNamespace

from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Stage, Work
from whaleflux_agent.log_streams import LogStreams

JOB = "queues/q/jobs/j"


async def answer(folder, **request):
    """The chunks of one request, to the last."""
    work = Work("t", JOB, 1, ("GPU-0", "GPU-1"))
    task = SimpleNamespace(work=work, stage=Stage.ENDED, log=lambda rank: folder / f"rank-{rank}.log")
    came = asyncio.Event()
    streams, chunks = LogStreams(lambda job, epoch: task, came.set), []
    streams.start(agent_pb2.LogRequest(request="r", job=JOB, rank=-1, **request))
    async with asyncio.timeout(60):
        while not (chunks and chunks[-1].end):
            await came.wait()
            came.clear()
            while chunk := streams.take():
                chunks.append(chunk)
    await streams.close()
    return chunks


async def test_a_log_that_cannot_be_read_is_said_and_not_waited_for(tmp_path):
    (tmp_path / "rank-0.log").symlink_to("/etc/hostname")
    (tmp_path / "rank-1.log").write_text("text\n")
    chunks = await answer(tmp_path)
    assert "cannot be read" in chunks[-1].error
    assert b"".join(chunk.data for chunk in chunks).replace(b"text\n", b"") == b""


async def test_what_can_be_read_comes_whole(tmp_path):
    for rank in range(2):
        (tmp_path / f"rank-{rank}.log").write_text(f"{rank}\n")
    chunks = await answer(tmp_path)
    assert sorted(chunk.data for chunk in chunks) == [b"", b"0\n", b"1\n"]
    assert not chunks[-1].error
