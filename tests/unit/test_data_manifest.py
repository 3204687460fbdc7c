"""What a dataset consists of: chunks cover every byte once, the digest names the version, and what cannot be is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.data import manifest
from whaleflux.data.manifest import MIN_CHUNK_BYTES, ManifestWrong
from whaleflux.v1 import inventory_pb2 as pb

SIZES = st.one_of(st.integers(0, 3), st.integers(0, 5 * MIN_CHUNK_BYTES), st.sampled_from([MIN_CHUNK_BYTES, 10**12]))
FILES = st.dictionaries(st.text("abc", min_size=1, max_size=6), SIZES, min_size=1, max_size=6).filter(
    lambda files: sum(files.values())
)


def known(files, salt=0):
    made = manifest.draft(files)
    return made.known([(salt + i).to_bytes(32) for i in range(made.chunk_count)])


@settings(max_examples=20, deadline=None)
@given(FILES)
def test_chunks_cover_every_byte_once_and_are_not_too_many(files):
    made = manifest.draft(files.items())
    covered = dict.fromkeys(files, 0)
    for index, chunk in enumerate(made.chunks()):
        path = made.files[chunk.file].path
        assert (chunk.index, chunk.offset) == (index, covered[path])
        assert 0 < chunk.size_bytes <= made.chunk_bytes
        covered[path] += chunk.size_bytes
    assert covered == files
    assert made.chunk_count <= manifest.MAX_CHUNKS


@settings(max_examples=20, deadline=None)
@given(FILES.filter(lambda files: sum(files.values()) < 10**11), st.integers(1, 1000))
def test_a_digest_is_that_of_the_contents_and_survives_the_wire(files, salt):
    made = known(files.items())
    again = manifest.from_proto(pb.DatasetManifest.FromString(made.to_proto().SerializeToString()))
    assert (again, again.digest) == (made, made.digest)
    assert known(files.items(), salt).digest != made.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.files[0].__setattr__("path", "../x"), "leads out"),
        (lambda m: m.files[0].__setattr__("path", "/etc/passwd"), "leads out"),
        (lambda m: m.files[0].__setattr__("path", ""), "leads out"),
        (lambda m: m.files[0].__setattr__("path", "x" * 300), "too long"),
        (lambda m: m.files[1].__setattr__("path", "a"), "in order"),
        (lambda m: m.files[1].__setattr__("path", "a/b"), "lies in what is a file"),
        (lambda m: m.files[0].__setattr__("chunk_sha256", b"x"), "not one SHA-256"),
        (lambda m: m.files[0].__setattr__("size_bytes", -1), "not one SHA-256"),
        (lambda m: m.__setattr__("chunk_bytes", 3 << 20), "power of two"),
        (lambda m: m.files.__delitem__(slice(None)), "holds no bytes"),
    ],
)
def test_what_is_no_manifest_is_refused(change, said):
    message = known([("a", 5), ("b", 5)]).to_proto()
    change(message)
    with pytest.raises(ManifestWrong, match=said):
        manifest.from_proto(message)


def test_too_many_files_are_refused_with_what_to_do():
    with pytest.raises(ManifestWrong, match=r"24001 files, at most 24000.*pack them"):
        manifest.draft((f"{i}", 1) for i in range(24_001))
