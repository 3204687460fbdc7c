"""What datasets consist of: recorded by the first node that read one, in the transaction that names it in the dataset's record."""

from __future__ import annotations

import zlib

from whaleflux import names
from whaleflux.data import manifest
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.rpc import changes
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records


async def read(store: Store, dataset: str) -> pb.DatasetManifest:
    """Empty while it is not known."""
    entry = await store.get(_key(dataset))
    return pb.DatasetManifest.FromString(zlib.decompress(entry.value)) if entry else pb.DatasetManifest()


def forget(dataset: str) -> Delete:
    """Belongs into the transaction that deletes the dataset."""
    return Delete(_key(dataset))


async def record(store: Store, request: pb.SetDatasetManifestRequest) -> Entry:
    """The dataset with the manifest that counts: this one, or an earlier one. Raises InvalidArgument, NotFound, Aborted."""
    names.split(request.dataset, "datasets", field="dataset")
    found, packed = _checked(request.manifest)
    for _ in range(records.ATTEMPTS):
        entry = await records.read(store, keys.DATASETS, request.dataset, "dataset")
        dataset = pb.Dataset.FromString(entry.value)
        if request.HasField("dataset_create_time") and request.dataset_create_time != dataset.create_time:
            raise FailedPrecondition(
                f"{request.dataset} was declared anew while it was read: it is another dataset; read that one"
            )
        if dataset.manifest_digest:
            return entry
        _name_in(dataset, found)
        value = dataset.SerializeToString(deterministic=True)
        writes = (Put(entry.key, value), Put(_key(request.dataset), packed))
        try:
            revision = await store.commit(*writes, when=[Unchanged(entry)])
        except ConditionFailed:
            continue
        return Entry(entry.key, value, revision, entry.created, entry.version + 1)
    raise records.contended(request.dataset)


def declare(dataset: pb.Dataset, message: pb.DatasetManifest) -> Put:
    """Names it in a new dataset; what is returned belongs into the transaction that makes that. Raises InvalidArgument."""
    found, packed = _checked(message)
    _name_in(dataset, found)
    return Put(_key(dataset.name), packed)


def _name_in(dataset: pb.Dataset, found: manifest.Manifest) -> None:
    dataset.manifest_digest, dataset.file_count = found.digest, len(found.files)
    dataset.size_bytes, dataset.manifest_author = found.size_bytes, changes.actor()
    del dataset.makers[:]


def _checked(message: pb.DatasetManifest) -> tuple[manifest.Manifest, bytes]:
    """The manifest, and as it is stored."""
    try:
        found = manifest.from_proto(message)
        packed = zlib.compress(found.to_proto().SerializeToString(deterministic=True))
        if len(packed) > manifest.MAX_PACKED_BYTES:
            raise manifest.ManifestWrong(
                f"has {len(packed)} bytes when packed, at most {manifest.MAX_PACKED_BYTES} are possible; pack its files (tar, parquet)"
            )
    except manifest.ManifestWrong as wrong:
        raise InvalidArgument(FieldViolation("manifest", str(wrong))) from None
    return found, packed


def _key(dataset: str) -> str:
    return keys.of_name(keys.DATASET_MANIFESTS, dataset)
