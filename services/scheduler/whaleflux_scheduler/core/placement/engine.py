"""The engine: the fleet as it is, what is placed on it, and where the next gang should go.

Placing is pure; `apply` and `release` change state; a transaction takes back everything that was not committed. State is a function of
the nodes and the placements alone: a rebuild gives the same columns, byte for byte (`check`), whatever the history was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from whaleflux.fleet.links import Fabric
from whaleflux.fleet.model import Level, Node
from whaleflux.reasons import ErrorReason
from whaleflux_scheduler.core.placement import cpu
from whaleflux_scheduler.core.placement import preempt as preemption
from whaleflux_scheduler.core.placement.api import (
    DatasetFact,
    Goal,
    Limit,
    NodeAssignment,
    NoPlacement,
    Placement,
    PlaceRequest,
    PreemptionPlan,
    Victim,
)
from whaleflux_scheduler.core.placement.columns import Columns, Row, cache_bytes, cache_room_bytes, place_key
from whaleflux_scheduler.core.placement.comm import flows_of
from whaleflux_scheduler.core.placement.datasets import Datasets
from whaleflux_scheduler.core.placement.decide import decide
from whaleflux_scheduler.core.placement.exact import Where, place_on
from whaleflux_scheduler.core.placement.explain import explain
from whaleflux_scheduler.core.placement.least import LeastCommunication, least_free_s
from whaleflux_scheduler.core.placement.node_room import NodeRoom
from whaleflux_scheduler.core.placement.pin_book import Copy, PinBook
from whaleflux_scheduler.core.placement.search import feasible
from whaleflux_scheduler.core.placement.shapes import Shapes
from whaleflux_scheduler.core.placement.supply import could_use
from whaleflux_scheduler.core.placement.validate import check_request

MAX_GPUS_PER_NODE = 64


@dataclass(slots=True)
class Transaction:
    """Everything since its start is undone at its end unless `commit` was called."""

    committed: bool = False

    def commit(self) -> None:
        self.committed = True


class Engine:
    """Not thread-safe: one thread owns it."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        self.fabric = fabric or Fabric()
        self._rows: dict[str, Row] = {}
        self._placed: dict[str, Placement] = {}
        self._flows: dict[str, int] = {}
        self._datasets = Datasets()
        self._shapes = Shapes()
        self._columns: Columns | None = None
        self._empty_columns: Columns | None = None
        self._least = LeastCommunication()
        self._undo: list[Callable[[], None]] = []
        self._depth = 0

    # -- the fleet ------------------------------------------------------------------------------------------------------------

    def upsert_node(self, node: Node) -> None:
        """A node appears or its facts change; what is placed on it stays. New nodes are schedulable."""
        self._outside_transactions("upsert_node")
        if len(node.gpus) > MAX_GPUS_PER_NODE:
            raise InvalidArgument(
                FieldViolation("node.gpus", f"{len(node.gpus)} GPUs on one node; at most {MAX_GPUS_PER_NODE}")
            )
        row = self._rows.get(node.name)
        if row is not None and row.node == node:
            return
        shape = self._shapes.of(node)
        if row is not None and row.shape is shape and place_key(row.node) == place_key(node):
            self._patch(node)
            return
        self._rows[node.name] = made = Row(node, shape, *((row.schedulable, row.reason) if row else ()))
        made.held_bytes = self.book.held_bytes(node.name)
        self._columns = self._empty_columns = None

    def _patch(self, node: Node) -> None:
        """New facts of a node whose hardware and place are as before: one row changes."""
        self._rows[node.name].node = node
        for columns in (self._columns, self._empty_columns):
            if columns is not None:
                columns.replace_facts(columns.index[node.name], node)

    def remove_node(self, name: str) -> None:
        """The node is gone. What is placed on it stays placed, so that it can be released, and returns if the node does."""
        self._outside_transactions("remove_node")
        if self._rows.pop(name, None) is None:
            raise NotFound("node", name)
        self._columns = self._empty_columns = None

    def set_schedulable(self, name: str, schedulable: bool, reason: str = "") -> None:
        """Whether new work may go to the node, and if not, why ("cordoned", "suspect"); what runs there stays."""
        row = self._rows.get(name)
        if row is None:
            raise NotFound("node", name)
        before = (row.schedulable, row.reason)
        if before == (schedulable, reason):
            return
        self._set_schedulable(name, schedulable, reason)
        self._remember(lambda: self._set_schedulable(name, *before))

    def _set_schedulable(self, name: str, schedulable: bool, reason: str) -> None:
        if self._columns is None:  # the rebuild to come will see it
            self._rows[name].schedulable, self._rows[name].reason = schedulable, reason
        else:
            self._columns.set_schedulable(self._columns.index[name], schedulable, reason)

    def upsert_dataset(self, dataset: DatasetFact) -> set[str]:
        """A dataset's size, or the nodes that hold it or are to, changed; returns where the room for others did."""
        changed = self._datasets.know(dataset)
        self._took(changed)
        return changed

    def remove_dataset(self, name: str) -> set[str]:
        """The same of one that is gone."""
        changed = self._datasets.drop(name)
        self._took(changed)
        return changed

    def _took(self, nodes: Iterable[str]) -> None:
        """Datasets take another room there than before."""
        for name in nodes:
            if row := self._rows.get(name):
                row.held_bytes = self.book.held_bytes(name)

    @property
    def book(self) -> PinBook:
        """Whose data has its room where."""
        return self._datasets.book

    def hold_data(self, holder: str, copies: Iterable[Copy], queue: str = "") -> None:
        """What data the holder holds from now on: of these copies what it held before, and all that fit. Of nodes that are not known all."""
        wanted = set(copies)
        kept = wanted & self.book.held_by(holder)
        self._took(self.book.hold(holder, kept, queue))
        free = {node: self._data_room(node) for node, _ in wanted}
        for node, dataset in sorted(wanted - kept):
            more = self.book.missing_bytes(node, (dataset,))
            if more <= free[node]:
                kept.add((node, dataset))
                free[node] -= more
        self._took(self.book.hold(holder, kept, queue))

    def could_keep(self, node: str, datasets: Collection[str]) -> bool:
        """Whether there is room for all of them beside what others hold."""
        return self.book.missing_bytes(node, datasets) <= self._data_room(node)

    def for_tasks_only(self, dataset: str) -> bool:
        """Whether only a task can have it pulled."""
        return dataset in self._datasets and self._datasets[dataset].for_tasks_only

    def _data_room(self, node: str) -> float:
        """Bytes; of a node that does not say what it has, or is not known, nothing is concluded."""
        row = self._rows.get(node)
        return cache_room_bytes(row) if row and cache_bytes(row) else math.inf

    @property
    def columns(self) -> Columns:
        """The current state; rebuilt after nodes came, went or changed their hardware."""
        if self._columns is None:
            self._columns = self._rebuilt()
        return self._columns

    def _rebuilt(self) -> Columns:
        columns = Columns(self._rows, self.fabric)
        self._flows = {}
        for id_ in sorted(self._placed):
            self._flows[id_] = _count(columns, self._placed[id_], 1, flows=None)
        return columns

    # -- deciding -------------------------------------------------------------------------------------------------------------

    def place(self, request: PlaceRequest) -> Placement | NoPlacement:
        """Where the request would go now, or what stands in its way; changes nothing. Raises InvalidArgument."""
        check_request(request)
        if request.without_gpus:
            return cpu.place(self.columns, request, self._datasets) or self.explain(request)
        return decide(self.columns, request, self._datasets) or self.explain(request)

    def fits(self, request: PlaceRequest) -> Placement | None:
        """As `place`, without the work of explaining a refusal."""
        check_request(request)
        return self.seek(request)

    def seek(self, request: PlaceRequest) -> Placement | None:
        """As `fits`, for a request that is known to be in order."""
        if request.without_gpus:
            return cpu.place(self.columns, request, self._datasets)
        return decide(self.columns, request, self._datasets)

    def place_on(self, request: PlaceRequest, where: Where) -> Placement | None:
        """The request on exactly these GPUs, whatever number it asks for; None when one of them cannot be had. Raises InvalidArgument."""
        check_request(request)
        return place_on(self.columns, request, where, self._datasets)

    def feasible(self, request: PlaceRequest) -> bool:
        """Whether the request fits now, for the least work: no cost, no reasons. It is not checked."""
        if request.without_gpus:
            return cpu.place(self.columns, request, self._datasets) is not None
        return feasible(self.columns, request, self._datasets)

    def explain(self, request: PlaceRequest) -> NoPlacement:
        """Why the request waits. Meant for requests that `place` refused; says so if it fits."""
        check_request(request)
        if request.without_gpus:
            return cpu.explain(self.columns, request, self._datasets, self._empty())
        return explain(self.columns, request, self._datasets, self._empty)

    def _empty(self) -> Columns:
        """The fleet with nothing placed and everything schedulable, to tell "not now" from "never"."""
        if self._empty_columns is None:
            rows = {name: replace(row, schedulable=True) for name, row in self._rows.items()}
            self._empty_columns = Columns(rows, self.fabric)
        return self._empty_columns

    def least_communication_s(self, request: PlaceRequest) -> float | None:
        """Of the request on the fleet with nothing placed and everything schedulable, seconds of a step; None: it does not fit there."""
        return self._least.of(request, self._empty(), self._datasets)

    def least_free_communication_s(self, request: PlaceRequest, placement: Placement, *, sought: Goal) -> float:
        """Of the request on what is free now, seconds of a step; never above that of `placement`, which was sought for that goal."""
        return least_free_s(placement, sought, request, self.columns, self._datasets)

    def explain_placed(self, id_: str) -> Placement:
        """The decision as it was made: reasons, cost and alternatives. Raises NotFound."""
        if id_ not in self._placed:
            raise NotFound("placement", id_)
        return self._placed[id_]

    def preempt(
        self, request: PlaceRequest, victims: Sequence[Victim], limit: Limit | None = None
    ) -> PreemptionPlan | NoPlacement:
        """The cheapest of `victims` to stop so that the request fits, and a limit lets it. Changes nothing."""
        check_request(request)
        if request.without_gpus:  # nobody is stopped for CPU alone
            return self.explain(request)
        return preemption.plan(self, request, victims, limit) or self.explain(request)

    # -- changing -------------------------------------------------------------------------------------------------------------

    def apply(self, placement: Placement) -> None:
        """The GPUs are taken. Also for placements made elsewhere or earlier, on nodes that take no new work, or that are gone.

        Raises AlreadyExists for a known id, Aborted when a GPU is not free; nothing is changed then.
        """
        if placement.id in self._placed:
            raise AlreadyExists("placement", placement.id)
        self._check_free(placement)
        self._add(placement)
        self._remember(lambda: self._drop(placement.id))

    def release(self, id_: str, nodes: Collection[str] | None = None) -> None:
        """The GPUs are free again; with `nodes` only those there, the rest stays held. Raises NotFound."""
        placement = self._placed.get(id_)
        if placement is None:
            raise NotFound("placement", id_)
        self._drop(id_)
        kept = () if nodes is None else tuple(a for a in placement.nodes if a.node not in nodes)
        if kept:
            self._add(replace(placement, nodes=kept))
        self._remember(lambda: self._restore(placement, dropped=not kept))

    def release_all(self, ids: Sequence[str]) -> None:
        """As `release` of each, in one pass over the nodes. Raises NotFound; nothing is changed then."""
        missing = next((id_ for id_ in ids if id_ not in self._placed), None)
        if missing is not None:
            raise NotFound("placement", missing)
        gone = {id_: (self._placed.pop(id_), self._flows.pop(id_)) for id_ in ids}
        _count_all(self.columns, gone.values(), -1)
        self._remember(lambda: self._restore_all(gone))

    def _restore_all(self, gone: Mapping[str, tuple[Placement, int]]) -> None:
        _count_all(self.columns, gone.values(), 1)
        for id_, (placement, flows) in gone.items():
            self._placed[id_], self._flows[id_] = placement, flows

    def amend(self, id_: str, nodes: Collection[str], parts: tuple[NodeAssignment, ...]) -> None:
        """What a placement without ranks holds on these nodes becomes `parts`; the rest stays, and is not looked at. Not inside of a transaction.

        Raises NotFound, Aborted when a GPU is not free; nothing is changed then.
        """
        self._outside_transactions("amend")
        before = self._placed.get(id_)
        if before is None:
            raise NotFound("placement", id_)
        gone = replace(before, nodes=tuple(part for part in before.nodes if part.node in nodes))
        came, kept = replace(before, nodes=parts), tuple(part for part in before.nodes if part.node not in nodes)
        if gone.nodes == parts:
            return
        _count(self.columns, gone, -1, flows=0)
        try:
            self._check_free(came)
        except Aborted:
            _count(self.columns, gone, 1, flows=0)
            raise
        _count(self.columns, came, 1, flows=0)
        self._placed[id_] = replace(before, nodes=kept + parts)
        if not kept and not parts:
            del self._placed[id_], self._flows[id_]

    def _restore(self, placement: Placement, *, dropped: bool) -> None:
        if not dropped:
            self._drop(placement.id)
        self._add(placement)

    def _add(self, placement: Placement) -> None:
        columns = self.columns
        self._placed[placement.id] = placement
        self._flows[placement.id] = _count(columns, placement, 1, flows=None)

    def _drop(self, id_: str) -> None:
        columns = self.columns
        _count(columns, self._placed.pop(id_), -1, flows=self._flows.pop(id_))

    def _check_free(self, placement: Placement) -> None:
        columns = self.columns
        seen: dict[int, int] = {}
        for part in placement.nodes:
            i = columns.index.get(part.node)
            if i is None:
                continue
            if part.share:
                self._check_share(columns, i, part)
                continue
            mask = columns.shape(i).mask(part.gpus)
            if mask & (columns.taken[i] | seen.get(i, 0)):
                raise Aborted(
                    f"{part.node}: a GPU of {part.gpus} is held by other work",
                    reason=ErrorReason.GPU_TAKEN,
                    metadata={"node": part.node},
                )
            seen[i] = seen.get(i, 0) | mask

    @staticmethod
    def _check_share(columns: Columns, i: int, part: NodeAssignment) -> None:
        share = part.share
        assert share is not None
        indices = columns.shape(i).indices
        for gpu in set(part.gpus):
            if gpu not in indices:
                continue
            position, count = indices.index(gpu), part.gpus.count(gpu)
            if not (columns.memory_free[i, position] >= share.memory_bytes * count):
                raise Aborted(
                    f"{part.node}: GPU {gpu} has no room for the share",
                    reason=ErrorReason.GPU_TAKEN,
                    metadata={"node": part.node},
                )

    # -- transactions ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """`with engine.transaction() as t: ...; t.commit()`. Nested ones undo their own part only. Nodes may not come or go inside."""
        _ = self.columns
        mark, this = len(self._undo), Transaction()
        self._depth += 1
        try:
            yield this
        finally:
            self._depth -= 1
            if not this.committed:
                while len(self._undo) > mark:
                    self._undo.pop()()
            if not self._depth:
                self._undo.clear()

    def _remember(self, inverse: Callable[[], None]) -> None:
        if self._depth:
            self._undo.append(inverse)

    def _outside_transactions(self, what: str) -> None:
        if self._depth:
            raise FailedPrecondition(
                f"{what} inside a transaction; commit or leave it first", reason=ErrorReason.IN_TRANSACTION
            )

    # -- reading --------------------------------------------------------------------------------------------------------------

    @property
    def placements(self) -> Mapping[str, Placement]:
        return self._placed

    @property
    def datasets(self) -> Collection[DatasetFact]:
        return self._datasets.values()

    @property
    def nodes(self) -> Mapping[str, Row]:
        return self._rows

    def prepare(self) -> None:
        """Works out what the next question would have to."""
        assert self.columns.count == self._empty().count

    def free_gpus(self) -> int:
        """Wholly free GPUs that new work may use now."""
        return self.columns.free

    def free_by_model(self) -> dict[str, int]:
        """Wholly free GPUs that new work may use now, by the model of the first GPU of their nodes; models without any are left out."""
        columns, found = self.columns, dict[str, int]()
        free = np.bincount(columns.shapes, weights=columns.offer, minlength=len(columns.kinds))
        for kind, gpus in zip(columns.kinds, free.tolist(), strict=True):
            if gpus:
                found[kind.models[0]] = found.get(kind.models[0], 0) + int(gpus)
        return found

    def room_of(self, request: PlaceRequest) -> NodeRoom:
        """What as many nodes as the request may have offer together; it is not placed while that is less than its GPUs."""
        together = max(request.level or Level.FLEET, request.group.level or Level.FLEET) >= Level.NODE
        return NodeRoom(self.columns, 1 if together else request.max_nodes)

    def could_use(self, name: str, request: PlaceRequest) -> bool:
        """Whether the node could give anything at all to the request now, alone or with others; a yes may be too hopeful."""
        row = self._rows.get(name)
        if row is None or not row.schedulable or name in request.exclude_nodes:
            return False
        if request.sites and row.node.site not in request.sites:
            return False
        if request.hard_locality and not self._data_stays(name, request.datasets):
            return False
        return could_use(self.columns, self.columns.index[name], request)

    def _data_stays(self, name: str, datasets: Collection[str]) -> bool:
        return self._datasets.here(name, datasets) and self.could_keep(name, datasets)

    def most_free(self, names: Iterable[str], model: str, level: Level) -> int:
        """The most wholly free GPUs in any one domain of `level` that holds one of the nodes: on nodes with that model, "": on all."""
        columns = self.columns
        rows = [columns.index[name] for name in names if name in columns.index]
        return columns.most_free(rows, model, level)

    def digest(self) -> str:
        """Equal digests mean equal decisions on equal requests."""
        return self.columns.digest()

    def check(self) -> None:
        """Rebuilds everything from nodes and placements and raises AssertionError where the live state differs, or a GPU is held twice."""
        live, fresh = self.columns, self._fresh()
        for what in ("taken", "usable", "offered", "holders", "free"):
            assert getattr(live, what) == getattr(fresh, what), f"{what} differs from a rebuild"
        assert live.digest() == fresh.digest(), "columns differ from a rebuild"
        _check_not_twice(live, self._placed.values())

    def _fresh(self) -> Columns:
        columns = Columns(self._rows, self.fabric)
        for id_ in sorted(self._placed):
            _count(columns, self._placed[id_], 1, flows=None)
        return columns


