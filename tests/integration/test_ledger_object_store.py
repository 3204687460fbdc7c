"""The ledger in an object store that speaks S3 (moto's), and other engines that read the same files there."""

import os

import duckdb
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from moto.server import ThreadedMotoServer
from pyarrow import fs

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, reports, row, sample
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Absent, LocalFolder
from whaleflux_console.ledger.ledger import open_ledger
from whaleflux_console.ledger.manifest import DAY_MS
from whaleflux_console.ledger.object_folder import ObjectFolder, open_folder, s3
from whaleflux_console.ledger.question import Question

pytestmark = pytest.mark.integration


class Objects(ArrowFSWrapper):
    """Arrow's S3 as DuckDB reads it where its own extension cannot be downloaded."""

    protocol, root_marker = "objects", ""

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("objects://")


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "example")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        _, port = server.get_host_and_port()
        yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint):
    name = f"ledger-{os.urandom(4).hex()}"
    fs.S3FileSystem(
        endpoint_override=endpoint.rpartition("/")[2], scheme="http", region="us-east-1", allow_bucket_creation=True
    ).create_dir(name)
    return name


@pytest.fixture(params=["local", "object store"])
def folder(request, tmp_path, endpoint, bucket):
    place = str(tmp_path) if request.param == "local" else f"s3://{bucket}/wf"
    return open_folder(place, endpoint=endpoint, region="us-east-1")


def test_a_folder_keeps_what_it_promises(folder):
    with pytest.raises(Absent):
        folder.read("a/b/c")
    assert folder.list("a") == ()
    folder.write("a/b/c", b"one")
    folder.write("a/d", b"three")
    folder.write("a/b/c", b"two!")
    folder.write("ab/e", b"other")
    assert folder.read("a/b/c") == b"two!"
    assert [(found.path, found.bytes) for found in folder.list("a")] == [("a/b/c", 4), ("a/d", 5)]
    folder.delete("a/b/c")
    folder.delete("a/b/c")
    assert [found.path for found in folder.list("a")] == ["a/d"]


def test_an_object_store_that_is_away_is_not_an_empty_one(bucket):
    away = ObjectFolder(s3(endpoint="http://127.0.0.1:9", region="us-east-1"), bucket)
    for call in (lambda: away.read("x"), lambda: away.list("x"), lambda: away.write("x", b"")):
        with pytest.raises(Unavailable, match="object store"):
            call()


def test_a_bucket_that_does_not_exist_is_not_an_empty_one(endpoint):
    gone = open_folder("s3://no-such-bucket/wf", endpoint=endpoint, region="us-east-1")
    with pytest.raises(Unavailable):
        gone.write("x", b"")


async def test_a_ledger_lives_there_and_others_read_it(endpoint, bucket):
    folder = open_folder(f"s3://{bucket}/wf", endpoint=endpoint, region="us-east-1")
    store, engine = MemoryStore(), Engine()
    async with elect(store, "console", "here") as leader:
        ledger = await open_ledger(folder, store, leader, engine=engine)
        await ledger.append(reports(1, samples=[sample(), sample("gpu-1")]))
        await ledger.append(
            reports(2, samples=[sample(start_ms=BEGIN_MS + 10_000)], taken_ms=BEGIN_MS + HOUR_MS + 20 * MINUTE_MS)
        )
        await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=5)])
        await ledger.close(await ledger.inputs(BEGIN_MS), [row(bill=7), row(card="gpu-1", job="", bill=1)])
    async with elect(store, "console", "there") as leader:
        ledger = await open_ledger(folder, store, leader, engine=engine)
        assert {each.device for each in (await ledger.inputs(BEGIN_MS)).facts.samples} == {"gpu-0", "gpu-1"}
        assert await ledger.verify(BEGIN_MS) == ()
    answers = Answers(folder, store, engine)
    await answers.follow()
    assert (await answers.ask(Question(BEGIN_MS, BEGIN_MS + DAY_MS))).total.bill_micros == 8
    engine.close()
    with duckdb.connect() as other:
        other.register_filesystem(Objects(s3(endpoint=endpoint, region="us-east-1")))
        found = other.execute(f"""
            SELECT queue, sum(bill_micros) FROM (
                SELECT * FROM read_parquet('objects://{bucket}/wf/hours/*/*/*.parquet', hive_partitioning = false)
                QUALIFY version = max(version) OVER (PARTITION BY hour_ms))
            GROUP BY queue ORDER BY queue""").fetchall()
        assert found == [("q", 8)]


def test_places_that_are_none_are_refused(tmp_path):
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)
    for bad in ("relative/path", "gs://bucket", ""):
        with pytest.raises(InvalidArgument, match="absolute path"):
            open_folder(bad)
