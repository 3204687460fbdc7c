"""The simulator: the production planner under a virtual clock."""

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.unit.fleets import node
from whaleflux.errors import InvalidArgument
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.model import JobState, Queue
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.__main__ import main
from whaleflux_scheduler.simulation.cluster_file import cluster_of
from whaleflux_scheduler.simulation.records import Series
from whaleflux_scheduler.simulation.results import summary_of
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, NodeEvent, Submission, Workload

HOUR = 3600.0


def job(name, at_s=0.0, run_s=HOUR, *, queue="a", **spec):
    return Submission(f"queues/{queue}/jobs/{name}", Spec(command=("true",), **{"gpus": 8, **spec}), at_s, run_s)


def simulated(jobs, *, nodes=1, delays=None, queues=None, events=(), until_s=math.inf):
    fleet = [node(f"n{at}") for at in range(nodes)]
    workload = Workload(jobs, queues or {}, delays or Delays(save_s=30.0, restart_s=60.0))
    return Simulation(fleet, workload, events=events).run(until_s)


def by_name(result):
    return {outcome.name.rpartition("/")[2]: outcome for outcome in result.outcomes}


def test_jobs_that_do_not_fit_together_run_one_after_the_other():
    result = simulated([job("one"), job("two", at_s=60.0)])
    one, two = by_name(result)["one"], by_name(result)["two"]
    assert (one.start_s, one.end_s) == (0.0, HOUR)
    assert (two.start_s, two.end_s, two.wait_s) == (HOUR, 2 * HOUR, HOUR - 60.0)
    assert result.end_s == 2 * HOUR
    assert result.held.total == 16 * HOUR


def test_a_start_takes_its_delay_and_holds_the_gpus_meanwhile():
    result = simulated([job("one"), job("two")], delays=Delays(start_s=20.0))
    assert [outcome.end_s for outcome in result.outcomes] == [HOUR + 20.0, 2 * (HOUR + 20.0)]


def test_a_preempted_job_saves_leaves_and_goes_on_where_it_was():
    result = simulated([job("low"), job("high", at_s=600.0, priority=100)])
    low, high = by_name(result)["low"], by_name(result)["high"]
    assert high.start_s == 630.0  # when the other had saved
    assert low.suspensions == 1
    assert low.end_s == high.end_s + 60.0 + (HOUR - 600.0)  # what was left, and loading the checkpoint
    assert all(outcome.state is JobState.SUCCEEDED for outcome in result.outcomes)


def test_it_ends_with_the_last_job_whatever_was_expected_once():
    result = simulated([job("low", run_s=601.0), job("high", at_s=600.0, run_s=10.0, priority=100)])
    assert result.end_s == 630.0 + 10.0 + 60.0 + 1.0  # the claim would have expired later


def test_a_checkpoint_that_takes_longer_than_the_grace_is_lost():
    result = simulated([job("low"), job("high", at_s=600.0, priority=100)], delays=Delays(save_s=300.0, restart_s=0.0))
    low, high = by_name(result)["low"], by_name(result)["high"]
    assert high.start_s == 630.0  # its grace is 30 s
    assert low.end_s == high.end_s + HOUR


def test_the_loss_of_a_node_costs_what_was_not_saved_and_the_job_goes_elsewhere():
    delays = Delays(checkpoint_every_s=600.0, restart_s=0.0, recover_s=5.0)
    down = NodeEvent(1500.0, "down", ("sites/a/nodes/n0",))
    result = simulated([job("one")], nodes=2, delays=delays, events=[down])
    (one,) = result.outcomes
    assert one.recoveries == 1
    assert one.end_s == 1505.0 + HOUR - 1200.0


def test_a_closed_node_takes_work_again_when_it_is_back():
    events = [NodeEvent(0.0, "drain", ("sites/a/nodes/n0",)), NodeEvent(500.0, "up", ("sites/a/nodes/n0",))]
    (one,) = simulated([job("one", at_s=10.0)], events=events).outcomes
    assert one.start_s == 500.0


def test_work_without_gpus_leaves_its_node_too():
    down = NodeEvent(2 * HOUR, "down", ("sites/a/nodes/n0",))
    one, other = simulated([job("one", gpus=0, ranks=1), job("other", run_s=3 * HOUR)], events=[down]).outcomes
    assert (one.end_s, one.recoveries, other.recoveries) == (HOUR, 0, 1)


def test_a_time_limit_ends_a_job_that_takes_longer():
    (one,) = simulated([job("one", time_limit_s=600.0)]).outcomes
    assert (one.state, one.end_s) == (JobState.FAILED, 600.0)


