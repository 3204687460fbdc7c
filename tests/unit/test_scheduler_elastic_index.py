"""The running elastic jobs in the orders in which they give and gain, kept as jobs change: always as if they were sorted anew."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from whaleflux_scheduler.core import elastic, resize
from whaleflux_scheduler.core.elastic_index import ElasticIndex
from whaleflux_scheduler.core.model import Attempt, Claim, ClaimPurpose, Job, JobState, Spec, Task, TaskPhase

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def running(number, gpus, least, most, priority=0, *, claims=False, epoch=1):
    spec = Spec(command=("x",), gpus=gpus, elastic_min=least, elastic_max=most, priority=priority)
    task = Task("t", "n", tuple(f"{number}-{at}" for at in range(gpus)), 0, 0, TaskPhase.RUNNING)
    attempt = Attempt(epoch, (task,), NOW, run_time=NOW)
    claim = Claim((("n", ("u",)),), (), NOW, ClaimPurpose.RESIZE) if claims else None
    return Job(f"queues/q/jobs/{number}", spec, JobState.RUNNING, NOW, epoch=epoch, attempt=attempt, claim=claim)


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(1, 8), st.integers(0, 4), st.integers(0, 2), st.booleans(), st.integers(0, 3)
    ),
    max_size=20,
)


@given(CHANGES)
def test_orders_and_sums_are_those_of_all_that_run(changes):
    index, jobs = ElasticIndex(), {}
    for number, gpus, more, priority, claims, epoch in changes:
        job = running(number, gpus, max(1, gpus - more), gpus + more, priority, claims=claims, epoch=epoch)
        if epoch:
            jobs[job.name] = job
            index.learn(job)
        else:
            jobs.pop(job.name, None)
            index.learn(replace(job, state=JobState.SUSPENDING))
    free = {name: job for name, job in jobs.items() if job.claim is None}
    extra = {name: job.attempt.gpus - elastic.least(job.spec) for name, job in free.items()}
    givers = [job.name for job in index.givers()]
    assert sorted(givers) == sorted(name for name in extra if extra[name])
    assert [jobs[name].spec.priority for name in givers] == sorted(jobs[name].spec.priority for name in givers)
    gainers = [job.name for job in index.gainers()]
    rises = {name: resize.marginal(job, job.attempt.gpus) for name, job in free.items()}
    assert gainers == sorted(
        (name for name in free if rises[name]), key=lambda name: (-jobs[name].spec.priority, -rises[name], name)
    )
    for priority in range(3):
        lower = [job for job in jobs.values() if job.spec.priority <= priority]
        assert index.spare(priority) == sum(extra.get(job.name, 0) for job in lower)
        assert index.part(priority, 7) == (sum(job.attempt.gpus for job in lower) + 7) // (len(lower) + 1)


def test_who_sleeps_is_not_asked_before_that_is_over_or_its_record_changes():
    index = ElasticIndex()
    jobs = [running(number, 2, 1, 8) for number in range(3)]
    for job in jobs:
        index.learn(job)
    index.sleep(jobs[0].name, NOW.timestamp() + 60)
    index.sleep(jobs[1].name, NOW.timestamp() + 60)
    assert [job.id for job in index.gainers()] == ["2"]
    index.learn(replace(jobs[1], step=7))
    assert [job.id for job in index.gainers()] == ["1", "2"]
    later = (NOW + timedelta(seconds=60)).timestamp()
    assert index.wakes_s <= later
    assert index.wake(later)
    assert [job.id for job in index.gainers()] == ["0", "1", "2"]
    assert not index.wake(later), "nobody sleeps any more"
    index.sleep(jobs[0].name, later + 60)
    index.forget(jobs[0].name)
    assert [job.id for job in index.gainers()] == ["1", "2"]
