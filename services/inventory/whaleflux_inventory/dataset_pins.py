"""Pins: which nodes hold a dataset also while no job needs it. What does not fit is refused here, before a byte is pulled."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.reasons import What
from whaleflux.rpc import changes
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.core.pins import Candidate, choose, does_not_fit, no_room

MAX_PINS = 256  # of one dataset
_WHOLE = (pb.DATASET_COPY_STATE_UNSPECIFIED, pb.DATASET_COPY_STATE_READY)
MAX_TTL = timedelta(days=366)


class DatasetPins:
    """Set and taken away by whom `Datasets` lets; read by the node that they name."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def pin(self, request: pb.PinDatasetRequest, entry: Entry) -> Entry:
        """Adds pins, or lengthens them. Raises InvalidArgument, FailedPrecondition where it does not fit."""
        self._check(request)
        dataset = pb.Dataset.FromString(entry.value)
        candidates = await self._candidates(dataset)
        nodes = self._nodes(request, dataset, candidates)
        until = self._clock.now() + request.ttl.ToTimedelta() if request.HasField("ttl") else None

        def add(record: pb.Dataset) -> None:
            kept = [pin for pin in live(record, self._clock.now()) if pin.node not in nodes]
            if len(kept) + len(nodes) > MAX_PINS:
                raise InvalidArgument(
                    FieldViolation("nodes", f"make {len(kept) + len(nodes)} pins; at most {MAX_PINS} are possible")
                )
            made = [self._pin(node, until) for node in nodes]
            self._write(record, [*kept, *made], f"pinned to {', '.join(nodes)}")

        return await self._changed(request.name, add)

    async def unpin(self, request: pb.UnpinDatasetRequest) -> Entry:
        """Takes the pins of these nodes away; none named: all."""
        for at, node in enumerate(request.nodes):
            names.split(node, "sites", "nodes", field=f"nodes[{at}]")
        gone = set(request.nodes)

        def take(record: pb.Dataset) -> None:
            kept = [pin for pin in live(record, self._clock.now()) if gone and pin.node not in gone]
            self._write(record, kept, f"not pinned to {', '.join(sorted(gone)) or 'any node'} any more")

        return await self._changed(request.name, take)

    async def of_node(self, node: str) -> list[pb.Dataset]:
        """Datasets with a pin there that has not ended."""
        return [dataset async for dataset in self._all() if node in pinned_on(dataset, self._clock.now())]

    def _check(self, request: pb.PinDatasetRequest) -> None:
        found = Findings()
        found.number("copies", request.copies, 0, MAX_PINS)
        if bool(request.copies) == bool(request.nodes):
            found.add("nodes", "or copies, one of the two: name nodes, or say how many inventory chooses")
        if request.HasField("ttl") and not timedelta(0) < request.ttl.ToTimedelta() <= MAX_TTL:
            found.add("ttl", "is not above 0 and at most 366 days; leave it out for a pin without end")
        found.raise_if_any()
        for at, node in enumerate(request.nodes):
            names.split(node, "sites", "nodes", field=f"nodes[{at}]")

    def _nodes(self, request: pb.PinDatasetRequest, dataset: pb.Dataset, candidates: dict[str, Candidate]) -> list[str]:
        if request.copies:
            return choose(candidates.values(), dataset.size_bytes, request.copies, dataset.name)
        nodes = list(dict.fromkeys(request.nodes))
        for at, node in enumerate(nodes):
            if node not in candidates:
                raise InvalidArgument(
                    FieldViolation(f"nodes[{at}]", f"{node!r} is no node that takes work; see: whaleflux nodes")
                )
            if why := no_room(candidates[node], dataset.size_bytes):
                raise does_not_fit(dataset.name, why)
        return nodes

    async def _candidates(self, pinned: pb.Dataset) -> dict[str, Candidate]:
        """Nodes that could hold it, with what is pinned there beside it."""
        now, held = self._clock.now(), dict[str, int]()
        async for dataset in self._all():
            for node in pinned_on(dataset, now) if dataset.name != pinned.name else ():
                held[node] = held.get(node, 0) + dataset.size_bytes
        here = {copy.node for copy in pinned.copies if copy.state in _WHOLE and copy.present_bytes}
        nodes = (pb.Node.FromString(entry.value) for entry in (await self._store.list(keys.NODES)).entries)
        return {
            node.name: Candidate(node.name, node.facts.dataset_cache_bytes, held.get(node.name, 0), node.name in here)
            for node in nodes
            if node.intent in (pb.NODE_INTENT_UNSPECIFIED, pb.NODE_INTENT_ACTIVE)
        }

    async def _all(self) -> AsyncIterator[pb.Dataset]:
        for entry in (await self._store.list(keys.DATASETS)).entries:
            with contextlib.suppress(DecodeError):  # named as unreadable where datasets are listed
                yield pb.Dataset.FromString(entry.value)

    def _pin(self, node: str, until: datetime | None) -> pb.DatasetPin:
        pin = pb.DatasetPin(node=node, author=changes.actor())
        if until is not None:
            pin.expire_time.FromDatetime(until)
        return pin

    def _write(self, record: pb.Dataset, pins: Iterable[pb.DatasetPin], why: str) -> None:
        wanted = sorted(pins, key=lambda pin: pin.node)
        if list(record.pins) == wanted:
            return
        del record.pins[:]
        record.pins.extend(wanted)
        record.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), why))

    async def _changed(self, name: str, how: Callable[[pb.Dataset], None]) -> Entry:
        return await records.change(self._store, keys.DATASETS, name, pb.Dataset, how, kind="dataset")


def live(dataset: pb.Dataset, now: datetime) -> list[pb.DatasetPin]:
    """Its pins that have not ended."""
    return [pin for pin in dataset.pins if not pin.HasField("expire_time") or pin.expire_time.ToDatetime(UTC) > now]


def pinned_on(dataset: pb.Dataset, now: datetime) -> set[str]:
    """Nodes that hold it until then."""
    return {pin.node for pin in live(dataset, now)}
