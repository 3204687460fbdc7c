"""From files and options to jobs: what is changed on the way, what is refused before anything is sent, and who takes whose place."""

import itertools
from concurrent import futures
from types import SimpleNamespace

import pytest

from tests.support.scheduler_world import USER, World, node, until
from whaleflux.cli import creation, submission, submit_commands
from whaleflux.cli.output import Format
from whaleflux.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from whaleflux.rpc import auth
from whaleflux.v1 import scheduler_pb2 as pb

FILE = "name: a\nrun: /bin/train\ngpus: 2\ngpu: H200\ncheckpoint: {every: 100}\nenvironment: {LR: '0.1'}\n"


@pytest.fixture
def write(tmp_path):
    def write(text=FILE, name="job.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def read(files, sets=(), name=None, gpus=None, env=()):
    return submission.read_all(files, submission.overrides_of(sets, name, gpus, env))


def test_options_change_fields_as_the_file_names_them(write, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/models")
    sets = ["checkpoint.every=50", "checkpoint.keep=7", "gpu={any: [A100-80GB], memory: '>= 80 GB'}", "priority=5"]
    (one,) = read([write()], sets, "b", 4, ["LR=1e-4", "HF_HOME", "EMPTY="])
    spec = one.request.job.spec
    assert (one.name, spec.gpus, spec.priority) == ("queues/default/jobs/b", 4, 5)
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep) == (50, 7)
    assert list(spec.gpu.any_of) == ["A100-80GB"] and spec.gpu.min_memory_bytes == 80 * 10**9
    assert dict(spec.environment) == {"LR": "1e-4", "HF_HOME": "/models", "EMPTY": ""}
    (less,) = read([write()], ["checkpoint=null", "gpu="])
    assert not less.request.job.spec.checkpoint.every_steps and not less.request.job.spec.gpu.any_of


def test_a_changed_variable_is_text_as_it_is_written_and_so_are_those_beside_it(write):
    file = write("run: /bin/x\ngpus: 1\nenvironment: {VERSION: 1.10, OLD: 1}\n")
    (one,) = read([file], ["environment.DEBUG=yes", "environment.SEED=010", "environment.OLD=2.50"], env=["LR=1"])
    changed = {"DEBUG": "yes", "SEED": "010", "OLD": "2.50", "LR": "1"}
    assert dict(one.request.job.spec.environment) == {"VERSION": "1.10", **changed}
    (other,) = read([write("run: /bin/x\ngpus: 1\n")], ["environment={A: 1.0}", "environment.B=2"])
    assert dict(other.request.job.spec.environment) == {"A": "1.0", "B": "2"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": ""}, "--name: is empty; give a name, or leave the option out"),
        ({"sets": ["gpus"]}, "--set: 'gpus' is not FIELD=VALUE"),
        ({"sets": ["gpus=many"]}, "gpus: must be a whole number"),
        ({"sets": ["gpuz=1"]}, "gpuz: is not a field; did you mean"),
        ({"sets": ["gpu.memory=80 GB"]}, "--set gpu.memory: gpu is text in the file; set all of it: --set 'gpu={memory: ...}'"),
        ({"sets": ["gpu={"]}, "--set gpu: is not YAML"),
        ({"env": ["NOT_SET_ANYWHERE"]}, "--env: NOT_SET_ANYWHERE is not set here"),
        ({"env": ["RANK=1"]}, "RANK.*is set for each rank by the agent"),
        ({"gpus": 0, "sets": ["gpus=-1"]}, "gpus"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(write, options, words):
    if options.get("gpus") == 0:
        options = {"sets": options["sets"]}
    with pytest.raises(InvalidArgument, match=words):
        read([write()], **options)


def test_a_file_holds_several_jobs_and_each_mistake_is_told_with_its_place(write):
    text = "\n---\n".join([FILE, FILE.replace("name: a", "name: b"), "# nothing\n"])
    assert [one.request.job_id for one in read([write(text)])] == ["a", "b"]
    wrong = write(text.replace("name: b", "name: b\nprioritie: 3"), "wrong.yaml")
    with pytest.raises(InvalidArgument, match=r"wrong\.yaml: job 2: prioritie: is not a field") as found:
        read([write(FILE.replace("gpus: 2", "gpus: x"), "other.yaml"), wrong])
    assert len(found.value.violations) == 2
    with pytest.raises(InvalidArgument, match="'c' is given to 2 jobs"):
        read([write(text)], name="c")


class Fleet:
    """A client whose scheduler answers as a test says."""

    def __init__(self, *answers):
        self.sent, self.answers, self.old, self.cancelled = [], list(answers), [], 0
        self.scheduler = self

    def CreateJob(self, request, timeout):
        copy = pb.CreateJobRequest()
        copy.CopyFrom(request)
        self.sent.append(copy)
        answer = self.answers.pop(0) if self.answers and not request.validate_only else None
        if answer is not None:
            raise answer
        return pb.Job(name=f"queues/default/jobs/{request.job_id}", spec=request.job.spec)

    def GetJob(self, request, timeout):
        if isinstance(self.old, dict):
            return self.old[request.name]
        if not self.old:
            raise NotFound("job", request.name)
        return self.old.pop(0) if len(self.old) > 1 else self.old[0]

    def CancelJob(self, request, timeout):
        self.cancelled += 1


def test_all_are_checked_before_the_first_is_sent(write):
    class Refusing(Fleet):
        def CreateJob(self, request, timeout):
            if request.job_id == "b":
                raise InvalidArgument(FieldViolation("data", "is not declared"))
            return super().CreateJob(request, timeout)

    fleet = Refusing()
    jobs = read([write(FILE + "---\n" + FILE.replace("name: a", "name: b"))])
    with pytest.raises(InvalidArgument, match="queues/default/jobs/b: data: is not declared"):
        submission.plan_all(fleet, jobs, replace=False)
    assert all(sent.validate_only for sent in fleet.sent)


def test_a_name_that_is_taken_is_refused_before_a_plan_is_made(write, capsys):
    fleet = Fleet()
    jobs = read([write(FILE + "---\n" + FILE.replace("name: a", "name: b"))])
    submission.refuse_taken(fleet, jobs, dry_run=False)
    fleet.old = [pb.Job(name="queues/default/jobs/a")]
    with pytest.raises(
        AlreadyExists, match=r"jobs/a' exists already; so do queues/default/jobs/b; .*--replace.*--name"
    ):
        submission.refuse_taken(fleet, jobs, dry_run=False)
    assert fleet.sent == []
    submission.refuse_taken(fleet, jobs, dry_run=True)
    assert "exists already" in capsys.readouterr().err


def test_members_of_an_array_and_jobs_without_a_name_are_not_looked_for(write):
    fleet = Fleet()
    fleet.old = [pb.Job(name="queues/default/jobs/sweep-0")]
    jobs = read([write(FILE.replace("name: a", "name: sweep\narray: 0-2") + "---\nrun: /bin/x\ngpus: 1\n")])
    submission.refuse_taken(fleet, jobs, dry_run=False)


def test_jobs_of_one_command_may_wait_for_one_another(write):
    fleet = Fleet()
    jobs = read([write(FILE + "---\n" + FILE.replace("name: a", "name: b\ndepends_on: [a]"))])
    submission.plan_all(fleet, jobs, replace=False)
    assert list(fleet.sent[1].submitted_before) == ["queues/default/jobs/a"]
    creation.create_all(fleet, jobs)
    assert [(sent.job_id, list(sent.submitted_before)) for sent in fleet.sent[2:]] == [("a", []), ("b", [])]


def test_jobs_of_one_command_are_sent_after_those_that_they_depend_on(write):
    texts = ["c\ndepends_on: [b, elsewhere/x]", "a", "b\ndepends_on: {job: default/a, when: ended}"]
    jobs = read([write("---\n".join(FILE.replace("name: a", f"name: {text}") for text in texts))])
    assert [one.request.job_id for one in jobs] == ["a", "b", "c"]
    circle = [FILE.replace("name: a", f"name: {name}\ndepends_on: {other}") for name, other in ("ab", "ba")]
    with pytest.raises(InvalidArgument, match="in a circle: queues/default/jobs/"):
        read([write("---\n".join(circle))])


def test_an_array_is_sent_before_what_depends_on_it(write):
    after = FILE.replace("name: a", "name: after\ndepends_on: sweep")
    jobs = read([write(after + "---\n" + FILE.replace("name: a", "name: sweep\narray: 0-2"))])
    assert [one.request.job_id for one in jobs] == ["sweep-0", "sweep-1", "sweep-2", "after"]


@pytest.mark.parametrize("order", [("prep", "train"), ("train", "prep")])
def test_each_job_of_a_folder_goes_with_the_code_that_it_needs_and_no_other(write, tmp_path, order):
    (tmp_path / "train.py").write_text("print(1)")
    texts = {
        "prep": FILE.replace("name: a", "name: prep\ndirectory: /data"),
        "train": FILE.replace("name: a", "name: train").replace("/bin/train", "python train.py"),
    }
    fleet, jobs = Fleet(), read([write("---\n".join(texts[name] for name in order))])
    submission.plan_all(fleet, jobs, replace=False)
    assert {one.request.job_id: bool(one.request.job.spec.code) for one in jobs} == {"prep": False, "train": True}


def test_ctrl_c_among_the_members_of_an_array_does_not_call_unsubmitted_what_is_there(write, monkeypatch, capsys):
    jobs = read([write(FILE.replace("name: a", "name: sweep\narray: 0-3"))])
    fleet = Fleet()
    submission.plan_all(fleet, jobs, replace=False)
    wait, calls = futures.wait, itertools.count()

    def interrupted(asked, timeout=None):
        if not next(calls):
            raise KeyboardInterrupt
        return wait(asked, timeout)

    monkeypatch.setattr(futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        creation.create_all(fleet, jobs)
    told = capsys.readouterr().err
    assert "4 of 4 jobs are submitted; not submitted:" not in told and "4 of 4 jobs are submitted" in told


def test_what_is_there_when_it_breaks_off_is_said(write, capsys):
    jobs = read([write(FILE + "---\n" + FILE.replace("name: a", "name: b"))])
    fleet = Fleet(None, Unavailable("the store does not answer"))
    submission.plan_all(fleet, jobs, replace=False)
    with pytest.raises(Unavailable):
        creation.create_all(fleet, jobs)
    assert "1 of 2 jobs are submitted; not submitted: queues/default/jobs/b" in capsys.readouterr().err


def test_replacing_cancels_waits_and_takes_the_place(write, monkeypatch):
    monkeypatch.setattr(creation, "time", SimpleNamespace(sleep=lambda _: None, monotonic=itertools.count().__next__))
    running, ended = pb.Job(name="queues/default/jobs/a", etag='"1"', step=7), pb.Job(etag='"2"')
    ended.end_time.FromSeconds(1)
    fleet = Fleet(
        FailedPrecondition("not ended", reason="JOB_NOT_ENDED"),
        FailedPrecondition("holds GPUs", reason="GPUS_HELD"),
        Aborted("changed"),
    )
    fleet.old = [running, running, ended]
    jobs = read([write()])
    submission.plan_all(fleet, jobs, replace=True)
    assert "at step 7): it is cancelled first" in submission.replaces_line(jobs[0])[0]
    creation.create_all(fleet, jobs)
    assert fleet.cancelled == 1
    assert [sent.replaces for sent in fleet.sent[1:]] == ['"1"', '"2"', '"2"', '"2"']
    with pytest.raises(InvalidArgument, match="--replace: needs a job with a name"):
        submission.plan_all(fleet, read([write(FILE.replace("name: a\n", ""))]), replace=True)


@pytest.mark.parametrize(
    ("names", "faults", "said"),
    [
        ("a", [Unavailable("away")], "queues/default/jobs/a is cancelled, and nothing has its place yet; the same command again goes on"),
        (
            "ab", [None, Unavailable("away")],
            "1 of 2 jobs are submitted; not submitted: queues/default/jobs/b; of these cancelled already: queues/default/jobs/b; the same command",
        ),
    ],
)  # fmt: skip
def test_replacing_that_breaks_off_says_what_was_cancelled_for_nothing(write, capsys, names, faults, said):
    fleet = Fleet(*faults)
    fleet.old = [pb.Job(name="queues/default/jobs/a", etag='"1"')]
    jobs = read([write("---\n".join(FILE.replace("name: a", f"name: {name}") for name in names))])
    submission.plan_all(fleet, jobs, replace=True)
    with pytest.raises(Unavailable):
        creation.create_all(fleet, jobs)
    assert said in capsys.readouterr().err


def replacing(fleet, jobs):
    submission.plan_all(fleet, jobs, replace=True)
    return creation.create_all(fleet, jobs)


def there(jobs, **more):
    """The jobs as they are there after the command."""
    return [pb.Job(name=one.name, etag='"1"', spec=one.request.job.spec, step=-1, **more) for one in jobs]


def test_the_same_file_again_replaces_nothing_that_has_not_ended(write, capsys):
    fleet, file = Fleet(), write(FILE + "---\n" + FILE.replace("name: a", "name: b"))
    first = read([file])
    replacing(fleet, first)
    ended = there(first[1:])[0]
    ended.end_time.FromSeconds(1)
    fleet.old, fleet.sent = {one.name: one for one in (*there(first[:1]), ended)}, []
    jobs = read([file])
    made = replacing(fleet, jobs)
    assert [job.name for job in made] == [one.name for one in first] and fleet.cancelled == 0
    assert [sent.job_id for sent in fleet.sent if not sent.validate_only] == ["b"], "it has ended: it runs again"
    assert submission.replaces_line(jobs[0]) == [
        "  replaces   nothing: queues/default/jobs/a (UNSPECIFIED) is what the file and its folder ask for, and stays"
    ]
    submit_commands.show_made(made, jobs, Format.table)
    said = capsys.readouterr().err
    assert "queues/default/jobs/a stays: there already, not ended" in said
    assert "submitted queues/default/jobs/b in place of the one that was" in said


@pytest.mark.parametrize("same", [True, False])
def test_the_same_array_again_after_it_was_replaced_finds_its_members(write, same):
    fleet = Fleet(*[AlreadyExists("job", f"queues/default/jobs/a-{n}", "it was replaced") for n in range(2)])
    file = write(FILE + "array: 2\n")
    members = there(read([file]))
    for member in members:
        member.spec.gpus += not same
    fleet.old = {member.name: member for member in members}
    jobs = read([file])
    submission.plan_all(fleet, jobs, replace=False)
    if same:
        assert creation.create_all(fleet, jobs) == members
    else:
        with pytest.raises(AlreadyExists):
            creation.create_all(fleet, jobs)


@pytest.mark.parametrize("change", [{"cancel_requested": True}, {"spec": pb.JobSpec(gpus=1)}])
def test_what_is_on_its_way_out_or_other_than_the_file_is_replaced(write, change):
    jobs, fleet = read([write()]), Fleet()
    (old,) = there(jobs)
    for field, value in change.items():
        old.ClearField(field)
        old.MergeFrom(pb.Job(**{field: value}))
    fleet.old = [old]
    submission.plan_all(fleet, jobs, replace=True)
    assert (jobs[0].kept, jobs[0].replaced) == (None, old)


def test_whose_place_may_not_be_taken_is_said_before_anything_is_cancelled(write):
    class Owned(Fleet):
        def CreateJob(self, request, timeout):
            if request.validate_only and request.replaces == '"b"':
                raise PermissionDenied("queues/default/jobs/b is ada's")
            return super().CreateJob(request, timeout)

    fleet = Owned()
    fleet.old = {
        f"queues/default/jobs/{name}": pb.Job(name=f"queues/default/jobs/{name}", etag=f'"{name}"') for name in "ab"
    }
    with pytest.raises(PermissionDenied):
        replacing(fleet, read([write(FILE + "---\n" + FILE.replace("name: a", "name: b"))]))
    assert fleet.cancelled == 0 and all(sent.validate_only for sent in fleet.sent)


async def test_a_dry_run_asks_whether_the_place_may_be_taken():
    async with World() as world:
        await world.add(node("s/n1"))
        members = [f"users/{name}" for name in ("ada", "eve")]
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=pb.Queue(members=members)), None)
        await until(lambda: "q" in world.service.jobs.access.queues(), "it is known")
        job = pb.Job(spec=pb.JobSpec(command=["x"], gpus=1))

        async def asked(who, etag=""):
            request = pb.CreateJobRequest(
                parent="queues/q", job_id="hers", job=job, replaces=etag, validate_only=bool(etag)
            )
            with auth.acting_as(auth.Identity("user", who)):
                return await world.scheduler.CreateJob(request, None)

        made = await asked("ada")
        hers = await world.reaches(made.name, "RUNNING")
        assert (await asked("ada", hers.etag)).decision.summary
        with pytest.raises(PermissionDenied):
            await asked("eve", hers.etag)
        with pytest.raises(Aborted):
            await asked("ada", made.etag)


async def test_the_new_job_takes_the_records_place_in_one_step_and_runs():
    async with World() as world:
        await world.add(node("s/n1"))
        name = await world.submit(job_id="again")
        old = await world.reaches(name, "RUNNING")

        async def replaced(etag):
            job = pb.Job(spec=pb.JobSpec(command=["python", "new.py"], gpus=1))
            request = pb.CreateJobRequest(
                parent="queues/default", job_id="again", job=job, replaces=etag, request_id="r"
            )
            with auth.acting_as(USER):
                return await world.scheduler.CreateJob(request, None)

        async def free():
            return not await world.held_on("sites/s/nodes/n1")

        with pytest.raises(FailedPrecondition, match="cancel it first"):
            await replaced(old.etag)
        with auth.acting_as(USER):
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
        await world.caught_up()
        with pytest.raises(Aborted):
            await replaced(old.etag)
        await until(free)
        ended = await world.reaches(name, "CANCELLED")
        new = await replaced(ended.etag)
        assert (new.uid != old.uid, list(new.spec.command)) == (True, ["python", "new.py"])
        assert (await replaced(ended.etag)).uid == new.uid, "a request that is sent again has done it"
        again = await world.reaches(name, "RUNNING")
        assert again.epoch > old.epoch and not again.past_attempts
