"""Exports of the audit trail as files: what is no export is said to be none, and nothing that is no file is replaced by one."""

import os
import threading

import pytest

from tests.unit.test_audit_chain import written
from whaleflux.cli import audit_files
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import audit_pb2 as pb

PARTS = [pb.ExportAuditResponse(links=written(3)[0])]


def test_an_export_is_verified_by_itself(tmp_path):
    assert audit_files.write(tmp_path / "a.jsonl", PARTS) == 3
    assert audit_files.verified(tmp_path / "a.jsonl").records == 3


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"[" * 100_000, b"x" * (3 << 20), b"{}\n", b"5\n"])
def test_what_is_no_export_is_refused_whatever_is_in_it(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"no record|is no line of"):
        audit_files.verified(tmp_path / "f")


def test_a_pipe_and_a_link_are_written_through_and_stay_what_they_are(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "link").symlink_to(tmp_path / "behind")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert audit_files.write(pipe, PARTS) == audit_files.write(link, PARTS) == 3
    reader.join(5)
    assert pipe.is_fifo() and link.is_symlink()
    assert read == [(tmp_path / "behind").read_text()] and read[0].count("\n") == 3
