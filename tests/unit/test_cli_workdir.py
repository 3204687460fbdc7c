"""Which folder goes with a job, and whether anybody has to be asked."""

import pytest

from whaleflux.cli import workdir
from whaleflux.errors import InvalidArgument, NotFound, Unavailable
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.sdk import code
from whaleflux.v1 import scheduler_pb2 as pb

JOB = "run: python train.py\ngpus: 1\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text("print(1)")
    return tmp_path / "src"


def parcel(folder, text=JOB, file="job.yaml"):
    return workdir.parcel_of(*workdir.folder_of(job_from_yaml(text, folder), file, folder))


def test_a_folder_with_code_goes_along_unless_the_file_says_otherwise(folder):
    assert parcel(folder).contents.root == folder and not parcel(folder).said
    assert parcel(folder, JOB + "workdir: ..").contents.root == folder.parent
    assert parcel(folder, JOB + "workdir: .").said
    for text, file in ((JOB + "workdir: none", "job.yaml"), (JOB + "directory: /src", "job.yaml"), (JOB, "-")):
        assert parcel(folder, text, file) is None
    with pytest.raises(InvalidArgument, match="workdir: excludes directory"):
        job_from_yaml(JOB + "workdir: .\ndirectory: /src", folder)
    with pytest.raises(InvalidArgument, match="not a folder"):
        parcel(folder, JOB + "workdir: nowhere")


@pytest.mark.parametrize("answer", [True, False])
def test_it_is_asked_once_for_each_folder(folder, monkeypatch, capsys, answer):
    asked = []
    monkeypatch.setattr(workdir.typer, "confirm", lambda question, **_: asked.append(question) or answer)
    found = parcel(folder)
    assert workdir.wanted(found, yes=False) is answer
    assert asked == [f"send {folder} (1 file, 8 B) with the job?"]
    if answer:
        assert workdir.wanted(parcel(folder), yes=False)
    else:
        assert parcel(folder) is None, "no is remembered, also for -y"
        assert "as you said before; `workdir: .` in job.yaml sends it" in capsys.readouterr().err
    assert workdir.wanted(parcel(folder, JOB + "workdir: ."), yes=False)
    assert len(asked) == 1


def test_yes_sends_without_a_question(folder, monkeypatch):
    monkeypatch.setattr(workdir.typer, "confirm", lambda *_, **__: pytest.fail("asked"))
    assert workdir.wanted(parcel(folder), yes=True)


def test_a_dry_run_shows_what_goes_and_what_stays(folder):
    (folder / ".gitignore").write_text("*.bin\n")
    (folder / "x.bin").write_text("")
    found = parcel(folder)
    assert [line.split() for line in found.lines(all_of_it=True)][1:] == [
        ["sends", "8", "B", "train.py"], ["sends", "6", "B", ".gitignore"], ["stays", "here", "x.bin"],
    ]  # fmt: skip
    assert found.as_json()["left_out"] == [{"path": "x.bin", "why": "ignored"}]


class Fleet:
    """Takes code, after as many failures as a test says."""

    def __init__(self, has=False, failures=()):
        self.has, self.failures, self.received, self.scheduler = has, list(failures), b"", self

    def GetCode(self, request, timeout):
        if not self.has:
            raise NotFound("code", request.digest)
        return pb.Code(digest=request.digest)

    def UploadCode(self, requests, timeout):
        first, *more = requests
        if self.failures:
            raise self.failures.pop(0)
        self.received = b"".join(message.data for message in more)
        assert first.size_bytes == len(self.received)
        self.has = True


def test_what_the_fleet_has_is_not_sent_and_a_break_is_tried_again(folder, monkeypatch):
    monkeypatch.setattr(code.time, "sleep", lambda _: None)
    found, progress = parcel(folder), []
    fleet = Fleet(failures=[Unavailable("the stream broke")] * 2)
    assert code.send(fleet, found.packed, progress.append)
    assert len(fleet.received) == found.packed.size_bytes == progress[-1]
    assert not code.send(fleet, found.packed)
    with pytest.raises(Unavailable):
        code.send(Fleet(failures=[Unavailable("away")] * 4), found.packed)
    assert code.send_folder(fleet, folder) == found.packed.digest