def _count(columns: Columns, placement: Placement, sign: int, flows: int | None) -> int:
    """Takes (+1) or gives back (-1) all that a placement holds; returns the flows it sends across domains."""
    masks: dict[int, int] = {}
    whole: list[int] = []
    for part in placement.nodes:
        i = columns.index.get(part.node)
        if i is None:
            continue
        if part.cpu_millicores or part.host_memory_bytes:
            columns.host(i, part.cpu_millicores, part.host_memory_bytes, sign)
        shape = columns.shape(i)
        if not part.gpus:
            continue
        mask = shape.mask(part.gpus)
        masks[i] = masks.get(i, 0) | mask
        if part.share:
            _count_shares(columns, i, part, sign)
        elif mask == columns.usable[i] == (1 << shape.size) - 1:
            whole.append(i)
        elif sign > 0:
            columns.take(i, mask)
        else:
            columns.give(i, mask)
    if len(whole) >= 8:
        columns.take_whole(whole, sign)
    else:
        for i in whole:
            (columns.take if sign > 0 else columns.give)(i, masks[i])
    parts = [(i, mask) for i, mask in masks.items() if mask]
    if len(parts) < 2:
        return 0
    if flows is None:
        flows = flows_of(columns, parts) if any(part.ranks for part in placement.nodes) else 0
    columns.cross([i for i, _ in parts], flows, sign)
    return flows


