"""A cluster file: which nodes there are, the queues, what happens to nodes, and how long things take. See docs/guide/simulate.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.model import Gpu, Node, Price, PriceKind
from whaleflux.fleet.profile import Profile
from whaleflux.manifests.reader import Reader, kind_of
from whaleflux.manifests.values import Choice, Whole
from whaleflux_scheduler.core import reservation_rules
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.core.reservation_rules import MOST_GPUS, MOST_KEPT
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.core.reserved_gpus import Fleet
from whaleflux_scheduler.simulation.timeline import BEGIN, instant
from whaleflux_scheduler.simulation.workload import NO_DELAYS, Delays, NodeEvent

MAX_NODES = 100_000
MAX_QUEUES = 100_000
MAX_EVENTS = 100_000
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_HERE = Path()


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated beside the jobs."""

    nodes: tuple[Node, ...]
    queues: dict[str, Queue]
    events: tuple[NodeEvent, ...] = ()
    delays: Delays = NO_DELAYS
    reservations: tuple[Reservation, ...] = ()


def cluster_of(content: object) -> Cluster:
    """The content of a cluster file. Raises InvalidArgument naming every mistake."""
    wrong: list[FieldViolation] = []
    file = Reader(content, "", wrong)
    file.require("nodes", "list groups of nodes: [{machine: h200x8, count: 16}]")
    nodes: list[Node] = []
    groups = file.items("nodes", a_list(1000, "groups of nodes"))
    for group in groups:
        nodes += _group(group, len(nodes))
    if not groups and not wrong:
        file.note("nodes", "is empty; list at least one group: [{machine: h200x8, count: 16}]")
    queues = queues_of(file)
    delays = _delays(file.inner("delays"))
    events = [event for one in file.items("events", a_list(MAX_EVENTS, "events")) for event in _event(one, nodes)]
    asked = [_reservation(one, nodes) for one in file.items("reservations", a_list(MOST_KEPT, "reservations"))]
    file.done()
    if wrong:
        raise InvalidArgument(wrong[:50])
    events.sort(key=lambda event: event.at_s)
    return Cluster(tuple(nodes), queues, tuple(events), delays, _kept(asked, nodes))


def _group(reader: Reader, first: int) -> list[Node]:
    reader.require("machine", "name one of: whaleflux profiles")
    profile = reader.take("machine", _profile, None)
    count = reader.take("count", a_whole(1, MAX_NODES), 1)
    site = reader.take("site", lambda value: names.check_id("site", str(value)), "site")
    per_leaf = reader.take("nodes_per_leaf", a_whole(1, MAX_NODES), 0)
    per_spine = reader.take("leaves_per_spine", a_whole(1, MAX_NODES), 0)
    price = reader.take("price", quantities.dollars, None)
    kind = reader.take("price_kind", lambda value: _PRICE_KIND.parse(value, _HERE), None)
    reader.done()
    if first + count > MAX_NODES:
        reader.note("count", f"makes {first + count} nodes in all; at most {MAX_NODES} are simulated")
        return []
    if profile is None:
        return []
    whole = machine(profile)
    paid = Price(kind or whole.price.kind, whole.price.usd_per_gpu_hour if price is None else price)
    return [_node(replace(whole, price=paid), first + at, at, site, per_leaf, per_spine) for at in range(count)]


_PRICE_KIND = Choice({kind.value: kind for kind in PriceKind})


def _profile(value: object) -> Profile:
    if not isinstance(value, str) or "/" in value:
        raise ValueError("must be the name of a machine, such as h200x8; see: whaleflux profiles")
    return Profile.load(value)


def machine(profile: Profile) -> Node:
    """A node of that shape, without a name; only the first GPUs of a mixed machine are taken."""
    shape, memory = profile.shape, profile.memory_bytes
    gpus = tuple(Gpu(at, str(at), profile.model, memory, profile.compute_capability) for at in range(shape.count))
    return Node(
        name="",
        site="",
        gpus=gpus,
        links=shape.all_links(),
        cpu_millicores=shape.cpu_millicores,
        memory_bytes=shape.memory_bytes,
        disks=shape.disks,
        network_bytes_per_s=shape.network_bytes_per_s,
        price=shape.price,
        simulated=True,
    )


def _node(whole: Node, number: int, at: int, site: str, per_leaf: int, per_spine: int) -> Node:
    """The `at`-th of its group, the `number`-th of all."""
    leaf = at // per_leaf if per_leaf else 0
    return replace(
        whole,
        name=names.node(site, f"n{number:05}"),
        site=site,
        gpus=tuple(replace(gpu, uuid=f"{number:05}-{gpu.index}") for gpu in whole.gpus),
        leaf=f"l{leaf:05}" if per_leaf else "",
        spine=f"p{leaf // per_spine:04}" if per_spine else "",
    )


