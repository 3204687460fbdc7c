"""`whaleflux logs`: lines for people and for programs, of a job or of all members of an array."""

import json
from types import SimpleNamespace

import pytest

from whaleflux.cli import log_reading
from whaleflux.cli.screen import ObjectScreen, Screen
from whaleflux.errors import InvalidArgument, NotFound, Unavailable
from whaleflux.v1 import scheduler_pb2 as pb

JOB = "queues/default/jobs/sweep"


def chunk(data, *, rank=0, attempt=1, at_s=0):
    made = pb.StreamLogsResponse(data=data, rank=rank, attempt=attempt)
    made.time.FromSeconds(at_s)
    return made


class Fleet:
    """These outputs by job; an error among them is raised there. Jobs of one array, `sweep`."""

    def __init__(self, outputs, members=()):
        self.outputs, self.asked = outputs, []
        self._members = [
            pb.Job(name=name, spec=pb.JobSpec(array=pb.ArrayMember(name="sweep", index=i)))
            for i, name in enumerate(members)
        ]
        self.scheduler = SimpleNamespace(
            GetJob=lambda request, timeout: pb.Job(name=request.name, state=pb.JOB_STATE_QUEUED),
            ListJobs=lambda request, timeout: pb.ListJobsResponse(jobs=self._members),
        )

    def read_logs(self, request):
        self.asked.append((request.name, request.follow, request.tail_lines))
        if request.name not in self.outputs:
            raise NotFound("job", request.name)
        for item in self.outputs[request.name]:
            if isinstance(item, BaseException):
                raise item
            yield item


def array(*outputs):
    names = [f"{JOB}-{i}" for i in range(len(outputs))]
    return Fleet(dict(zip(names, outputs, strict=True)), names)


def request(**fields):
    return pb.StreamLogsRequest(name=JOB, **fields)


def test_each_line_is_an_object_for_programs(capsys):
    fleet = Fleet({JOB: [chunk(b"a\nb \xff\x1b[2J\n", rank=3, attempt=2, at_s=1_800_000_000), chunk(b"c", rank=4)]})
    assert log_reading.read(fleet, request(), ObjectScreen())
    told = {"job": JOB, "attempt": 2, "rank": 3, "time": "2027-01-15T08:00:00.000Z"}
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        told | {"text": "a"},
        told | {"text": "b \ufffd\x1b[2J"},
        {"job": JOB, "attempt": 1, "rank": 4, "time": None, "text": "c"},
    ]


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_all_lines_together_are_one_document(capsys, lines):
    screen = ObjectScreen(document=True)
    log_reading.read(Fleet({JOB: [chunk(b"x\n" * lines)]}), request(), screen)
    screen.close()
    assert [line["text"] for line in json.loads(capsys.readouterr().out)] == ["x"] * lines


@pytest.mark.parametrize("follow", [False, True])
def test_an_array_is_all_of_its_members_each_named(capfd, follow):
    fleet = array([chunk(b"one\n")], [chunk(b"two\n", rank=1), chunk(b"three\n", rank=1)])
    assert log_reading.read(fleet, request(follow=follow, all_ranks=True, tail_lines=5), Screen(ranks=True))
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["[sweep-0 0] one", "[sweep-1 1] three", "[sweep-1 1] two"]
    assert sorted(fleet.asked[1:]) == [(f"{JOB}-0", follow, 5), (f"{JOB}-1", follow, 5)]


def test_members_are_named_where_one_rank_of_each_is_read(capfd):
    assert log_reading.read(array([chunk(b"one\n")], [chunk(b"two\n")]), request(), Screen())
    assert capfd.readouterr().out == "[sweep-0] one\n[sweep-1] two\n"


@pytest.mark.parametrize("follow", [False, True])
def test_a_member_that_cannot_be_read_does_not_keep_the_others_back(capfd, follow):
    gone = Unavailable("the output is not complete without sites/s/nodes/a")
    assert not log_reading.read(array([gone], [chunk(b"two\n")], []), request(follow=follow), Screen())
    out, err = capfd.readouterr()
    assert out == "[sweep-1] two\n"
    assert "sweep-0: the output is not complete without sites/s/nodes/a" in err
    assert "sweep-2 is QUEUED and has printed nothing" in err


def test_what_breaks_the_reading_ends_it():
    fleet = array([BrokenPipeError()], [chunk(b"two\n")])
    with pytest.raises(BrokenPipeError):
        log_reading.read(fleet, request(follow=True), Screen())


def test_more_members_than_can_be_followed_are_refused():
    with pytest.raises(
        InvalidArgument, match=r"33 members, and 32 can .*whaleflux logs -f queues/default/jobs/sweep-0"
    ):
        log_reading.read(array(*[[]] * 33), request(follow=True), Screen())


def test_neither_a_job_nor_an_array_is_told():
    with pytest.raises(NotFound, match="sweep"):
        log_reading.read(Fleet({}), request(), Screen())
