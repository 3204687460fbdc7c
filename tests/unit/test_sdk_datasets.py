"""A job's dataset as its code reads it: whole here, links to the rest, or a URL where there was no room."""

import os

import pytest

from whaleflux.sdk import Dataset


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "copy" / "sub").mkdir(parents=True)
    (tmp_path / "copy" / "a").write_bytes(b"aye")
    (tmp_path / "copy" / "sub" / "b").write_bytes(b"bee")
    return tmp_path / "copy"


def read(data, path):
    with data.open(path) as file:
        return file.read()


def test_a_whole_copy_needs_no_source(folder):
    data = Dataset("my-set", {"WHALEFLUX_DATASET_MY_SET": str(folder)})
    assert data.paths() == ["a", "sub/b"]
    assert [read(data, path) for path in data.paths()] == [b"aye", b"bee"]
    assert data.is_here("a") and not data.is_here("c")
    with pytest.raises(FileNotFoundError):
        data.open("c")


def test_links_to_the_rest_are_files_like_the_others(folder, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "c").write_bytes(b"sea")
    (folder / "c").symlink_to(tmp_path / "original" / "c")
    variables = {"WHALEFLUX_DATASET_S": str(folder), "WHALEFLUX_DATASOURCE_S": str(tmp_path / "original")}
    data = Dataset("s", variables)
    assert data.paths() == ["a", "c", "sub/b"]
    assert read(data, "c") == b"sea"


def test_what_had_no_room_is_read_where_it_is():
    fsspec = pytest.importorskip("fsspec")
    root = f"memory://{os.urandom(8).hex()}"
    with fsspec.open(f"{root}/sub/b", "wb") as file:
        file.write(b"bee")
    data = Dataset("s", {"WHALEFLUX_DATASET_S": root})
    assert (data.paths(), data.is_here("sub/b"), read(data, "sub/b")) == (["sub/b"], False, b"bee")


def test_one_file_that_had_no_room_is_that_file_whatever_lies_beside_it(folder):
    fsspec = pytest.importorskip("fsspec")
    root = f"memory://{os.urandom(8).hex()}"
    for name in ("b.tar", "c.tar"):
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(name.encode())
    data = Dataset("s", {"WHALEFLUX_DATASET_S": root, "WHALEFLUX_DATASOURCE_S": f"{root}/b.tar"})
    assert (data.paths(), data.is_here("b.tar"), read(data, "b.tar")) == (["b.tar"], False, b"b.tar")
    with pytest.raises(FileNotFoundError, match="is no file of s"):
        data.open("c.tar")
    data = Dataset("s", {"WHALEFLUX_DATASET_S": str(folder), "WHALEFLUX_DATASOURCE_S": f"{folder}/a"})
    assert (data.paths(), data.is_here("a"), read(data, "a")) == (["a"], True, b"aye")


def test_a_dataset_that_the_job_does_not_name_and_paths_that_lead_out_say_what_to_do(folder):
    with pytest.raises(LookupError, match="add it to its file: data: dataset:other"):
        Dataset("other", {})
    data = Dataset("s", {"WHALEFLUX_DATASET_S": str(folder)})
    for path in ("../secret", "/etc/passwd"):
        with pytest.raises(ValueError, match="leads out of the dataset"):
            data.open(path)