def test_a_queue_takes_no_more_than_its_limit():
    queues = {"a": Queue("queues/a", max_gpus=8)}
    result = simulated([job("one"), job("two"), job("three", queue="b")], nodes=3, queues=queues)
    assert [by_name(result)[name].start_s for name in ("one", "two", "three")] == [0.0, HOUR, 0.0]


def test_what_never_fits_stays_queued_and_a_stop_leaves_the_rest_as_it_is():
    result = simulated([job("huge", gpus=64), job("one"), job("two")], until_s=5000.0)
    states = {name: outcome.state for name, outcome in by_name(result).items()}
    assert states == {"huge": JobState.QUEUED, "one": JobState.SUCCEEDED, "two": JobState.RUNNING}
    assert result.held.total == 8 * 5000.0


def test_decisions_may_be_taken_in_rounds():
    (one,) = simulated([job("one", at_s=61.0)], delays=Delays(round_s=60.0)).outcomes
    assert one.start_s == 120.0


def drawn_jobs(count):
    import random

    drawn, at_s = random.Random(5), 0.0
    for number in range(count):
        at_s += drawn.expovariate(1 / 700.0)
        gpus, priority = drawn.choice((1, 1, 2, 4, 8, 16)), drawn.choice((0, 0, 50))
        yield job(
            f"j{number}", at_s, drawn.lognormvariate(7.5, 1.0), gpus=gpus, priority=priority, queue=f"q{number % 3}"
        )


def test_the_same_input_makes_the_same_moves():
    digests = {simulated(drawn_jobs(80), nodes=3).moves.digest for _ in range(2)}
    assert len(digests) == 1
    assert digests != {simulated(drawn_jobs(79), nodes=3).moves.digest}


def test_all_work_is_done_and_the_fleet_never_holds_more_than_it_has():
    result = simulated(drawn_jobs(80), nodes=3, delays=Delays(start_s=10.0, save_s=20.0))
    summary = summary_of(result)
    assert summary.succeeded == 80
    assert result.held.peak <= 24
    assert result.held.level == result.asked.level == 0.0
    assert summary.busy_gpu_hours >= sum(o.gpus * o.run_s for o in result.outcomes) / HOUR
    assert sum(group.jobs for group in summary.by_size) == sum(group.jobs for group in summary.by_queue) == 80


def test_jobs_out_of_order_are_refused():
    with pytest.raises(ValueError, match="sort jobs"):
        simulated([job("late", at_s=10.0), job("early", at_s=5.0)])


def test_a_series_keeps_its_area_when_its_bins_widen():
    series = Series(bin_s=1.0)
    series.change(0.5, 4.0)
    series.change(2000.5, -4.0)
    series.until(5000.0)
    assert series.total == 8000.0
    widths = series.bin_s
    assert sum(level * widths for _, level in series.means()) == pytest.approx(8000.0)


# files


