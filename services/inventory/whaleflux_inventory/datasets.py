"""Datasets: what jobs read, and which nodes hold a copy."""

from __future__ import annotations

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, Conflict
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records
from whaleflux_inventory.core.facts import MAX_DISK_BYTES, Findings

MAX_URI = 2048
MAX_COPIES = 10_000


class Datasets:
    """Declared by people, reported on by agents."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def create(self, request: pb.CreateDatasetRequest) -> pb.Dataset:
        """Declares a dataset; the same request again (by its request_id) answers with what it made."""
        names.check_id("dataset_id", request.dataset_id)
        found = Findings()
        found.text("request_id", request.request_id, 128)
        found.text("dataset.uri", request.dataset.uri, MAX_URI)
        if not request.dataset.uri:
            found.add("dataset.uri", "is empty; give a path or URL that agents can read")
        found.number("dataset.size_bytes", request.dataset.size_bytes, 0, MAX_DISK_BYTES)
        found.raise_if_any()
        dataset = pb.Dataset(
            name=f"datasets/{request.dataset_id}",
            uri=request.dataset.uri,
            size_bytes=request.dataset.size_bytes,
            request_fingerprint=convert.fingerprint(request.request_id, request.dataset_id, request.dataset),
        )
        dataset.create_time.FromDatetime(self._clock.now())
        key, value = keys.of_name(keys.DATASETS, dataset.name), dataset.SerializeToString()
        try:
            revision = await self._store.commit(Put(key, value), when=[Absent(key)])
        except ConditionFailed:
            return await self._made_before(dataset)
        return convert.dataset_of(Entry(key, value, revision, revision))

    async def _made_before(self, dataset: pb.Dataset) -> pb.Dataset:
        entry = await self._store.get(keys.of_name(keys.DATASETS, dataset.name))
        there = convert.dataset_of(entry) if entry else pb.Dataset()
        if not dataset.request_fingerprint or there.request_fingerprint != dataset.request_fingerprint:
            raise AlreadyExists("dataset", dataset.name)
        return there

    async def get(self, name: str) -> pb.Dataset:
        """One dataset with its copies."""
        names.split(name, "datasets")
        return convert.dataset_of(await records.read(self._store, keys.DATASETS, name, "dataset"))

    async def page(self, request: pb.ListDatasetsRequest) -> Page[pb.Dataset]:
        """One page of datasets."""
        size = page_size(request.page_size)
        return await list_page(self._store, keys.DATASETS, convert.dataset_of, size=size, token=request.page_token)

    async def delete(self, request: pb.DeleteDatasetRequest) -> None:
        """Forgets a dataset."""
        names.split(request.name, "datasets")
        entry = await records.read(self._store, keys.DATASETS, request.name, "dataset")
        check_etag(request.etag, entry)
        try:
            await self._store.commit(Delete(entry.key), when=[Unchanged(entry)])
        except ConditionFailed:
            raise Conflict(f"{request.name} changed while it was being deleted; read it again") from None

    async def report_copy(self, request: pb.ReportCachedDatasetRequest) -> pb.Dataset:
        """Replaces what is known of one node's copy; 0 bytes present: the node has none any more."""
        names.split(request.dataset, "datasets", field="dataset")
        names.split(request.copy.node, "sites", "nodes", field="copy.node")
        found = Findings()
        found.number("copy.present_bytes", request.copy.present_bytes, 0, MAX_DISK_BYTES)
        found.raise_if_any()

        def note(dataset: pb.Dataset) -> None:
            others = [copy for copy in dataset.copies if copy.node != request.copy.node]
            mine = [request.copy] if request.copy.present_bytes else []
            copies = sorted([*others[: MAX_COPIES - 1], *mine], key=lambda copy: copy.node)
            del dataset.copies[:]
            dataset.copies.extend(copies)

        entry = await records.change(self._store, keys.DATASETS, request.dataset, pb.Dataset, note, kind="dataset")
        return convert.dataset_of(entry)
