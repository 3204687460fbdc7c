"""Reconciliation: the rules of seams between desired and actual, by example and by random histories."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whaleflux.manifests.job_fields import Spec
from whaleflux_agent.core.reconcile import Accept, Forget, Refuse, Start, Stop, blockers, reconcile, rejection_reason
from whaleflux_agent.core.work import ActualTask, Stage, Work

JOB = "queues/q/jobs/j"


def want(task="j-1-0", *, job=JOB, epoch=1, gpus=("GPU-0",), start=True, rendezvous="h:1", group_rank=0):
    return Work(
        task, job, epoch, gpus, start=start, rendezvous=rendezvous, group_rank=group_rank, spec=Spec(command=("x",))
    )


def have(stage, task="j-1-0", *, job=JOB, epoch=1, gpus=("GPU-0",)):
    return ActualTask(task, job, epoch, gpus, stage)


def act(wants=(), haves=(), epochs=None, *, fresh=True):
    return reconcile({w.task: w for w in wants}, {h.task: h for h in haves}, epochs or {}, fresh=fresh)


def test_new_work_is_accepted_and_then_started():
    assert act([want()]) == [Accept("j-1-0")]
    assert act([want()], [have(Stage.ACCEPTED)]) == [Start("j-1-0")]
    assert act([want()], [have(Stage.RUNNING)]) == []


def test_nothing_starts_before_it_may():
    assert act([want(start=False)], [have(Stage.ACCEPTED)]) == []
    assert act([want(rendezvous="", group_rank=1)], [have(Stage.ACCEPTED)]) == []
    assert act([want(rendezvous="", group_rank=0)], [have(Stage.ACCEPTED)]) == [Start("j-1-0")]


@pytest.mark.parametrize("stage", [Stage.ACCEPTED, Stage.LAUNCHING, Stage.RUNNING])
def test_what_is_not_desired_stops(stage):
    (action,) = act([], [have(stage)])
    assert action == Stop("j-1-0", "no longer desired")


@pytest.mark.parametrize("stage", list(Stage))
def test_of_a_job_that_the_control_plane_cannot_read_everything_stays_as_it_is(stage):
    actual = {"j-1-0": have(stage), "k-1-0": have(Stage.RUNNING, "k-1-0", job="queues/q/jobs/k")}
    assert reconcile({}, actual, {JOB: 2}, fresh=True, left_alone={JOB}) == [Stop("k-1-0", "no longer desired")]


def test_results_are_forgotten_when_nobody_wants_them():
    assert act([], [have(Stage.ENDED)]) == [Forget("j-1-0")]
    assert act([want()], [have(Stage.ENDED)]) == []
    assert act([], [have(Stage.STOPPING)]) == []


def test_an_older_epoch_is_refused_and_a_running_one_stops():
    assert isinstance(act([want(epoch=2, task="j-2-0")], epochs={JOB: 3})[0], Refuse)
    stop, accept = act([want(epoch=2, task="j-2-0")], [have(Stage.RUNNING)])
    assert isinstance(stop, Stop)
    assert "epoch 1 is over" in stop.reason
    assert accept == Accept("j-2-0")


def test_of_two_desired_epochs_only_the_newer_is_taken():
    actions = act([want(), want(epoch=2, task="j-2-0")])
    assert [type(action) for action in actions] == [Refuse, Accept]
    assert actions[1] == Accept("j-2-0")


def test_the_next_epoch_waits_until_the_one_before_is_reaped():
    new = want(epoch=2, task="j-2-0", gpus=("GPU-5",))
    assert act([new], [have(Stage.STOPPING), have(Stage.ACCEPTED, "j-2-0", epoch=2, gpus=("GPU-5",))]) == []
    assert Start("j-2-0") in act([new], [have(Stage.ENDED), have(Stage.ACCEPTED, "j-2-0", epoch=2, gpus=("GPU-5",))])


def test_a_gpu_that_another_task_holds_blocks_the_start():
    other = want("o-1-0", job="queues/q/jobs/o", gpus=("GPU-0", "GPU-1"))
    holder = have(Stage.STOPPING)
    assert blockers(other, [holder]) == ["j-1-0"]
    assert act([want(), other], [holder, have(Stage.ACCEPTED, "o-1-0", job=other.job, gpus=("GPU-0", "GPU-1"))]) == []


def test_of_two_that_want_one_gpu_only_the_first_starts():
    other = want("o-1-0", job="queues/q/jobs/o")
    accepted = [have(Stage.ACCEPTED), have(Stage.ACCEPTED, "o-1-0", job=other.job)]
    assert act([want(), other], accepted) == [Start("j-1-0")]


def test_nothing_new_begins_before_the_control_plane_has_spoken():
    assert act([want()], fresh=False) == []
    assert act([want()], [have(Stage.ACCEPTED)], fresh=False) == []
    assert act([], [have(Stage.ENDED)], fresh=False) == []
    assert act([], [have(Stage.RUNNING)], fresh=False) == [Stop("j-1-0", "no longer desired")]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"gpu_uuids": ("GPU-7",)}, "GPU-7"),
        ({"gpu_uuids": ("GPU-0", "GPU-0")}, "once"),
        ({"gpu_uuids": ()}, "at least one"),
        ({"image": "i"}, "container engine"),
        ({"runtimes": ()}, "only senses"),
        ({"command": ()}, "neither"),
        ({"first_rank": 3}, "do not fit"),
    ],
)
def test_what_a_node_can_never_run_is_named(changes, word):
    fields = {"gpu_uuids": ("GPU-0",), "command": ("x",), "image": "", "world_size": 1, **changes}
    runtimes = fields.pop("runtimes", {"process"})
    spec = Spec(command=fields.pop("command"), image=fields.pop("image"))
    found = rejection_reason(Work("t", JOB, 1, spec=spec, **fields), {"GPU-0", "GPU-1"}, runtimes)
    assert word in found
    assert bool(found) == bool(word)


class Node(RuleBasedStateMachine):
    """A node that does what it is told while desires, restarts and ends come in any order."""

    def __init__(self):
        super().__init__()
        self.desired, self.actual, self.epochs, self.fresh = {}, {}, {}, True
        self.started = []

    @rule(
        job=st.sampled_from("ab"),
        epoch=st.integers(1, 4),
        gpus=st.sampled_from([("GPU-0",), ("GPU-1",), ("GPU-0", "GPU-1")]),
        start=st.booleans(),
    )
    def desire(self, job, epoch, gpus, start):
        task = f"{job}-{epoch}-0"
        known = self.desired.get(task) or self.actual.get(task)  # a task keeps its GPUs
        gpus = known.gpu_uuids if known else gpus
        self.desired[task] = want(task, job=job, epoch=epoch, gpus=gpus, start=start)

    @precondition(lambda self: self.desired)
    @rule(data=st.data())
    def remove(self, data):
        del self.desired[data.draw(st.sampled_from(sorted(self.desired)))]

    @rule()
    def restart(self):
        """What was only accepted is known from disk; what runs is adopted; the control plane has not spoken yet."""
        self.fresh = False

    @rule()
    def hear(self):
        self.fresh = True

    @precondition(lambda self: any(h.stage.holds for h in self.actual.values()))
    @rule(data=st.data())
    def end(self, data):
        task = data.draw(st.sampled_from(sorted(t for t, h in self.actual.items() if h.stage.holds)))
        self.stage(task, Stage.ENDED)

    @rule()
    def act(self):
        for action in reconcile(self.desired, self.actual, self.epochs, fresh=self.fresh):
            self.perform(action)

    def perform(self, action):
        match action:
            case Accept(task):
                work = self.desired[task]
                assert work.epoch >= self.epochs.get(work.job, 0)
                self.epochs[work.job] = work.epoch
                self.actual[task] = ActualTask(task, work.job, work.epoch, work.gpu_uuids, Stage.ACCEPTED)
            case Refuse(task, _):
                work = self.desired[task]
                assert work.epoch < max(
                    self.epochs.get(work.job, 0), *(w.epoch for w in self.desired.values() if w.job == work.job)
                )
                self.actual[task] = ActualTask(task, work.job, work.epoch, work.gpu_uuids, Stage.REFUSED)
            case Start(task):
                assert self.fresh
                assert self.desired[task].start
                assert self.actual[task].epoch == self.epochs[self.actual[task].job]
                self.stage(task, Stage.RUNNING)
            case Stop(task, _):
                assert task not in self.desired or self.actual[task].epoch < max(
                    self.epochs.get(self.actual[task].job, 0),
                    *(w.epoch for w in self.desired.values() if w.job == self.actual[task].job),
                )
                self.stage(task, Stage.ENDED if self.actual[task].stage is Stage.ACCEPTED else Stage.STOPPING)
            case Forget(task):
                assert task not in self.desired
                del self.actual[task]

    def stage(self, task, stage):
        old = self.actual[task]
        self.actual[task] = ActualTask(old.task, old.job, old.epoch, old.gpu_uuids, stage)

    @invariant()
    def no_gpu_has_two_holders(self):
        held = [gpu for h in self.actual.values() if h.stage.holds for gpu in h.gpu_uuids]
        assert len(held) == len(set(held))

    @invariant()
    def no_job_runs_in_two_epochs(self):
        jobs = [h.job for h in self.actual.values() if h.stage.holds]
        assert len(jobs) == len(set(jobs))

    @invariant()
    def it_comes_to_rest(self):
        """From any state, repeated rounds reach one in which nothing is left to do but wait for processes to end."""
        if not self.fresh:
            return
        saved = (dict(self.desired), dict(self.actual), dict(self.epochs))
        for _ in range(20):
            actions = reconcile(self.desired, self.actual, self.epochs, fresh=True)
            for action in actions:
                self.perform(action)
            for task, known in list(self.actual.items()):
                if known.stage is Stage.STOPPING:
                    self.stage(task, Stage.ENDED)
            if not actions:
                break
        else:
            raise AssertionError("never comes to rest")
        running = {t for t, h in self.actual.items() if h.stage is Stage.RUNNING}
        assert running <= set(self.desired)
        self.desired, self.actual, self.epochs = saved


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
