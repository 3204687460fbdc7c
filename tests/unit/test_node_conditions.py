"""What a job asks of its nodes beside their GPUs: labels, a local NVMe disk, no spot machines."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.scheduler_world import node, plan_with_queues
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.model import Disk, Price, PriceKind
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, tzinfo=UTC)
NODES = (
    replace(node("s/spot", usd=0.1), price=Price(PriceKind.SPOT, 0.1), labels=(("pool", "research"),)),
    node("s/plain"),
    replace(node("s/good"), labels=(("pool", "research"), ("rack", "r7")), disks=(Disk("/d", 10**12),)),
)


def file(nodes, gpus=2):
    return f"name: j\nrun: x\ngpus: {gpus}\nnodes: {nodes}\n"


def decided(text, *machines):
    plan = plan_with_queues()
    plan.apply(News(nodes=machines, closed=dict.fromkeys((machine.name for machine in machines), "")))
    job = Job("queues/q/jobs/j", spec_of(job_from_yaml(text, Path()).spec), JobState.QUEUED, NOW)
    plan.apply(News(candidates={job.name: Candidate(job)}))
    (move,) = plan.decide(NOW)
    plan.check()
    return move


@pytest.mark.parametrize(
    ("gpus", "change"),
    [(2, "would fit without nodes.labels, nodes.nvme and nodes.spot"), (0, "")],
    ids=["GPUs", "CPUs"],
)
@pytest.mark.parametrize(
    ("nodes", "lacks"),
    [
        ("{labels: {rack: r7}}", "label rack=r7"),
        ("{nvme: true}", "NVMe"),
        ("{labels: {pool: research}, spot: never}", "label pool=research, a price that is not spot"),
    ],
    ids=["labels", "nvme", "spot"],
)
def test_only_nodes_that_have_it_will_do_and_who_waits_is_told(nodes, lacks, gpus, change):
    move = decided(file(nodes, gpus), *NODES)
    assert {task.node for task in move.decision.tasks} == {"sites/s/nodes/good"}
    waits = decided(file(nodes, gpus), *NODES[:2])
    assert waits.assignment is None
    assert (f"without {lacks}", 2) in waits.decision.exclusions
    assert waits.decision.smallest_change == change


def test_who_asks_for_nothing_may_be_anywhere():
    assert decided(file("{max: 1, spot: any}"), *NODES[:1]).assignment is not None


@pytest.mark.parametrize(
    ("nodes", "field"),
    [
        ("{labels: [pool]}", "nodes.labels"),
        ("{labels: {'a b': c}}", "nodes.labels"),
        ("{labels: {pool: [a]}}", "nodes.labels.pool"),
        ("{labels: {pool: '" + "x" * 200 + "'}}", "nodes.labels[pool]"),
        ("{nvme: much}", "nodes.nvme"),
        ("{spot: maybe}", "nodes.spot"),
    ],
)
def test_nonsense_is_refused_by_field(nodes, field):
    with pytest.raises(InvalidArgument) as refused:
        job_from_yaml(file(nodes), Path())
    assert field in [violation.field for violation in refused.value.violations]
