"""One file, many jobs: how they are counted, what each is given, and how many run at a time."""

import asyncio

import pytest

from tests.support.scheduler_world import World, node
from tests.unit.test_submitting_several import FILE, Fleet, read
from whaleflux.cli import arrays, creation, submission
from whaleflux.errors import InvalidArgument, NotFound, Unavailable
from whaleflux.manifests.arrays import ArrayOf
from whaleflux.v1 import scheduler_pb2 as pb

SWEEP = """
name: sweep
run: /bin/train --lr $lr --tag ${{ matrix.lr }}-${{ array.index }}
gpus: ${{ matrix.gpus }}
array: "%2"
matrix: {lr: [1e-3, 0.5], gpus: [1, 2], fast: [true]}
environment: {MODE: sweep}
"""


@pytest.fixture
def jobs(tmp_path):
    def jobs(text, *sets):
        (tmp_path / "job.yaml").write_text(text)
        return read([str(tmp_path / "job.yaml")], sets)

    return jobs


@pytest.mark.parametrize(
    ("text", "numbers", "at_once"),
    [
        (3, (0, 1, 2), 0),
        ("2-4", (2, 3, 4), 0),
        ("0-9:4%2", (0, 4, 8), 2),
        ("1, 4, 7-8 % 3", (1, 4, 7, 8), 3),
        ("3,1-3", (3, 1, 2), 0),
        ("%5", (), 5),
    ],
)
def test_members_are_counted_as_slurm_counts_them(text, numbers, at_once, tmp_path):
    found = ArrayOf().parse(text, tmp_path)
    assert (found.numbers, found.at_once) == (numbers, at_once)


def test_each_combination_is_a_job_with_its_values(jobs):
    made = jobs(SWEEP)
    assert [one.request.job_id for one in made] == ["sweep-0", "sweep-1", "sweep-2", "sweep-3"]
    specs = [one.request.job.spec for one in made]
    assert [(s.environment["lr"], s.gpus) for s in specs] == [("1e-3", 1), ("1e-3", 2), ("0.5", 1), ("0.5", 2)]
    assert dict(specs[3].environment) == {"MODE": "sweep", "lr": "0.5", "gpus": "2", "fast": "true"}
    assert "--tag 0.5-3" in specs[3].command[-1] and "--lr $lr" in specs[3].command[-1]
    assert [(s.array.name, s.array.index, s.array.size, s.array.max_running) for s in specs[2:3]] == [
        ("sweep", 2, 4, 2)
    ]
    assert [one.request.job_id for one in jobs(SWEEP, "matrix={lr: [1, 2]}", "gpus=1", "run=/bin/x")] == ["sweep-0", "sweep-1"]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("array: 2000", "array: has 2000 members; at most 1000"),
        ("array: 0-1999", "array: has 2000 members; at most 1000"),
        ("array: 9-0", "array: '9-0' counts backwards"),
        ("array: x", "array: 'x' is neither a number nor a range"),
        ("array: 0-9%0", "array: %0 is not a number of members"),
        ("array: '%3'", "array: has no members"),
        ("array: 0", "array: has no members"),
        ("matrix: {lr: 1}", "matrix: lr must have a list of values"),
        ("matrix: {LR: [1]}", "matrix.LR: is set in environment, too"),
        ("matrix: {a: [1, 2]}\narray: 3", "array: has members of its own beside matrix"),
        (f"matrix: {{a: [{'1,' * 40}], b: [{'1,' * 40}]}}", "matrix: has 1600 combinations; at most 1000"),
        (
            "array: 2\ndata: ${{ matrix.lr }}",
            r"data: \$\{\{ matrix.lr \}\} is not known; there are array.index \(line 8\)",
        ),
        ("matrix: {lr: [1]}\ndata: ${{ matrix.l }}", r"matrix.l \}\} is not known; there are matrix.lr, array.index"),
        ("array: 2\ndata: ${{ secrets.x }}", r"data: \$\{\{ secrets.x \}\} is not known"),
        ("data: x-${{array.index}}", r"data: \$\{\{array.index\}\} is not known; it needs array or matrix in the file"),
        ("matrix: {p: [1, 2000]}\npriority: ${{ matrix.p }}", "a-1: priority: must be a whole number"),
    ],
)
def test_a_wrong_array_is_named_with_its_limit(jobs, change, words):
    with pytest.raises(InvalidArgument, match=words):
        jobs(f"{FILE}{change}\n")


def test_variables_of_an_array_are_text_as_they_are_written(jobs):
    text = "name: a\nrun: /bin/x\ngpus: 1\nenvironment: {VERSION: 1.10, DEBUG: yes, LR: '${{ matrix.lr }}'}\n"
    (first, _) = jobs(text + "matrix: {lr: [0.10, 2]}")
    assert dict(first.request.job.spec.environment) == {"VERSION": "1.10", "DEBUG": "yes", "LR": "0.10", "lr": "0.10"}
    (plain, _) = jobs("name: a\nrun: /bin/x\ngpus: 1\nenvironment: {VERSION: 1.10}\narray: 2")
    assert dict(plain.request.job.spec.environment) == {"VERSION": "1.10"}


def test_an_array_needs_a_name(jobs):
    with pytest.raises(InvalidArgument, match="name: is missing; the members of an array are called NAME-0"):
        jobs(FILE.replace("name: a\n", "") + "array: 3\n")


