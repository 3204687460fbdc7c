"""One thing with its story: what it is now, what happened to it, and what can be done next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.deploy_words import gpus_of
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, fleet, job_name, node_name, pages

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client

Lines = list[tuple[str, str]]
STORY = 20  # events that are shown
ATTEMPTS = 20
_KINDS = ("job", "node", "model")


def describe(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="job, node or model; KIND/NAME does as well.")],
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name, as the kind's own commands take it.")] = "",
    fmt: Output = Format.table,
) -> None:
    """A job, node or model: what it is now, its attempts, the last 20 things that happened to it, and what to do next.

    \b
      whaleflux describe job llama-70b-sft       also of a job whose record is deleted
      whaleflux describe node onprem/n1
      whaleflux describe model/gpt -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument

    kind, _, rest = kind.partition("/")
    name = name or rest
    if kind not in _KINDS or not name:
        raise InvalidArgument(FieldViolation("KIND", f"give one of {', '.join(_KINDS)} and a name, such as: job llama"))
    with fleet() as client:
        shown = {"job": _job, "node": _node, "model": _model}[kind](client, name)
    if fmt.is_json:
        output.say_json(shown.as_json(), fmt)
    elif fmt is Format.name:
        output.say(shown.name)
    else:
        shown.say()


class _Description:
    """What is shown of one resource. `record` None: it is deleted, and its history is all there is."""

    def __init__(self, name: str, record: Any, lines: Lines, next_: str) -> None:
        self.name, self.record, self.lines, self.next_ = name, record, lines, next_
        self.attempts: list[Any] = []
        self.events: list[Any] = []
        self.sizes: list[Any] = []  # of a model whose GPUs are picked
        self.unknown = ""  # why what happened is not known

    def say(self) -> None:
        """For people."""
        from whaleflux.cli import kept_events

        width = max(len(key) for key, _ in self.lines)
        output.say(*(f"{key:<{width}}  {value}" for key, value in self.lines if value))
        if self.attempts:
            output.say("", "attempts")
            _say_attempts(self.attempts[-ATTEMPTS:])
        output.say("", f"happened (the last {len(self.events)})" if self.events else "happened")
        for event in self.events:
            output.say(f"  {kept_events.line(event, name=event.resource != self.name)}")
        if not self.events:
            output.say(f"  {self.unknown or 'nothing that is kept'}")
        output.say("", f"next      {self.next_}")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = {
            "name": self.name,
            "record": output.as_json(self.record) if self.record is not None else None,
            "attempts": [output.as_json(record) for record in self.attempts],
            "events": [output.as_json(event) for event in self.events],
        }
        if self.sizes:
            found["sizes"] = [output.as_json(size) for size in self.sizes]
        return found | ({"events_unknown": self.unknown} if self.unknown else {})


def _job(client: Client, given: str) -> _Description:
    from whaleflux.cli import history_commands
    from whaleflux.cli.job_commands import job_lines
    from whaleflux.v1 import scheduler_pb2

    name = job_name(given)
    record, missing = _found(lambda: client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10))
    lines = job_lines(record) if record is not None else [("name", name), ("state", "its record is deleted")]
    next_ = f"whaleflux logs {name} | whaleflux explain {name} | whaleflux history {name}"
    shown = _Description(name, record, lines, next_ if record is not None else f"whaleflux history {name}")
    request = scheduler_pb2.ListJobHistoryRequest(job=name, show_attempts=True)
    try:
        kept = history_commands.records(client, request, 100)
    except Exception as error:
        kept = []
        shown.unknown = _why(error)
    uid = record.uid if record is not None else next((r.uid for r in kept), "")
    shown.attempts = sorted((r for r in kept if r.attempt and r.uid == uid), key=lambda r: int(r.attempt))
    _tell(client, shown)
    if record is None and not shown.events and not kept:
        raise missing
    return shown


def _node(client: Client, given: str) -> _Description:
    from whaleflux.cli.fleet_commands import node_lines
    from whaleflux.v1 import health_pb2, inventory_pb2

    name = node_name(client, given)
    record, missing = _found(lambda: client.inventory.GetNode(inventory_pb2.GetNodeRequest(name=name), timeout=10))
    health, _ = _found(lambda: client.health.GetNodeHealth(health_pb2.GetNodeHealthRequest(name=name), timeout=10))
    lines = (
        node_lines(record, health, _held_by(client, name))
        if record is not None
        else [("name", name), ("state", "not there")]
    )
    shown = _Description(name, record, lines, f"whaleflux drain {name} | whaleflux cordon {name} | whaleflux incidents")
    _tell(client, shown)
    if record is None and not shown.events:
        raise missing
    return shown