def queues_of(file: Reader) -> dict[str, Queue]:
    """Queues by id: every field that queues have, by its own name."""
    found = {}
    listed = file.inner("queues")
    keys = listed.keys()
    if len(keys) > MAX_QUEUES:
        file.note("queues", f"has {len(keys)} queues; at most {MAX_QUEUES}")
        return {}
    for key in keys:
        reader = listed.inner(key)
        given = {field.name: reader.take(field.name, _field(field.default), field.default) for field in _QUEUE_FIELDS}
        reader.done()
        found[key] = Queue(names.queue(key), **given)
    return found


_QUEUE_FIELDS = [
    field
    for field in dataclasses.fields(Queue)
    if field.name != "name" and isinstance(field.default, (bool, int, float, str, NoneType))
]


def _field(default: object) -> Any:
    """How a value of that kind is read; without a default it is a number of GPUs."""
    kind: Any = int if default is None else type(default)

    def parse(value: object) -> object:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if (kind is bool) is not isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"must be {kind_of(kind())}, such as {kind() if default is None else default!r}")
        if isinstance(value, (int, float)) and not 0 <= value <= 1e9:
            raise ValueError("must be 0 to 1e9")
        return kind(value)

    return parse


def _delays(reader: Reader) -> Delays:
    taken = {
        field.name: reader.take(field.name.removesuffix("_s"), quantities.seconds, field.default)
        for field in dataclasses.fields(Delays)
    }
    reader.done()
    return Delays(**taken)


def _event(reader: Reader, nodes: Sequence[Node]) -> list[NodeEvent]:
    at_s = reader.take("at", quantities.seconds, 0.0)
    what = reader.take("what", lambda value: _WHAT.parse(value, _HERE), None)
    chosen = reader.take("nodes", lambda value: _positions(value, nodes), ())
    for_s = reader.take("for", quantities.seconds, None)
    reader.require("what", "say down (lost with what runs there) or drain (emptied first)")
    reader.require("nodes", 'say which by position: "0-7"')
    reader.done()
    if what is None or not chosen:
        return []
    over = [NodeEvent(at_s + for_s, "up", chosen)] if for_s is not None else []
    return [NodeEvent(at_s, what, chosen), *over]


def _reservation(reader: Reader, nodes: Sequence[Node]) -> Reservation:
    """As `whaleflux reservation create` says it; times count from the beginning."""
    reader.require("name", "give it one")
    reader.require("for", "say how long it lasts")
    start_s = reader.take("start", quantities.seconds, 0.0)
    for_s = reader.take("for", quantities.seconds, 3600.0)
    maintenance = reader.take("maintenance", _field(False), False)
    found = Reservation(
        name=names.reservation(reader.take("name", lambda value: names.check_id("name", str(value)), "r")),
        start=instant(start_s),
        end=instant(start_s + for_s),
        gpus=reader.take("gpus", a_whole(1, MOST_GPUS), 0),
        gpu_type=reader.take("gpu_type", _field(""), ""),
        nodes=reader.take("nodes", lambda value: _positions(value, nodes), ()),
        queue=reader.take("queue", _field(""), "" if maintenance else "default"),
        maintenance=maintenance,
    )
    reader.done()
    return found


def _kept(asked: Sequence[Reservation], nodes: Sequence[Node]) -> tuple[Reservation, ...]:
    """With the GPUs that they keep, in the order of the file. Raises InvalidArgument."""
    kept: list[Reservation] = []
    fleet = Fleet({node.name: node for node in nodes}, {node.name for node in nodes})
    for at, one in enumerate(asked):
        admitted, wrong = reservation_rules.admitted(one, kept, fleet)
        if wrong := [*reservation_rules.mistakes(one, BEGIN), *wrong]:
            found = (
                FieldViolation(v.field.replace("reservation.", f"reservations[{at}]."), v.description) for v in wrong
            )
            raise InvalidArgument(list(found))
        kept.append(admitted)
    return tuple(kept)


_WHAT = Choice({what: what for what in ("down", "drain", "up")})


def _positions(value: object, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Nodes by their place in the file, from 0: "0-7,12", or one number."""
    chosen: list[str] = []
    for part in str(value).replace(" ", "").split(","):
        found = _RANGE.fullmatch(part)
        if found is None or int(found[2] or found[1]) >= len(nodes):
            raise ValueError(f"{part!r} is no position of the {len(nodes)} nodes; use 0 to {len(nodes) - 1}, as in 0-7")
        chosen += [node.name for node in nodes[int(found[1]) : int(found[2] or found[1]) + 1]]
    return tuple(chosen)


def a_list(most: int, what: str) -> Any:
    """A list of at most so many."""

    def parse(value: object) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"must be a list of at most {most} {what}")
        return value

    return parse


def a_whole(least: int, most: int) -> Any:
    """A whole number within limits."""
    return lambda value: Whole(least, most).parse(value, _HERE)