def _count_all(columns: Columns, placed: Iterable[tuple[Placement, int]], sign: int) -> None:
    """As `_count` of each, with its flows, where whole GPUs change node by node."""
    masks: dict[int, int] = {}
    for placement, flows in placed:
        rows = []
        for part in placement.nodes:
            i = columns.index.get(part.node)
            if i is None:
                continue
            if part.cpu_millicores or part.host_memory_bytes:
                columns.host(i, part.cpu_millicores, part.host_memory_bytes, sign)
            if not part.gpus:
                continue
            rows.append(i)
            if part.share:
                _count_shares(columns, i, part, sign)
            else:
                masks[i] = masks.get(i, 0) | columns.shape(i).mask(part.gpus)
        if flows:
            columns.cross(rows, flows, sign)
    columns.change_whole({i: mask for i, mask in masks.items() if mask}, free=sign < 0)


def _count_shares(columns: Columns, i: int, part: NodeAssignment, sign: int) -> None:
    share = part.share
    assert share is not None
    indices = columns.shape(i).indices
    for gpu in part.gpus:
        if gpu not in indices:
            continue
        columns.share(i, indices.index(gpu), share.memory_bytes, sign)


def _check_not_twice(columns: Columns, placements: Collection[Placement]) -> None:
    holder: dict[tuple[str, int], str] = {}
    for placement in placements:
        for part in placement.nodes:
            for gpu in part.gpus if not part.share else ():
                other = holder.setdefault((part.node, gpu), placement.id)
                assert other == placement.id, f"{part.node} GPU {gpu} held by {other} and {placement.id}"
    for i, position in columns.holders:
        assert columns.memory_free[i, position] >= 0, "memory of a GPU over-committed"