def _held_by(client: Client, node: str) -> list[str]:
    """Who holds GPUs there: job and count."""
    from whaleflux.v1 import scheduler_pb2

    listed = pages(client.scheduler.ListAllocations, scheduler_pb2.ListAllocationsRequest(), "allocations")
    return [f"{a.job} ({len(a.task.gpu_uuids)} GPUs)" for a in listed if a.task.node == node]


def _model(client: Client, given: str) -> _Description:
    from whaleflux.v1 import router_pb2

    name = names.model(given.removeprefix("models/"))
    record, missing = _found(lambda: client.router.GetModel(router_pb2.GetModelRequest(name=name), timeout=10))
    lines: Lines = [("name", name), ("state", "not served")]
    if record is not None:
        replicas = pages(client.router.ListReplicas, router_pb2.ListReplicasRequest(parent=name), "replicas")
        lines = _model_lines(record, replicas)
    shown = _Description(
        name, record, lines, f"whaleflux replicas {names.last(name)} | whaleflux route {names.last(name)}"
    )
    if record is not None and record.engine.shape:
        _add_sizes(client, shown)
    _tell(client, shown)
    if record is None and not shown.events:
        raise missing
    return shown


def _add_sizes(client: Client, shown: _Description) -> None:
    """Which GPUs its next replica gets at each site, what else serves, and why others do not."""
    from whaleflux.cli import deploy_words
    from whaleflux.errors import StatusError
    from whaleflux.v1 import router_pb2

    try:
        estimate = client.router.EstimateDeployment(router_pb2.EstimateDeploymentRequest(name=shown.name), timeout=30)
    except StatusError as error:
        shown.lines.append(("GPUs", _why(error)))
        return
    shown.sizes = [size for site in estimate.sites for size in site.sizes]
    words = [line for site in estimate.sites for line in deploy_words.size_lines(site)]
    shown.lines += [("" if number else "GPUs", line) for number, line in enumerate(words)]


def _model_lines(model: Any, replicas: list[Any]) -> Lines:
    from whaleflux.v1 import router_pb2

    def told(replica: Any) -> str:
        state = output.enum_name(router_pb2.ReplicaState, replica.state, "REPLICA_STATE_")
        gpus = f" ({replica.gpus} x {replica.gpu_model})" if replica.gpu_model else ""
        where = f" on {replica.node}{gpus}" if replica.node else f" at {replica.address}" if replica.address else ""
        return f"{names.last(replica.name)} {state}{where}: {replica.message}".rstrip(": ")

    return [
        ("name", model.name),
        (
            "engine",
            ", ".join(
                (model.engine.kind, *([gpus_of(model.engine)] if model.engine.command or model.engine.image else []))
            ),
        ),
        ("declared", f"{output.age(model.create_time)} ago" + _by(model.last_change)),
        ("replicas", f"{model.ready_replicas} ready of {model.replicas.min}"),
        *(("", told(replica)) for replica in replicas[:16]),
    ]


def _by(change: Any) -> str:
    return f", {change.what.lower()} by {change.actor}" if change.actor else ""


def _found(ask: Callable[[], Any]) -> tuple[Any, Exception]:
    """The record, or None and the NotFound that says so."""
    from whaleflux.errors import NotFound

    try:
        return ask(), NotFound("resource", "")
    except NotFound as missing:
        return None, missing


def _tell(client: Client, shown: _Description) -> None:
    """What happened to it; of one that cannot be told the reason, so that nothing looks like "nothing happened"."""
    from whaleflux.cli import kept_events
    from whaleflux.errors import StatusError
    from whaleflux.v1 import events_pb2

    try:
        shown.events, _ = kept_events.newest(client, events_pb2.EventFilter(resource=shown.name), STORY)
    except StatusError as error:
        shown.unknown = _why(error)


def _why(error: Exception) -> str:
    from whaleflux.errors import StatusError

    if not isinstance(error, StatusError):
        raise error
    return f"not known now: {error.message}"


def _say_attempts(attempts: list[Any]) -> None:
    from whaleflux.cli import history_commands as history

    columns = [
        c
        for c in history.columns()
        if c.header in {"ATTEMPT", "STATE", "GPUS", "RAN", "EXIT", "STEP", "GPU-H", "COST", "NODES"}
    ]
    output.table([f"  {columns[0].header}", *(c.header for c in columns[1:])],
                 [[f"  {columns[0].cell(r)}", *(c.cell(r) for c in columns[1:])] for r in attempts])  # fmt: skip
