"""Logs of ranks: tails, followers, and the bound on disk."""

import asyncio
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux_agent.core.line_times import MAX_MARKS, Mark, end_before, mark_of, thinned
from whaleflux_agent.core.log_lines import MAX_LINE_BYTES, LineCutter
from whaleflux_agent.runtime import log_times, logs


@pytest.fixture
def log(tmp_path):
    return tmp_path / "rank-0.log"


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


async def all_of(path, **how):
    return b"".join([chunk async for chunk, *_ in logs.follow(path, more=lambda: False, **how)])


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
    chunks = [chunk async for chunk, *_ in logs.follow(log, tail_lines=0, more=lambda: False)]
    assert all(len(chunk) <= 64 * 1024 and chunk.endswith(b"\n") for chunk in chunks)
    assert b"".join(chunks) == log.read_bytes()


async def test_a_follower_sees_what_is_written_until_the_end(log):
    growing = True
    seen = bytearray()

    async def read():
        async for chunk, *_ in logs.follow(log, tail_lines=0, more=lambda: growing, pause_s=0.001):
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


async def test_reading_goes_on_behind_what_is_known(log):
    log.write_bytes(b"".join(b"line %d\n" % i for i in range(20_000)) + b" 1%\r 50%\r 99")
    chunks = [chunk async for chunk in logs.follow(log, more=lambda: False)]
    assert chunks[-1][:2] == (b" 99\n", log.stat().st_size)
    known = chunks[0][1]
    assert known == len(chunks[0][0])
    rest = b"".join(data for data, *_ in chunks)[known:]
    assert await all_of(log, after=known) == rest
    assert await all_of(log, after=known, tail_lines=1) == rest, "the tail is of what is not known"
    assert await all_of(log, after=log.stat().st_size) == b""


async def test_what_no_newline_has_ended_is_read_again(log):
    log.write_bytes(b"one\ntw")
    growing = True
    reading = logs.follow(log, more=lambda: growing, pause_s=0.001, progress_every_s=60.0)
    assert (await anext(reading))[:2] == (b"one\n", 4)
    await reading.aclose()
    append(log, b"o\n")
    assert await all_of(log, after=4) == b"two\n"


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
        assert (await reading)[:2] == (b"first\n", 6)


def cut(*pieces):
    cutter = LineCutter()
    return [*(cutter.feed(piece) for piece in pieces), cutter.flush()]


def test_the_edge_of_a_piece_is_no_edge_of_a_line():
    assert cut(b"one\ntw", b"o\nthr", b"ee") == [b"one\n", b"two\n", b"", b"three\n"]


