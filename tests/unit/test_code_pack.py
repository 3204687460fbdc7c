"""A folder becomes an archive and a folder again: what travels, what stays, and what is refused."""

import gzip
import io
import os
import shutil
import tarfile
import tracemalloc

import pytest

from whaleflux.code.beside import lies_beside_code
from whaleflux.code.ignore import LeftOut, walk
from whaleflux.code.limits import MAX_UNPACKED_BYTES
from whaleflux.code.pack import contents, pack, summary
from whaleflux.code.unpack import UnpackError, digest_of, unpack
from whaleflux.errors import InvalidArgument


def write(root, **files):
    """Files by path; `__` stands for a slash, `_dot_` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def travels(root):
    return [one.path for one in walk(root) if not isinstance(one, LeftOut)]


def packed(root):
    with pack(contents(root)).file as file:
        file.seek(0)
        return file.read()


def digest(root):
    made = pack(contents(root))
    made.file.close()
    return made.digest


def test_the_same_content_has_the_same_digest_whenever_it_was_written(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, train_dot_py="x", lib__a_dot_py="y")
    write(other, lib__a_dot_py="y", train_dot_py="x")
    os.utime(other / "train.py", (1, 1))
    assert digest(one) == digest(other)
    (other / "train.py").chmod(0o755)
    assert digest(one) != digest(other), "a script that may be executed is another one"


def test_git_and_whaleflux_say_what_stays_behind(tmp_path):
    write(
        tmp_path,
        _dot_gitignore="*.log\n/data/\nbuild/\n",
        _dot_whalefluxignore="!keep.log\nnotes/\n",
        a_dot_py="",
        x_dot_log="",
        keep_dot_log="",
        data__big="",
        lib__data__small="",
        lib__build__o="",
        notes__n="",
        lib___dot_gitignore="*.py\n!b.py\n",
        lib__a_dot_py="",
        lib__b_dot_py="",
        __pycache__="",
    )
    assert travels(tmp_path) == [
        ".gitignore", ".whalefluxignore", "a.py", "keep.log", "lib/.gitignore", "lib/b.py", "lib/data/small",
    ]  # fmt: skip


def test_what_is_never_code_stays_behind(tmp_path):
    for name in (".git/config", "__pycache__/a.pyc", ".venv/lib/x", ".whaleflux/pki/ca.key", "env/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "pipe")
    assert travels(tmp_path) == []
    assert {one.path for one in walk(tmp_path)} == {".git/", "__pycache__/", ".venv/", ".whaleflux/", "env/", "pipe"}


def test_the_repository_around_a_folder_counts(tmp_path):
    write(tmp_path, _dot_git__HEAD="", _dot_gitignore="*.bin\nbuild/\n", sub__a_dot_py="", sub__b_dot_bin="")
    write(tmp_path, build__made_dot_py="")
    assert travels(tmp_path / "sub") == ["a.py"]
    assert travels(tmp_path / "build") == ["made.py"], "who names an ignored folder wants it"


def test_links_within_travel_and_links_out_are_refused_by_name(tmp_path):
    root = tmp_path / "root"
    write(root, lib__a_dot_py="text")
    (root / "lib" / "b.py").symlink_to("a.py")
    (root / "current").symlink_to("lib")
    archive = tmp_path / "archive"
    archive.write_bytes(packed(root))
    unpack(archive, tmp_path / "there")
    assert (tmp_path / "there" / "current" / "b.py").read_text() == "text"
    (root / "data").symlink_to("/mnt/data")
    with pytest.raises(InvalidArgument, match=r"data is a link out of the folder, to /mnt/data.*whalefluxignore"):
        contents(root)
    (root / ".whalefluxignore").write_text("data\n")
    assert [one.path for one in contents(root).left_out] == ["data"]


def test_too_much_names_what_is_large_and_the_way_out(tmp_path):
    write(tmp_path, a_dot_py="", models__llama__weights="")
    os.truncate(tmp_path / "models/llama/weights", MAX_UNPACKED_BYTES + 1)
    with pytest.raises(InvalidArgument, match=r"at most 1000.0 MB; most of it: models/llama/ .*\.whalefluxignore"):
        contents(tmp_path)
    with pytest.raises(InvalidArgument, match="not a folder"):
        contents(tmp_path / "a.py")


def test_too_many_files_are_counted_by_folder(tmp_path):
    (tmp_path / "cache").mkdir()
    for number in range(20_001):
        os.close(os.open(tmp_path / "cache" / str(number), os.O_CREAT))
    with pytest.raises(InvalidArgument, match=r"more than 20,000 files; most of it: cache/ \(20,001 files\)"):
        contents(tmp_path)
    shutil.rmtree(tmp_path / "cache")


def test_what_changes_while_it_is_packed_is_said(tmp_path):
    write(tmp_path, a_dot_py="12345", b_dot_py="1")
    found = contents(tmp_path)
    assert summary(found) == "2 files, 6 B"
    (tmp_path / "a.py").write_text("1")
    with pytest.raises(InvalidArgument, match=r"a\.py: it became shorter"):
        pack(found)
    (tmp_path / "a.py").unlink()
    with pytest.raises(InvalidArgument, match=r"a\.py: No such file"):
        pack(found)


def test_it_comes_out_as_it_went_in_and_only_that(tmp_path):
    root, there, archive = tmp_path / "root", tmp_path / "there", tmp_path / "archive"
    write(root, run_dot_sh="echo", lib__a_dot_py="text", empty="")
    (root / "run.sh").chmod(0o744)
    archive.write_bytes(packed(root))
    write(there, of_an_earlier_try="")
    unpack(archive, there)
    assert sorted(p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()) == [
        "empty", "lib/a.py", "run.sh",
    ]  # fmt: skip
    assert os.access(there / "run.sh", os.X_OK) and not os.access(there / "empty", os.X_OK)
    assert digest_of(archive) == digest(root)


def hostile(**fields):
    """An archive of one member."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo(fields.pop("name", "x"))
        data = fields.pop("data", b"")
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        hostile(name="../out", data=b"x"),
        hostile(name="a/../../out", data=b"x"),
        hostile(name="/out", data=b"x"),
        hostile(name="d/x", type=tarfile.SYMTYPE, linkname="y/../.."),  # d/y may be a link to another folder
        hostile(name="d/x", type=tarfile.SYMTYPE, linkname="../../out"),
        hostile(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        hostile(type=tarfile.SYMTYPE, linkname="../../out"),
        hostile(type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        hostile(type=tarfile.CHRTYPE),
        hostile(type=tarfile.FIFOTYPE),
        b"no archive",
        hostile(data=os.urandom(4000))[:-100],
    ],
    ids=range(12),  # an archive has the time of its making in it, and several processes have to collect the same tests
)
def test_a_hostile_or_damaged_archive_leaves_nothing(tmp_path, content):
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(UnpackError):
        unpack(tmp_path / "archive", tmp_path / "in" / "folder")
    assert list((tmp_path / "in").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "in"]


