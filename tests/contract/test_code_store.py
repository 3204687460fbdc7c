"""What every store of code promises: one suite over the model in memory and over a real JetStream."""

import asyncio
import hashlib
import itertools

import pytest

from tests.support.nats_server import NatsServer
from whaleflux.clock import SystemClock
from whaleflux.code.limits import CHUNK_BYTES
from whaleflux.code.memory import MemoryCode
from whaleflux.errors import Aborted, NotFound, ResourceExhausted
from whaleflux.events.nats_code import NatsCode

_numbers = itertools.count()
LIMIT = 4 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = NatsServer(tmp_path_factory.mktemp("nats-code"))
    server.launch()
    yield server
    server.kill()


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.integration)])
async def store(request):
    if request.param == "memory":
        yield MemoryCode(max_bytes=LIMIT)
        return
    bus = await request.getfixturevalue("server").connect()
    yield NatsCode(bus, SystemClock(), LIMIT)
    await bus.close()


@pytest.fixture
def code():
    """Bytes of two and a half chunks that no other test has, and their digest."""
    content = (b"%06d" % next(_numbers)) * (CHUNK_BYTES * 5 // 12)
    return content, hashlib.sha256(content).hexdigest()


async def put(store, content, digest):
    upload = await store.begin(digest, len(content))
    assert upload
    await write(store, digest, upload, content)
    return await store.finish(digest, upload, len(content))


async def write(store, digest, upload, content):
    for index in range(-(-len(content) // CHUNK_BYTES)):
        await store.write(digest, upload, index, content[index * CHUNK_BYTES :][:CHUNK_BYTES])


async def read(store, digest):
    found = await store.find(digest)
    return b"".join([await store.read(found, index) for index in range(found.chunks)])


async def one(store, digest):
    return next((code for code in await store.list() if code.digest == digest), None)


async def test_what_was_stored_is_read_and_is_stored_once(store, code):
    content, digest = code
    assert await store.find(digest) is None
    assert (await put(store, content, digest)).size_bytes == len(content)
    assert await read(store, digest) == content
    assert not await store.begin(digest, len(content))
    assert await store.delete(await one(store, digest))


async def test_what_is_not_whole_is_not_found(store, code):
    content, digest = code
    upload = await store.begin(digest, len(content))
    await store.write(digest, upload, 0, content[:CHUNK_BYTES])
    assert await store.find(digest) is None
    assert not await store.keep(digest)
    assert not (await one(store, digest)).whole
    assert await put(store, content, digest), "another writer may begin"
    assert await read(store, digest) == content
    assert await store.delete(await one(store, digest))


async def test_what_was_kept_since_it_was_listed_is_not_deleted(store, code):
    content, digest = code
    await put(store, content, digest)
    listed, found = await one(store, digest), await store.find(digest)
    assert await store.keep(digest)
    assert not await store.delete(listed)
    assert await read(store, digest) == content
    assert await store.delete(await one(store, digest))
    assert await store.find(digest) is None
    assert not await store.keep(digest)
    with pytest.raises(NotFound):
        await store.read(found, 0)


async def test_many_may_keep_it_at_once(store, code):
    content, digest = code
    await put(store, content, digest)
    assert all(await asyncio.gather(*(store.keep(digest) for _ in range(40))))
    assert not any(await asyncio.gather(*(store.begin(digest, len(content)) for _ in range(40))))


async def test_bytes_that_another_upload_sends_under_a_digest_harm_nobodys(store, code):
    content, digest = code
    other = await store.begin(digest, len(content))
    await put(store, content, digest)
    await store.write(digest, other, 0, b"\0" * CHUNK_BYTES)
    assert await read(store, digest) == content
    await store.abandon(digest, other)
    assert await read(store, digest) == content
    assert await store.delete(await one(store, digest))


async def test_of_two_that_send_the_same_the_first_to_finish_counts(store, code):
    content, digest = code
    first, second = [await store.begin(digest, len(content)) for _ in range(2)]
    for upload in (first, second):
        await write(store, digest, upload, content)
    assert (await store.finish(digest, second, len(content))).upload == second
    assert (await store.finish(digest, first, len(content))).upload == second
    assert await read(store, digest) == content
    assert await store.delete(await one(store, digest))


async def test_a_writer_whose_archive_was_deleted_hears_it_and_may_write_again(store, code):
    content, digest = code
    upload = await store.begin(digest, len(content))
    assert await store.delete(await one(store, digest))
    with pytest.raises(Aborted):
        await store.finish(digest, upload, len(content))
    await put(store, content, digest)
    assert await read(store, digest) == content
    assert await store.delete(await one(store, digest))


async def test_a_full_store_refuses_and_keeps_what_it_has(store, code):
    content, digest = code
    await put(store, content, digest)
    other = "f" * 64
    upload = await store.begin(other, LIMIT)
    with pytest.raises(ResourceExhausted, match="code_store_bytes"):
        for index in range(LIMIT // CHUNK_BYTES):
            await store.write(other, upload, index, b"x" * CHUNK_BYTES)
    assert await read(store, digest) == content
    for each in await store.list():
        assert await store.delete(each)