@given(st.binary(max_size=60).map(lambda b: b.replace(b"\r", b"")), st.lists(st.integers(0, 60), max_size=6))
def test_lines_do_not_depend_on_how_they_were_cut(content, edges):
    bounds = [0, *sorted(edges), len(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise(bounds)]
    given_ = cut(*pieces)
    assert all(part == b"" or part.endswith(b"\n") for part in given_)
    assert b"".join(given_) == content + (b"" if content.endswith(b"\n") or not content else b"\n")


def test_a_progress_bar_is_its_newest_state():
    assert cut(b"\r 1%\r 2%", b"\r 99%\r100%\ndone\r\n") == [b"", b"100%\ndone\n", b""]
    cutter = LineCutter()
    assert cutter.feed(b"\r10%\r20%\r30") == b""
    assert (cutter.progress(), cutter.progress()) == (b"20%\n", b"")
    assert cutter.flush() == b"30\n"


def test_a_line_without_end_comes_in_parts_with_whole_characters():
    text = "ü" * MAX_LINE_BYTES
    parts = b"".join(cut(*(text.encode()[i : i + 1000] for i in range(0, 2 * MAX_LINE_BYTES, 1000))))
    assert max(map(len, parts.splitlines())) <= MAX_LINE_BYTES
    assert parts.decode().replace("\n", "") == text


async def test_followers_of_two_ranks_get_whole_lines_whatever_the_ranks_flush(tmp_path):
    """Each rank writes half a line, then the other; no chunk joins or parts them."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        append(path, b"half of ")
    growing = True

    async def read(path):
        return [c async for c, *_ in logs.follow(path, tail_lines=0, more=lambda: growing, pause_s=0.001)]

    reading = [asyncio.create_task(read(path)) for path in paths]
    for path in paths:
        append(path, b"a line\nlast words")
    growing = False
    for chunks in await asyncio.gather(*reading):
        assert all(chunk.endswith(b"\n") for chunk in chunks)
        assert b"".join(chunks) == b"half of a line\nlast words\n"


async def test_a_state_of_a_progress_bar_is_marked_as_one_while_it_may_change(log):
    append(log, b"start\n 1%\r 50%\r 99")
    growing = True
    reading = logs.follow(log, more=lambda: growing, pause_s=0.001)
    first, state = await anext(reading), await anext(reading)
    assert (first.data, first.progress, state.data, state.progress) == (b"start\n", False, b" 50%\n", True)
    assert state.behind == first.behind, "who reads on from there gets the whole line"
    growing = False
    assert [(found.data, found.progress) async for found in reading] == [(b" 99\n", False)]


def written(log, data, at_s):
    append(log, data)
    os.utime(log, (at_s, at_s))


class TestTimes:
    """Lines were written when the log was seen to have grown."""

    @pytest.fixture
    def marked(self, log):
        written(log, b"a\nb", 100)
        log_times.mark(log)
        written(log, b"b\nc\n", 200)
        log_times.mark(log)
        log_times.mark(log)
        written(log, b"d\n", 300)
        return log

    async def lines(self, log, **how):
        found = logs.follow(log, more=lambda: False, times=log_times.LineTimes(log).marks, **how)
        return [(lines.data, lines.at_ns // 10**9) async for lines in found]

    async def test_each_line_has_the_time_of_the_look_that_saw_its_end(self, marked):
        assert await self.lines(marked) == [(b"a\n", 100), (b"bb\nc\n", 200), (b"d\n", 300)]
        assert log_times.times_path(marked).stat().st_size == 32, "nothing new is not noted"

    @pytest.mark.parametrize(("since_s", "shown"), [(50, b"a\nbb\nc\nd\n"), (100, b"a\nbb\nc\nd\n"), (101, b"bb\nc\nd\n"), (250, b"d\n"), (301, b"")])  # fmt: skip
    async def test_since_shows_whole_lines_from_a_time_on(self, marked, since_s, shown):
        found = await self.lines(marked, since_ns=since_s * 10**9)
        assert b"".join(data for data, _ in found) == shown
        assert all(at_s >= since_s for _, at_s in found)

    async def test_of_since_and_tail_the_fewer_lines_count_and_what_is_known_before_both(self, marked):
        assert await self.lines(marked, since_ns=10**9, tail_lines=1) == [(b"d\n", 300)]
        assert await self.lines(marked, since_ns=250 * 10**9, after=2) == [(b"bb\nc\n", 200), (b"d\n", 300)]

    async def test_a_log_that_was_emptied_and_a_mark_that_was_cut_off(self, marked):
        append(log_times.times_path(marked), b"half")
        log_times.mark(marked)
        assert (await self.lines(marked))[-1] == (b"d\n", 300)
        os.truncate(marked, 0)
        written(marked, b"e\n", 400)
        log_times.mark(marked)
        assert await self.lines(marked) == [(b"e\n", 400)]

    async def test_the_file_stays_small_and_only_old_times_become_coarser(self, log):
        marks = ((2 * second, second * 10**9) for second in range(MAX_MARKS + 10))
        append(log_times.times_path(log), b"".join(n.to_bytes(8, "little") for mark in marks for n in mark))
        written(log, b"x\n" * (MAX_MARKS + 11), MAX_MARKS + 20)
        log_times.mark(log)
        assert log_times.times_path(log).stat().st_size <= 16 * (3 * MAX_MARKS // 4 + 16)
        assert await self.lines(log, tail_lines=1) == [(b"x\n", MAX_MARKS + 20)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20), st.integers(0, 100), st.integers(0, 200))
def test_what_is_shown_since_a_time_is_what_has_that_time_or_a_later_one(steps, end, at_ns):
    marks = [Mark(size, at) for size, at in zip(itertools.accumulate(s for s, _ in steps), itertools.accumulate(t for _, t in steps), strict=True)]  # fmt: skip
    found = mark_of(marks, end)
    assert not found or not end or (end > end_before(marks, at_ns)) == (found.at_ns >= at_ns)
    assert sorted(thinned(marks, 5), key=lambda mark: mark.end_bytes) == [mark for mark in marks if mark.end_bytes > 5]