def headers(kind, size_bytes, data=b"", number=1):
    """An archive that begins with headers which extend what follows."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size_bytes
    if size_bytes < 0:
        made = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        made[124:136] = b"\xff" * 8 + (size_bytes & 0xFFFFFFFF).to_bytes(4, "big")
        made[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(made))[0]
    else:
        made = header.tobuf(tarfile.GNU_FORMAT)
    padded = data + bytes(-len(data) % 512)
    return gzip.compress((bytes(made) + padded) * number + hostile_body(name="y"))


def hostile_body(**fields):
    return gzip.decompress(hostile(**fields))


@pytest.mark.parametrize(
    "content",
    [
        headers(tarfile.XHDTYPE, 24 << 20, bytes(24 << 20)),
        headers(tarfile.GNUTYPE_LONGNAME, 24 << 20, bytes(24 << 20)),
        headers(tarfile.XHDTYPE, -512),
        headers(tarfile.GNUTYPE_LONGNAME, 10, b"a" * 10, number=3000),
        headers(tarfile.XHDTYPE, 22, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        hostile(name="a", mtime=10**30, pax_headers={"mtime": "1e300"}),
    ],
)
def test_headers_that_would_take_the_agent_with_them_are_refused(tmp_path, content):
    (tmp_path / "archive").write_bytes(content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(UnpackError):
            unpack(tmp_path / "archive", tmp_path / "in" / "folder")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_nothing_is_written_through_a_link_however_long_its_way_is(tmp_path):
    """CVE-2025-4517: a path that is too long to be resolved was taken for one without links."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:

        def add(name, kind, link="", data=b""):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, len(data)
            archive.addfile(member, io.BytesIO(data))

        at = ""
        for step in "abcdefghijklmnop":
            add(at + "d" * 247, tarfile.DIRTYPE)
            add(at + step, tarfile.SYMTYPE, "d" * 247)
            at += "d" * 247 + "/"
        short = "/".join("abcdefghijklmnop")
        add(f"{short}/{'l' * 254}", tarfile.SYMTYPE, "../" * 16)
        add("escape", tarfile.SYMTYPE, f"{short}/{'l' * 254}/../../out")
        add("escape/file", tarfile.REGTYPE, data=b"x")
    (tmp_path / "archive").write_bytes(content.getvalue())
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError):
        unpack(tmp_path / "archive", tmp_path / "in" / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "in", "out"]


@pytest.mark.parametrize(
    ("command", "image", "expected"),
    [
        (["python", "train.py"], False, True),
        (["bash", "-c", "cd x && python 'src/main.py' --lr 1"], True, True),
        (["python", "-m", "train"], False, True),  # a *.py lies there
        (["python", "-m", "train"], True, False),
        (["python", "/opt/train.py"], True, False),
        (["python", "../train.py"], True, False),
    ],
)
def test_a_file_lies_beside_code_where_run_names_it_or_scripts_are_there(tmp_path, command, image, expected):
    write(tmp_path, train_dot_py="", src__main_dot_py="")
    assert lies_beside_code(tmp_path, command, image=image) is expected


def test_a_home_folder_is_not_sent_by_guess(tmp_path, monkeypatch):
    write(tmp_path, train_dot_py="")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not lies_beside_code(tmp_path, ["python", "train.py"], image=False)


def test_a_line_that_is_no_pattern_leaves_nothing_out_and_stops_nothing(tmp_path):
    write(tmp_path, _dot_gitignore="*.log\n\\\n[\n!\n", a_dot_log="", b_dot_py="")
    assert travels(tmp_path) == [".gitignore", "b.py"]
