"""One call of `whaleflux simulate`: reads the files, simulates once or twice, and makes what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from whaleflux import quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.yaml_text import MAX_FILE_BYTES, load
from whaleflux_scheduler.core import quota_rules
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.simulation import fleet_file, pictures, tables, traces
from whaleflux_scheduler.simulation.cluster_file import Cluster, cluster_of
from whaleflux_scheduler.simulation.estimates import ESTIMATES, exact
from whaleflux_scheduler.simulation.fleet_file import Fleet
from whaleflux_scheduler.simulation.records import MoveLog, Spans
from whaleflux_scheduler.simulation.results import Summary, finite, summary_of
from whaleflux_scheduler.simulation.runner import SIMULATED, Simulation
from whaleflux_scheduler.simulation.state import Result
from whaleflux_scheduler.simulation.timeline import NEVER_S
from whaleflux_scheduler.simulation.workload import Submission, Workload
from whaleflux_scheduler.simulation.workload_file import Jobs, jobs_of


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the command line said; see `whaleflux simulate --help`."""

    files: tuple[Path, ...] = ()
    trace: Path | None = None
    load: float | None = None
    first: int | None = None
    estimates: str = ""
    fleet: Path | None = None
    assume: str = "4 h"
    until: str = ""
    compare: Path | None = None
    picture: Path | None = None
    moves: Path | None = None
    json: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the files say together."""

    cluster: Cluster | None = None
    jobs: Jobs | None = None
    fleet: Fleet | None = None


def run_all(scenario: Scenario) -> str:
    """What is printed. Raises InvalidArgument naming what is wrong."""
    inputs = _inputs(scenario)
    until_s = _until(scenario)
    first = _simulated(scenario, inputs, until_s, scenario.picture, scenario.moves)
    if scenario.compare is None:
        return _one(scenario, first)
    changed = _with_file(Inputs(fleet=inputs.fleet), scenario.compare)
    other = replace(inputs, **{name: found for name in ("cluster", "jobs") if (found := getattr(changed, name))})
    return _two(scenario, first, _simulated(scenario, other, until_s, None, None))


# reading


def _inputs(scenario: Scenario) -> Inputs:
    inputs = Inputs(
        fleet=fleet_file.read(scenario.fleet, quantities.seconds(scenario.assume)) if scenario.fleet else None
    )
    for file in scenario.files:
        inputs = _with_file(inputs, file)
    if inputs.cluster is None and inputs.fleet is None:
        raise _wrong("CLUSTER", "is missing; name a cluster file (with `nodes`), or take the fleet's: --from-fleet")
    if inputs.jobs is None and scenario.trace is None and not (inputs.fleet and inputs.fleet.waiting):
        raise _wrong("WORKLOAD", "is missing; name a workload file (with `jobs`), or a trace: --trace philly.csv.gz")
    return inputs


def _with_file(inputs: Inputs, path: Path) -> Inputs:
    """A cluster file has `nodes`, a workload file `jobs`; their order does not matter."""
    content = _content(path)
    fields = content if isinstance(content, dict) else {}
    try:
        if "nodes" in fields:
            return replace(inputs, cluster=cluster_of(content))
        if "jobs" in fields:
            return replace(inputs, jobs=jobs_of(content, path.resolve().parent))
    except InvalidArgument as wrong:
        raise InvalidArgument([FieldViolation(f"{path}: {v.field}", v.description) for v in wrong.violations]) from None
    raise _wrong(str(path), "is neither a cluster file (it has `nodes`) nor a workload file (it has `jobs`)")


def _content(path: Path) -> object:
    try:
        with path.open(encoding="utf-8") as stream:
            return load(stream.read(MAX_FILE_BYTES + 1))
    except InvalidArgument as wrong:  # that it is no YAML: which of the files
        raise InvalidArgument([FieldViolation(str(path), v.description) for v in wrong.violations]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(str(path), f"cannot be read: {error}") from None


def _until(scenario: Scenario) -> float:
    try:
        return quantities.seconds(scenario.until) if scenario.until else NEVER_S
    except ValueError as error:
        raise _wrong("--until", str(error)) from None


def _wrong(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, description))


# simulating


@dataclass(frozen=True, slots=True)
class _Run:
    result: Result
    summary: Summary
    notes: tuple[str, ...]


def _simulated(scenario: Scenario, inputs: Inputs, until_s: float, picture: Path | None, moves: Path | None) -> _Run:
    cluster = inputs.cluster or (inputs.fleet.cluster if inputs.fleet else None)
    assert cluster is not None
    queues: dict[str, Queue] = {**(inputs.jobs.queues if inputs.jobs else {}), **cluster.queues}
    quota_rules.check_all(queues)
    jobs, notes = _jobs(scenario, inputs, traces.fleet_gpus(cluster.nodes))
    spans = Spans(pictures.shown_nodes(cluster.nodes), pictures.MOST_SPANS) if picture else None
    with ExitStack() as files:
        log = MoveLog(files.enter_context(_writable(moves)) if moves else None)
        running = inputs.fleet.running if inputs.fleet else ()
        workload = Workload(jobs, queues, cluster.delays, running, cluster.reservations)
        result = Simulation(cluster.nodes, workload, events=cluster.events, log=log, spans=spans).run(until_s)
    summary = summary_of(result)
    if picture:
        with _writable(picture) as file:
            file.write(pictures.picture(result, cluster.nodes, "Simulated fleet", _about(summary)))
        if spans and spans.left_out:
            notes = (*notes, f"the picture leaves out {spans.left_out} of its bars; simulate less time: --until")
    return _Run(result, summary, notes)


def _writable(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise _wrong(str(path), f"cannot be written: {error.strerror}") from None


def _jobs(scenario: Scenario, inputs: Inputs, gpus: int) -> tuple[Iterable[Submission], tuple[str, ...]]:
    """The trace's jobs, or those of the workload file; with a fleet, its waiting ones first."""
    waiting = list(inputs.fleet.waiting) if inputs.fleet else []
    if scenario.trace is None:
        return (*waiting, *(inputs.jobs.submissions() if inputs.jobs else ())), ()
    if scenario.estimates not in ("", *ESTIMATES):
        raise _wrong("--estimates", f"must be one of: {', '.join(ESTIMATES)}")
    trace = traces.read(scenario.trace, gpus, first=scenario.first or traces.MAX_ROWS)
    if not trace.rows:
        raise _wrong("--trace", f"{scenario.trace} has no job that fits on {gpus} GPUs")
    notes = (f"{trace.left_out:,} jobs of the trace are left out: larger than {gpus:,} GPUs, or without a run time",)
    if scenario.load:
        trace = trace.at_load(scenario.load, gpus)
    found = trace.submissions(ESTIMATES.get(scenario.estimates, exact))
    return (*waiting, *found), notes if trace.left_out else ()


