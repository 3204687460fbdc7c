"""Originals over HTTP and through fsspec: in ranges where they are offered, whole where not, and never two versions in one."""

import http.server
import os
import sys
import threading
import uuid

import pytest

from whaleflux.data import manifest as manifests
from whaleflux.data import sources
from whaleflux.data.manifest import ManifestWrong
from whaleflux.data.sources import ByFsspec, Found, SourceChanged, SourceFailed, Web
from whaleflux_agent import dataset_pull
from whaleflux_agent.dataset_files import finish
from whaleflux_agent.dataset_pull import Pull
from whaleflux_agent.dataset_wanted import found_out

DATA = os.urandom(100_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """One object; `ranged`, `etag`, `wants`, `cut` are the server's, for a test to set."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range", ""))
        if server.wants and self.headers.get("Authorization") != server.wants:
            return self.send_error(401)
        data, first = DATA, 0
        if server.ranged and (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = DATA[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{len(DATA)}")
        else:
            self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if server.trickles.is_set() and len(data) > 1:
            self._trickle(data)
        if server.cut and len(data) > 1:
            server.cut -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        try:
            self.wfile.write(data)
        except OSError:
            pass  # the reader has what it wanted
        return None

    def _trickle(self, data):
        """A byte at a time, until nobody listens."""
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.server.gone.wait(0.01)
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.ranged, made.etag, made.wants, made.cut, made.asked = True, '"1"', "", 0, []
    made.says_length, made.trickles, made.gone = True, threading.Event(), threading.Event()
    made.url = f"http://127.0.0.1:{made.server_port}/sets/c4%20en.tar?part=1"
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.gone.set()
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(autouse=True)
def _small_and_at_once(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)
    monkeypatch.setattr(dataset_pull, "RUN_BYTES", 32768)
    monkeypatch.setattr(manifests, "MIN_CHUNK_BYTES", 16384)


def pulled(source, folder):
    made = Pull(found_out(source), source, folder / "partial").run()
    finish(folder / "partial", folder / "copy")
    return made, {path.name: path.read_bytes() for path in (folder / "copy").rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranged", [True, False])
def test_a_file_of_a_web_server(server, tmp_path, ranged):
    server.ranged, server.wants, server.cut = ranged, "Bearer t", 2
    made, found = pulled(Web(server.url, "Bearer t"), tmp_path)
    assert found == {"c4 en.tar": DATA}
    assert made.chunk_count == 7
    assert (len(server.asked) > 4) == ranged, "several stretches"


def test_a_server_that_does_not_say_how_much_it_has(server, tmp_path):
    server.ranged = server.says_length = False
    assert pulled(Web(server.url), tmp_path)[1] == {"c4 en.tar": DATA}


def test_a_server_that_says_no_is_quoted(server):
    server.wants = "Bearer t"
    with pytest.raises(SourceFailed, match="401"):
        Web(server.url).scan()


def test_an_object_that_is_replaced_while_it_is_read_makes_no_version(server, tmp_path):
    source = Web(server.url)
    wanted = found_out(source)
    server.etag = '"2"'
    with pytest.raises(SourceChanged):
        Pull(wanted, source, tmp_path / "partial").run()


def test_what_fsspec_reads(tmp_path):
    import fsspec

    root = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{root}/sub/big", "wb") as file:
        file.write(DATA)
    with fsspec.open(f"{root}/small", "wb") as file:
        file.write(b"small")
    made, found = pulled(ByFsspec(root), tmp_path / "folder")
    assert found == {"big": DATA, "small": b"small"}
    assert [file.path for file in made.files] == ["small", "sub/big"]
    single = ByFsspec(f"{root}/sub/big")
    assert pulled(single, tmp_path / "single")[1] == {"big": DATA}
    assert single.home() == f"{root}/sub"
    with pytest.raises(ManifestWrong, match="holds no bytes"):
        found_out(ByFsspec("memory://absent/nothing"))


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SourceFailed, match="gs:// needs the package gcsfs on this node"):
        sources.open_source("gs://bucket/c4")


def test_a_server_that_trickles_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STALLED_S", 0.2)
    source = Web(server.url)
    wanted = found_out(source)
    server.trickles.set()
    with pytest.raises(SourceFailed, match="at least 16384 a second are needed"):
        Pull(wanted, source, tmp_path / "partial").run()


def test_a_driver_that_never_answers_is_given_up_and_so_many_at_most(monkeypatch):
    import fsspec

    source, ends, begun = ByFsspec("memory://x"), threading.Event(), []
    monkeypatch.setattr(sources, "STALLED_S", 0.01)
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: begun.append(1) or ends.wait(60), raising=False
    )
    try:
        for _ in range(sources.MAX_ABANDONED):
            with source.open(Found("a", 10), 0, 10) as stream, pytest.raises(SourceFailed, match="no answer within"):
                stream.read(10)
        with source.open(Found("a", 10), 0, 10) as stream, pytest.raises(SourceFailed, match="have not come back"):
            stream.read(10)
        assert len(begun) == sources.MAX_ABANDONED
    finally:
        ends.set()


def test_a_server_that_breaks_off_in_mid_chunk_is_one_that_failed(server, tmp_path):
    source = Web(server.url)
    wanted = found_out(source)
    server.cut = 100
    with pytest.raises(SourceFailed, match="ended before its end"):
        Pull(wanted, source, tmp_path / "partial").run()