def test_the_scheduler_is_asked_once_about_what_is_alike_and_a_repeat_makes_the_same_requests(jobs, capsys):
    class Failing(Fleet):
        def CreateJob(self, request, timeout):
            if request.job_id == "sweep-2" and not request.validate_only:
                raise Unavailable("gone")
            return super().CreateJob(request, timeout)

    fleet, first = Failing(), jobs(SWEEP)
    submission.plan_all(fleet, first, replace=False)
    assert len(fleet.sent) == 2, "members of 1 GPU, members of 2"
    titles = [submission.title_of(alike) for _, alike in submission.plans(first)]
    assert "2 jobs alike, queues/default/jobs/sweep-0 to sweep-2, at most 2 at a time" in titles[0]
    with pytest.raises(Unavailable):
        creation.create_all(fleet, first)
    assert "3 of 4 jobs are submitted; not submitted: queues/default/jobs/sweep-2" in (said := capsys.readouterr().err)
    assert "the same command again submits the rest" in said
    again, later = Fleet(), jobs(SWEEP)
    submission.plan_all(again, later, replace=False)
    creation.create_all(again, later)
    ids = {r.job_id: r.request_id for r in again.sent[2:]}
    assert len(set(ids.values())) == 4
    assert {r.job_id: r.request_id for r in fleet.sent[2:]}.items() <= ids.items()


async def test_only_so_many_members_run_and_others_of_the_queue_pass_them():
    async with World() as world:
        await world.add(node("s/n1", 4))
        for index in range(4):
            array = pb.ArrayMember(name="sweep", index=index, size=4, max_running=2)
            await world.submit(job_id=f"sweep-{index}", array=array)
        other = await world.submit(job_id="other")
        with pytest.raises(
            NotFound, match=r"it is an array, whose members are jobs, such as queues/default/jobs/sweep-0"
        ):
            await world.job("queues/default/jobs/sweep")
        await world.reaches(other, "RUNNING")
        states = [(await world.job(f"queues/default/jobs/sweep-{n}")).state for n in range(4)]
        assert states.count(pb.JOB_STATE_RUNNING) == 2
        waiting = await world.job("queues/default/jobs/sweep-2")
        assert waiting.state_message == "waits: 2 members of sweep run, at most 2 at a time (array)"
        agent = world.agents["sites/s/nodes/n1"]
        agent.exit(task=next(task for task in agent.tasks if ".sweep-0." in task))
        await world.reaches("queues/default/jobs/sweep-2", "RUNNING")
        assert (await world.job("queues/default/jobs/sweep-3")).state == pb.JOB_STATE_QUEUED
        await asyncio.sleep(5)
        assert (await world.job("queues/default/jobs/sweep-3")).state == pb.JOB_STATE_QUEUED


async def test_a_new_leader_counts_the_members_that_run():
    async with World() as world:
        await world.add(node("s/n1", 4))
        for index in range(2):
            await world.submit(job_id=f"s-{index}", array=pb.ArrayMember(name="s", index=index, size=2, max_running=1))
        await world.reaches("queues/default/jobs/s-0", "RUNNING")
        await world.restart()
        await world.caught_up()
        await asyncio.sleep(5)
        assert (await world.job("queues/default/jobs/s-1")).state == pb.JOB_STATE_QUEUED


def made(name, array="", index=0, state=pb.JOB_STATE_RUNNING, gpus=2):
    job = pb.Job(name=f"queues/q/jobs/{name}", state=state, cost_usd=1.5)
    job.spec.gpus, job.spec.array.name, job.spec.array.index = gpus, array, index
    if state == pb.JOB_STATE_SUCCEEDED:
        job.end_time.FromSeconds(1)
    return job


class Listed:
    """A client that knows some jobs."""

    def __init__(self, *jobs):
        self.jobs, self.scheduler = {job.name: job for job in jobs}, self

    def GetJob(self, request, timeout):
        if request.name not in self.jobs:
            raise NotFound("job", request.name)
        return self.jobs[request.name]

    def ListJobs(self, request, timeout):
        return pb.ListJobsResponse(jobs=self.jobs.values())


def test_the_name_of_an_array_stands_for_its_members_and_a_jobs_own_for_itself():
    fleet = Listed(made("s-10", "s", 10), made("s-2", "s", 2), made("s-x"), made("t"))
    found = arrays.expanded(fleet, ["queues/q/jobs/s", "queues/q/jobs/t", "queues/q/jobs/none"])
    assert found == {
        "queues/q/jobs/s-2": "queues/q/jobs/s",
        "queues/q/jobs/s-10": "queues/q/jobs/s",
        "queues/q/jobs/t": "",
        "queues/q/jobs/none": "",
    }
    words = "queues/q/jobs/t, queues/q/jobs/none, all 2 members of queues/q/jobs/s"
    assert arrays.in_words(found) == words


def test_an_array_is_one_row_that_counts_all_members():
    members = [made("s-0", "s", 0, pb.JOB_STATE_SUCCEEDED), made("s-1", "s", 1), made("s-2", "s", 2)]
    other = made("t")
    row, same = arrays.grouped([members[1], other, members[2]], [*members, other])
    assert (row.name, row.state_message) == ("queues/q/jobs/s[3]", "2 RUNNING, 1 SUCCEEDED")
    assert (row.spec.gpus, row.cost_usd, same.name) == (4, 4.5, other.name)
