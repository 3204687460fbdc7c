"""Logs of ranks: tails, followers, and the bound on disk."""

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux_agent.runtime import logs


@pytest.fixture
def log(tmp_path):
    return tmp_path / "rank-0.log"


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


async def all_of(path, **how):
    return b"".join([chunk async for chunk in logs.follow(path, more=lambda: False, **how)])


async def test_a_log_is_read_whole_or_from_its_last_lines(log):
    log.write_bytes(b"".join(b"line %d\n" % i for i in range(20_000)))
    assert await all_of(log, tail_lines=0) == log.read_bytes()
    assert await all_of(log, tail_lines=2) == b"line 19998\nline 19999\n"
    assert (await all_of(log, tail_lines=15_000)).startswith(b"line 5000\n")


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.integers(1, 14))
def test_a_tail_is_what_splitting_would_give(tmp_path_factory, lines, number):
    path = tmp_path_factory.mktemp("logs") / "log"
    content = b"\n".join(lines)
    path.write_bytes(content)
    ended = content.endswith(b"\n")
    body = content.split(b"\n")[:-1] if ended else content.split(b"\n")
    with open(path, "rb") as file:
        file.seek(logs.tail_start(path, number))
        assert file.read() == b"\n".join(body[-number:]) + (b"\n" if ended else b"")


async def test_chunks_are_bounded_and_end_with_whole_lines(log):
    log.write_bytes(b"".join(b"%07d\n" % i for i in range(30_000)))
    chunks = [chunk async for chunk in logs.follow(log, tail_lines=0, more=lambda: False)]
    assert all(len(chunk) <= 64 * 1024 and chunk.endswith(b"\n") for chunk in chunks)
    assert b"".join(chunks) == log.read_bytes()


async def test_a_follower_sees_what_is_written_until_the_end(log):
    growing = True
    seen = bytearray()

    async def read():
        async for chunk in logs.follow(log, tail_lines=0, more=lambda: growing, pause_s=0.001):
            seen.extend(chunk)

    reading = asyncio.create_task(read())
    for i in range(3):
        append(log, b"line %d\n" % i)
        async with asyncio.timeout(5):
            while not seen.endswith(b"line %d\n" % i):
                await asyncio.sleep(0.001)
    growing = False
    await reading
    assert bytes(seen) == log.read_bytes()


async def test_the_oldest_part_is_freed_and_nothing_moves(log):
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for i in range(60_000):
        os.write(writer, b"%07d\n" % i)
    size = log.stat().st_size
    logs.bound(log, 100_000)
    assert log.stat().st_blocks * 512 <= 100_000
    os.write(writer, b"next\n")
    os.close(writer)
    if log.stat().st_size < size:
        pytest.skip("this file system cannot punch holes: the log was emptied instead")
    kept = await all_of(log, tail_lines=0)
    assert b"\0" not in kept
    assert 45_000 <= len(kept) <= 100_000
    assert kept.endswith(b"0059999\nnext\n")
    first = int(kept.splitlines()[0])
    assert kept.splitlines()[:-1] == [b"%07d" % i for i in range(first, 60_000)]


def test_a_small_log_is_left_alone(log):
    log.write_bytes(b"hello\n")
    logs.bound(log, 100_000)
    assert log.read_bytes() == b"hello\n"


def test_the_last_text_is_bounded_and_starts_with_a_whole_line(log):
    log.write_text("".join(f"line {i}\n" for i in range(5000)) + "RuntimeError: ü\n")
    text = logs.last_text(log, 200)
    assert len(text) <= 200
    assert text.startswith("line ")
    assert text.endswith("RuntimeError: ü")
    assert logs.last_text(log.with_name("absent")) == ""


async def test_a_log_that_does_not_exist_yet_is_waited_for(log):
    growing = True
    reading = asyncio.create_task(anext(logs.follow(log, tail_lines=5, more=lambda: growing, pause_s=0.001)))
    await asyncio.sleep(0)
    log.write_bytes(b"first\n")
    async with asyncio.timeout(5):
        assert await reading == b"first\n"