CLUSTER = "nodes: [{machine: h100x8, count: 2, nodes_per_leaf: 1}]\nqueues: {a: {weight: 2, max_gpus: 8}}\n"
WORKLOAD = (
    "jobs:\n- {name: one, queue: a, count: 4, every: 10 min, gpus: {1: 0.5, 8: 0.5}, takes: {median: 1 h, sigma: 1}}\n"
    "- {name: two, queue: b, gpus: 16, takes: 2 h, at: 1 h, priority: 50}\n"
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    (tmp_path / "larger.yaml").write_text(CLUSTER.replace("count: 2", "count: 8"))
    return tmp_path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_call_prints_figures_draws_and_writes_its_moves(files, capsys):
    cluster, workload, svg, moves = (files / name for name in ("cluster.yaml", "workload.yaml", "a.svg", "a.jsonl"))
    code, out, _ = run(capsys, workload, cluster, "--gantt", svg, "--moves", moves)
    assert code == 0
    assert "5 succeeded" in out
    assert "simulated: no agents" in out
    drawn = ET.parse(svg).getroot()
    assert drawn.tag.endswith("svg")
    assert "queues/b/jobs/two" in svg.read_text()
    lines = [json.loads(line) for line in moves.read_text().splitlines()]
    assert [line["t"] for line in lines] == sorted(line["t"] for line in lines)
    assert sum(line["move"] == "start" for line in lines) >= 5


def test_figures_for_programs(files, capsys):
    code, out, _ = run(capsys, files / "cluster.yaml", files / "workload.yaml", "--json")
    found = json.loads(out)
    assert (code, found["summary"]["jobs"], found["summary"]["never_started"]) == (0, 5, 0)
    assert found["gpus_over_time"]["held"]


def test_the_order_of_sets_decides_nothing(files):
    """Text is hashed otherwise in each process: what depends on that differs."""
    command = [
        sys.executable,
        "-m",
        "whaleflux_scheduler.simulation",
        files / "cluster.yaml",
        files / "workload.yaml",
        "--json",
    ]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    said = [json.loads(run.communicate(timeout=90)[0]) for run in runs]
    assert len({one["summary"]["moves_digest"] for one in said}) == 1


def test_two_clusters_side_by_side(files, capsys):
    given = files / "cluster.yaml", files / "workload.yaml", "--compare", files / "larger.yaml"
    code, out, _ = run(capsys, *given)
    assert code == 0
    assert "WITH larger.yaml" in out
    _, out, _ = run(capsys, *given, "--json")
    found = json.loads(out)
    assert found["second"]["summary"]["overall"]["wait_mean_s"] <= found["first"]["summary"]["overall"]["wait_mean_s"]


def test_reservations_of_a_cluster_file_are_kept_by_the_production_plan(files, capsys):
    kept = "{name: r, queue: b, gpus: 8, start: 2 h, for: 2 h}, {name: m, maintenance: true, nodes: 1, start: 8 h, for: 1 h}"
    (files / "cluster.yaml").write_text(f"{CLUSTER}reservations: [{kept}]\n")
    (files / "workload.yaml").write_text(
        "jobs:\n- {name: long, queue: c, gpus: 16, takes: 5 h}\n"
        "- {name: mine, queue: b, gpus: 8, takes: 1 h, at: 1 h, spec: {reservation: r}}\n"
        "- {name: late, queue: c, gpus: 16, takes: 3 h, at: 7 h}\n"
    )
    code, _, _ = run(capsys, files / "cluster.yaml", files / "workload.yaml", "--moves", files / "moves")
    moves = [json.loads(line) for line in (files / "moves").read_text().splitlines()]
    told = [(line["t"], line["move"], line["job"].rpartition("/")[2]) for line in moves]
    assert code == 0
    assert (7200, "active", "r") in told and (4 * 3600, "ended", "r") in told
    begun = {name: at for at, what, name in reversed(told) if what == "start"}
    assert begun["mine"] == 7200
    assert any(what == "start" and name == "long" and at >= 4 * 3600 for at, what, name in told), (
        "suspended, and goes on"
    )
    assert begun["late"] >= 9 * 3600, "it would reach into the maintenance"


@pytest.mark.parametrize(
    ("cluster", "field", "said"),
    [
        ("nodes: [{machine: h1000x8}]", "nodes[0].machine", "not a profile"),
        ("nodes: []", "nodes", "list at least one group"),
        ("{{{", "cluster.yaml", "is not YAML"),
        ("nodes: [{machine: h100x8, count: 0}]", "nodes[0].count", "1 to 100000"),
        ("nodes: [{machine: h100x8}]\nqueues: {a: {wait: 3}}", "queues.a.wait", "not a field"),
        ("nodes: [{machine: h100x8}]\nqueues: {a: {weight: heavy}}", "queues.a.weight", "must be a number"),
        ("nodes: [{machine: h100x8}]\nevents: [{at: 1 h, what: down, nodes: 7}]", "events[0].nodes", "use 0 to 0"),
        ("nodes: [{machine: h100x8}]\ndelays: {save: soon}", "delays.save", "must be a time"),
        ("nodes: [{machine: h100x8}]\nqueues: {a: {parent: b}, b: {parent: a}}", "queues.a.parent", "is below"),
        ("nodes: [{machine: h100x8}]\nqueues: {a: {parent: org}}", "queues.a.parent", "does not exist"),
        ("nodes: [{machine: h100x8}]\nqueues: {a: {weight: 100000000.0}}", "queues.a.weight", "use 0 to 1000000"),
        (
            "nodes: [{machine: h100x8}]\nqueues: {a: {guaranteed_gpus: 4}, b: {parent: a, guaranteed_gpus: 8}}",
            "queues.a.guaranteed_gpus",
            "guaranteed 8 GPUs together",
        ),
        ("nodes: [{machine: h100x8}]\nreservations: [{name: r, gpus: 4}]", "reservations[0].for", "how long"),
        ("nodes: [{machine: h100x8}]\nreservations: [{name: r, gpus: 9, for: 1 h}]", "reservations[0].gpus", "has 8"),
        (
            "nodes: [{machine: h100x8}]\nreservations: [{name: r, maintenance: true, for: 1 h}]",
            "reservations[0].nodes",
            "is empty",
        ),
    ],
)
def test_mistakes_in_a_cluster_file_name_the_field_and_what_would_be_right(files, capsys, cluster, field, said):
    (files / "cluster.yaml").write_text(cluster)
    code, _, err = run(capsys, files / "cluster.yaml", files / "workload.yaml")
    assert code == 2
    assert f"{field}:" in err
    assert said in err


@pytest.mark.parametrize(
    ("workload", "field", "said"),
    [
        ("jobs: [{name: a, gpus: 1}]", "jobs[0].takes", "say how long"),
        ("jobs: [{name: a, takes: 1 h}]", "jobs[0].gpus", "say how many GPUs"),
        ("jobs: [{name: a, gpus: 1, takes: {median: 1 h}}]", "jobs[0].takes", "log-normal"),
        ("jobs: [{name: a, gpus: 1, takes: {least: 3 h, most: 1 h}}]", "jobs[0].takes", "swap them"),
        ("jobs: [{name: a, gpus: {0.5: 1}, takes: 1 h}]", "jobs[0].gpus", "a number of GPUs"),
        ("jobs: [{name: a, gpus: 1, takes: 1 h, count: 3000000}]", "jobs[0].count", "1 to 2000000"),
        ("jobs: [{name: a, gpus: 1, takes: 1 h}, {name: a, gpus: 2, takes: 1 h}]", "jobs", "two of one queue and name"),
        ("jobs: [{name: a, gpus: 1, takes: 1 h, spec: {priority: 5000}}]", "jobs[0].spec", "priority"),
        ("jobs: [{name: a, gpus: {1: .nan}, takes: 1 h}]", "jobs[0].gpus", "a weight above 0"),
        ("jobs: [{name: a, gpus: {1: .inf}, takes: 1 h}]", "jobs[0].gpus", "a weight above 0"),
        ("jobs: [{name: a, gpus: {1000000: 1}, takes: 1 h}]", "jobs[0].gpus", "0 to 100000"),
        ("jobs: [{name: a, gpus: 1, takes: 1 h, spec: 5}]", "jobs[0].spec", "must be fields of a job file"),
        ("jobs: [{name: a, job: nothing.yaml, takes: 1 h}]", "jobs[0].job", "cannot read"),
        ("estimates: wild\njobs: [{name: a, gpus: 1, takes: 1 h}]", "estimates", "must be one of: exact"),
    ],
)
def test_mistakes_in_a_workload_file_name_the_field_and_what_would_be_right(files, capsys, workload, field, said):
    (files / "workload.yaml").write_text(workload)
    code, _, err = run(capsys, files / "cluster.yaml", files / "workload.yaml")
    assert code == 2
    assert f"{field}:" in err
    assert said in err


def test_a_job_without_a_place_is_told_apart_and_nothing_is_printed_as_nan(files, capsys):
    (files / "workload.yaml").write_text("jobs: [{name: a, gpus: 5000, takes: 1 h}]")
    code, out, _ = run(capsys, files / "cluster.yaml", files / "workload.yaml")
    assert code == 0
    assert "1 not done (1 never started)" in out
    assert "nan" not in out


def test_nodes_stand_where_the_cluster_file_says():
    nodes = cluster_of(
        {"nodes": [{"machine": "h100x8", "count": 4, "nodes_per_leaf": 1, "leaves_per_spine": 2, "price": 3}]}
    ).nodes
    assert [(one.leaf, one.spine) for one in nodes] == [(f"l0000{at}", f"p000{at // 2}") for at in range(4)]
    assert {one.price.usd_per_gpu_hour for one in nodes} == {3.0}
    assert len({gpu.uuid for one in nodes for gpu in one.gpus}) == 32


# traces

PHILLY = """timestamp,duration,num_gpus,gpu_time,cluster
2017-10-09 08:00:00,3600.0,8,28800.0,b
2017-10-09 07:00:00,3600.0,1,3600.0,a
2017-10-09 09:00:00,60.0,128,7680.0,b
"""


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path):
    (tmp_path / "philly.csv").write_text(PHILLY)
    trace = traces.read(tmp_path / "philly.csv", 16)
    assert [(row.at_s, row.gpus, row.queue) for row in trace.rows] == [(0.0, 1, "vc-a"), (HOUR, 8, "vc-b")]
    assert trace.left_out == 1  # larger than the fleet
    closer = trace.at_load(0.5, 16)
    assert closer.gpu_s / (16 * closer.span_s) == pytest.approx(0.5)
    assert [one.name for one in trace.submissions()] == ["queues/vc-a/jobs/j000000", "queues/vc-b/jobs/j000001"]


def test_a_trace_that_nobody_knows_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidArgument, match="timestamp,duration,num_gpus"):
        traces.read(Path(tmp_path / "other.csv"), 16)


@pytest.mark.parametrize("duration", ["nan", "inf", "-5", "0"])
def test_a_row_without_a_run_time_is_left_out(tmp_path, duration):
    (tmp_path / "philly.csv").write_text(PHILLY + f"2017-10-03 01:00:00,{duration},1,1,a\n")
    found, whole = traces.read(tmp_path / "philly.csv", 16), PHILLY.count("\n") - 1
    assert (len(found.rows), found.left_out) == (2, whole - 2 + 1)
