"""What `whaleflux cp` carries: whole, and within its folder on both sides."""

import io
import os
import tarfile

import pytest

from whaleflux.file_archive import CONTENT, BadArchive, pack, put_in_place, reader_of, size_of, unpack


def packed(path):
    blocks = []
    return blocks, pack(path, blocks.append)


def unpacked(blocks, folder):
    folder.mkdir()
    return unpack(reader_of(iter(blocks)), folder)


def hostile(*entries):
    """An archive as nobody of ours writes it: (name, kind, link or content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, rest in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = rest if isinstance(rest, str) else ""
            entry.size = len(rest) if isinstance(rest, bytes) else 0
            tar.addfile(entry, io.BytesIO(rest) if isinstance(rest, bytes) else None)
    return [file.getvalue()]


FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE


def test_a_folder_comes_out_as_it_went_in(tmp_path):
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "big").write_bytes(os.urandom(300_000))
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "empty").touch()
    (source / "link").symlink_to("deep/er/big")
    (source / "deep" / "up").symlink_to("../run.sh")
    for left_out, target in (("away", "/etc/passwd"), ("out", "../x"), ("behind", "deep/../../x")):
        (source / left_out).symlink_to(target)
    os.mkfifo(source / "fifo")
    blocks, totals = packed(source)
    assert (totals.files, totals.size_bytes, totals.left_out) == (3, 300_010, 4)
    assert size_of(source) == 300_010
    assert max(map(len, blocks)) <= 64 << 10
    content, got = unpacked(blocks, tmp_path / "got")
    assert (got.files, got.size_bytes) == (3, 300_010)
    assert sorted(p.name for p in content.iterdir()) == ["deep", "empty", "link", "run.sh"]
    assert (content / "link").read_bytes() == (source / "deep" / "er" / "big").read_bytes()
    assert os.readlink(content / "deep" / "up") == "../run.sh"
    assert os.access(content / "run.sh", os.X_OK)


def test_one_file(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    blocks, totals = packed(tmp_path / "a")
    content, _ = unpacked(blocks, tmp_path / "got")
    assert (totals.files, content.read_bytes()) == (1, b"hello")


@pytest.mark.parametrize("entries", [
    [("../x", FILE, b"x")],
    [("/etc/x", FILE, b"x")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/../../x", FILE, b"x")],
    [("elsewhere", FILE, b"x")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/l", LINK, "/etc")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/l", LINK, "../..")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/l", LINK, "a/../../..")],
    [(CONTENT, LINK, ".."), (f"{CONTENT}/x", FILE, b"x")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/l", LINK, "sub"), (f"{CONTENT}/l/x", LINK, "y")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/l", tarfile.LNKTYPE, "/etc/passwd")],
    [(CONTENT, FOLDER, ""), (f"{CONTENT}/d", tarfile.CHRTYPE, "")],
    [(CONTENT, FILE, b"1"), (CONTENT, FILE, b"2")],
    [],
])  # fmt: skip
def test_what_would_write_elsewhere_is_refused(tmp_path, entries):
    with pytest.raises((BadArchive, OSError)):
        unpacked(hostile(*entries), tmp_path / "got")
    assert {p.name for p in tmp_path.iterdir()} == {"got"}


def test_headers_that_would_fill_the_memory_or_name_no_time_are_refused(tmp_path):
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 1 << 20
    with pytest.raises(BadArchive, match="a header has more than"):
        unpacked([long.tobuf(tarfile.GNU_FORMAT), bytes(1 << 20)], tmp_path / "long")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(CONTENT)
        entry.pax_headers = {"mtime": "1e300"}
        tar.addfile(entry)
    with pytest.raises(BadArchive):
        unpacked([file.getvalue()], tmp_path / "late")


def test_what_would_wait_for_somebody_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for use in (size_of, lambda path: pack(path, lambda _: None)):
        with pytest.raises(ValueError, match="'fifo' is neither a file nor a folder"):
            use(tmp_path / "fifo")


def test_an_archive_that_was_cut_off_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(os.urandom(200_000))
    blocks, _ = packed(tmp_path / "a")
    with pytest.raises(BadArchive):
        unpacked(blocks[:2], tmp_path / "got")


def test_a_file_that_shrinks_is_said(tmp_path):
    (tmp_path / "a").write_bytes(bytes(300_000))

    def shrinking(block):
        os.truncate(tmp_path / "a", 100)

    with pytest.raises(ValueError, match="shrank"):
        pack(tmp_path / "a", shrinking)


def test_a_folder_is_replaced_only_when_asked_and_as_a_whole(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        put_in_place(tmp_path / "new", tmp_path / "there", replace=False)
    put_in_place(tmp_path / "new", tmp_path / "there", replace=True)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["x"]
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"):
        put_in_place(tmp_path / "there", tmp_path / "file", replace=False)
    (tmp_path / "other").write_text("new")
    put_in_place(tmp_path / "other", tmp_path / "file", replace=False)
    assert (tmp_path / "file").read_text() == "new"
