"""Pins: which nodes hold a dataset also while no job needs it. What does not fit is refused here, before a byte is pulled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.retry import Backoff
from whaleflux.rpc import changes
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Put, Store, Unchanged
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.core.pins import Candidate, choose, does_not_fit, no_room
from whaleflux_inventory.data_quotas import DataQuotas

MAX_PINS = 256  # of one dataset
_WHOLE = (pb.DATASET_COPY_STATE_UNSPECIFIED, pb.DATASET_COPY_STATE_READY)
MAX_TTL = timedelta(days=366)
_PAUSES = Backoff(first_s=0.02, longest_s=0.5)


class DatasetPins:
    """Set and taken away by whom `Datasets` lets; read by the node that they name."""

    def __init__(self, store: Store, clock: Clock, quotas: DataQuotas) -> None:
        self._store, self._clock, self._quotas = store, clock, quotas

    async def pin(self, request: pb.PinDatasetRequest) -> Entry:
        """Adds pins, or lengthens them. Raises InvalidArgument, FailedPrecondition where it does not fit, or beyond its queue's quota.

        Written only if nobody else pinned anything since all datasets were looked at: two pins never count the same room. What agents report of
        copies all the time is in nobody's way, but for reports of this dataset.
        """
        self._check(request)
        queue = self._quotas.charged(request.queue)
        until = self._clock.now() + request.ttl.ToTimedelta() if request.HasField("ttl") else None
        for tried in range(records.ATTEMPTS):
            if tried:
                await self._clock.sleep(_PAUSES.pause_s(tried))
            epoch = await self._store.get(keys.DATASET_PINS_EPOCH)
            known = list(_readable((await self._store.list(keys.DATASETS)).entries))
            entry, record = next((pair for pair in known if pair[1].name == request.name), (None, pb.Dataset()))
            if entry is None:
                raise NotFound("dataset", request.name)
            candidates = await self._candidates(record, [one for _, one in known], until)
            nodes = self._nodes(request, record, candidates)
            now = self._clock.now()
            kept = [pin for pin in live(record, now) if pin.node not in nodes]
            if len(kept) + len(nodes) > MAX_PINS:
                raise InvalidArgument(
                    FieldViolation("nodes", f"make {len(kept) + len(nodes)} pins; at most {MAX_PINS} are possible")
                )
            new = [node for node in nodes if not any(p.node == node and p.queue == queue for p in live(record, now))]
            more = len(new) * record.size_bytes
            await self._quotas.check(queue, more, [one for _, one in known], now, record.name)
            self._write(
                record, [*kept, *(self._pin(node, until, queue) for node in nodes)], f"pinned to {', '.join(nodes)}"
            )
            value = record.SerializeToString(deterministic=True)
            alone = Unchanged(epoch) if epoch else Absent(keys.DATASET_PINS_EPOCH)
            writes = Put(entry.key, value), Put(keys.DATASET_PINS_EPOCH, b"")
            try:
                revision = await self._store.commit(*writes, when=[Unchanged(entry), alone])
            except ConditionFailed:
                continue
            return Entry(entry.key, value, revision, entry.created, entry.version + 1)
        raise records.contended(request.name)

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
        entries = (await self._store.list(keys.DATASETS)).entries
        return [dataset for _, dataset in _readable(entries) if node in pinned_on(dataset, self._clock.now())]

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

    async def _candidates(
        self, pinned: pb.Dataset, datasets: Iterable[pb.Dataset], until: datetime | None
    ) -> dict[str, Candidate]:
        """Nodes that could hold it until then (None: without end), with what is pinned there beside it."""
        now, held = self._clock.now(), dict[str, int]()
        for dataset in datasets:
            for node in pinned_on(dataset, now) if dataset.name != pinned.name else ():
                held[node] = held.get(node, 0) + dataset.size_bytes
        here = {copy.node for copy in pinned.copies if copy.state in _WHOLE and copy.present_bytes}
        nodes = (pb.Node.FromString(entry.value) for entry in (await self._store.list(keys.NODES)).entries)
        go = {lease.node for lease in _leases((await self._store.list(keys.LEASES)).entries) if _goes(lease, until)}
        return {
            node.name: Candidate(
                node.name,
                node.facts.dataset_cache_bytes,
                held.get(node.name, 0),
                holds=node.name in here,
                stays=node.name not in go,
            )
            for node in nodes
            if node.intent in (pb.NODE_INTENT_UNSPECIFIED, pb.NODE_INTENT_ACTIVE)
        }

    def _pin(self, node: str, until: datetime | None, queue: str) -> pb.DatasetPin:
        pin = pb.DatasetPin(node=node, author=changes.actor(), queue=queue)
        pin.create_time.FromDatetime(self._clock.now())
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


def _readable(entries: Iterable[Entry]) -> Iterator[tuple[Entry, pb.Dataset]]:
    """Those that can be read; the others are named where datasets are listed."""
    for entry in entries:
        with contextlib.suppress(DecodeError):
            yield entry, pb.Dataset.FromString(entry.value)


def _leases(entries: Iterable[Entry]) -> Iterator[pb.Lease]:
    """Those that can be read: what is not known of a lease keeps nobody from pinning."""
    for entry in entries:
        with contextlib.suppress(DecodeError):
            yield pb.Lease.FromString(entry.value)


def _goes(lease: pb.Lease, until: datetime | None) -> bool:
    """Whether its machine is given back before then."""
    return bool(lease.end_reason) or until is None or lease.hard_end_time.ToDatetime(UTC) < until


def live(dataset: pb.Dataset, now: datetime) -> list[pb.DatasetPin]:
    """Its pins that have not ended."""
    return [pin for pin in dataset.pins if not pin.HasField("expire_time") or pin.expire_time.ToDatetime(UTC) > now]


def pinned_on(dataset: pb.Dataset, now: datetime) -> set[str]:
    """Nodes that hold it until then."""
    return {pin.node for pin in live(dataset, now)}