# showing


def _about(summary: Summary) -> str:
    return (
        f"{summary.jobs:,} jobs, {100 * summary.utilisation:.1f} % of GPU time held, mean wait {tables.duration(summary.overall.wait_mean_s)}, "
        f"p99 {tables.duration(summary.overall.wait_p99_s)}, {summary.suspensions:,} preemptions"
    )


def _one(scenario: Scenario, run: _Run) -> str:
    if scenario.json:
        return json.dumps(finite(_as_json(run)), indent=2)
    size, queue = tables.groups("SIZE", run.summary.by_size), tables.groups("QUEUE", run.summary.by_queue)
    return "\n\n".join([tables.overview(run.summary), size, queue, *run.notes, f"simulated: {SIMULATED}"])


def _two(scenario: Scenario, first: _Run, second: _Run) -> str:
    if scenario.json:
        return json.dumps(finite({"first": _as_json(first), "second": _as_json(second)}), indent=2)
    assert scenario.compare is not None
    compared = tables.comparison("AS GIVEN", first.summary, f"WITH {scenario.compare.name}", second.summary)
    sizes = (
        tables.groups(f"SIZE, {name}", run.summary.by_size)
        for name, run in (("as given", first), (scenario.compare.name, second))
    )
    return "\n\n".join([compared, *sizes, *dict.fromkeys((*first.notes, *second.notes)), f"simulated: {SIMULATED}"])


def _as_json(run: _Run) -> dict[str, object]:
    series = {"held": run.result.held, "asked": run.result.asked, "closed": run.result.closed}
    over_time = {name: [[at, round(level, 3)] for at, level in one.means()] for name, one in series.items()}
    spent = {"step_s": run.result.step_s, "apply_s": run.result.apply_s, "total_s": run.result.total_s}
    return {
        "summary": asdict(run.summary),
        "gpus_over_time": over_time,
        "cpu": {name: round(value, 3) for name, value in spent.items()},
        "notes": list(run.notes),
        "simulated": SIMULATED,
    }
