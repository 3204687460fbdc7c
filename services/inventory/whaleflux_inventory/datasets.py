"""Datasets: what jobs read, and which nodes hold a copy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from whaleflux import hostport, names
from whaleflux.clock import Clock
from whaleflux.data import uris
from whaleflux.errors import Aborted, AlreadyExists, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Put, Store
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, dataset_manifests, records
from whaleflux_inventory.core.facts import MAX_DISK_BYTES, Findings
from whaleflux_inventory.data_quotas import DataQuotas
from whaleflux_inventory.dataset_makers import note_maker
from whaleflux_inventory.dataset_pins import DatasetPins

SecretProblem = Callable[[str], Awaitable[str]]
"""Why the caller may not use a secret, by its name; "" when it may."""
MAX_URI = 2048
MAX_COPIES = 10_000
MAX_MEMBERS = 1_000
MAX_MESSAGE = 512
MAX_ADDRESS = 256


class Datasets:
    """Declared by people, reported on by agents."""

    def __init__(self, store: Store, clock: Clock, secret_problem: SecretProblem, quotas: DataQuotas) -> None:
        self._store, self._clock, self._secret_problem = store, clock, secret_problem
        self.pins = DatasetPins(store, clock, quotas)

    async def create(self, request: pb.CreateDatasetRequest) -> pb.Dataset:
        """Declares a dataset; the same request again (by its request_id) answers with what it made."""
        names.check_id("dataset_id", request.dataset_id)
        found = Findings()
        found.text("request_id", request.request_id, 128)
        found.text("dataset.uri", request.dataset.uri, MAX_URI)
        if not uris.readable_by_agents(request.dataset.uri):
            found.add("dataset.uri", uris.WANTED)
        if uris.has_credentials(request.dataset.uri):
            found.add("dataset.uri", uris.PASSWORD_INSIDE)
        found.number("dataset.size_bytes", request.dataset.size_bytes, 0, MAX_DISK_BYTES)
        await self._check_credentials(request.dataset, found)
        _check_members(request.dataset.members, found)
        found.raise_if_any()
        dataset = pb.Dataset(
            name=names.dataset(request.dataset_id),
            uri=request.dataset.uri,
            size_bytes=request.dataset.size_bytes,
            request_fingerprint=convert.fingerprint(
                request.request_id, request.dataset_id, request.dataset, request.manifest
            ),
            owner=auth.caller().subject,
            members=dict.fromkeys(request.dataset.members),
        )
        if request.dataset.HasField("credentials"):
            dataset.credentials.CopyFrom(request.dataset.credentials)
            dataset.credentials.owner = changes.actor()
        dataset.create_time.FromDatetime(self._clock.now())
        dataset.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        known = [dataset_manifests.declare(dataset, request.manifest)] if request.HasField("manifest") else []
        key, value = keys.of_name(keys.DATASETS, dataset.name), dataset.SerializeToString()
        try:
            revision = await self._store.commit(Put(key, value), *known, when=[Absent(key)])
        except ConditionFailed:
            return await self._made_before(dataset)
        return convert.dataset_of(Entry(key, value, revision, revision))

    async def _check_credentials(self, dataset: pb.Dataset, found: Findings) -> None:
        """A secret that whoever declares the dataset may use, for a server that may be shown it."""
        if not dataset.HasField("credentials"):
            return
        if not uris.may_be_shown_credentials(dataset.uri):
            found.add(
                "dataset.uri",
                "must be https:// where a secret is shown to its server; anybody on the way could read it otherwise",
            )
        try:
            names.split(dataset.credentials.secret, "secrets")
        except InvalidArgument as wrong:
            found.add("dataset.credentials.secret", wrong.violations[0].description)
        else:
            if problem := await self._secret_problem(dataset.credentials.secret):
                found.add("dataset.credentials.secret", problem)

    async def _made_before(self, dataset: pb.Dataset) -> pb.Dataset:
        entry = await self._store.get(keys.of_name(keys.DATASETS, dataset.name))
        there = convert.dataset_of(entry) if entry else pb.Dataset()
        same = (there.request_fingerprint, there.owner) == (dataset.request_fingerprint, dataset.owner)
        if not (dataset.request_fingerprint and same):
            raise AlreadyExists("dataset", dataset.name, "choose another name")
        return there

    async def get(self, name: str) -> pb.Dataset:
        """One dataset with its copies."""
        return convert.dataset_of(await self._seen(name))

    async def page(self, request: pb.ListDatasetsRequest) -> Page[pb.Dataset]:
        """One page of the datasets that are there for the caller."""
        size = page_size(request.page_size)
        ownership.note_asked()
        return await list_page(
            self._store, keys.DATASETS, convert.dataset_of, size=size, token=request.page_token, keep=_sees
        )

    async def delete(self, request: pb.DeleteDatasetRequest) -> None:
        """Forgets a dataset; for its owner, a group that it names, and operators."""
        entry = await self._theirs(request.name)
        marked = pb.Dataset.FromString(entry.value)
        check_etag(request.etag, entry)
        marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            forgotten = dataset_manifests.forget(request.name)
            await changes.delete(self._store, entry, marked.SerializeToString(), also=[forgotten])
        except ConditionFailed:
            raise Aborted(f"{request.name} changed while it was being deleted; read it again") from None

    async def pin(self, request: pb.PinDatasetRequest) -> pb.Dataset:
        """Has nodes hold it; for whom may forget it, too."""
        await self._theirs(request.name)
        return convert.dataset_of(await self.pins.pin(request))

    async def unpin(self, request: pb.UnpinDatasetRequest) -> pb.Dataset:
        """Takes pins away."""
        await self._theirs(request.name)
        return convert.dataset_of(await self.pins.unpin(request))

    async def _theirs(self, name: str) -> Entry:
        """The record, for its owner, a group that it names, and operators; else NotFound or PermissionDenied."""
        entry = await self._seen(name)
        dataset = pb.Dataset.FromString(entry.value)
        if not ownership.may_change(auth.principal(), dataset.owner, _access(dataset)):
            raise ownership.not_owner(name, dataset.owner)
        return entry

    async def _seen(self, name: str) -> Entry:
        """The record; raises NotFound, the same for one that is not there for the caller."""
        names.split(name, "datasets")
        entry = await self._store.get(keys.of_name(keys.DATASETS, name))
        if entry is None or not _sees(pb.Dataset.FromString(entry.value)):
            ownership.note_asked()
            raise NotFound("dataset", name)
        return entry

    async def manifest(self, name: str) -> pb.DatasetManifest:
        """What it consists of; empty while that is not known."""
        await self._seen(name)
        return await dataset_manifests.read(self._store, name)

    async def set_manifest(self, request: pb.SetDatasetManifestRequest) -> pb.Dataset:
        """Records what a node found it to be, unless that is known: then it is told what counts."""
        return convert.dataset_of(await dataset_manifests.record(self._store, request))

    async def report_copy(self, request: pb.ReportCachedDatasetRequest) -> pb.Dataset:
        """Replaces what is known of one node's copy; 0 bytes present: the node has none any more."""
        names.split(request.dataset, "datasets", field="dataset")
        names.split(request.copy.node, "sites", "nodes", field="copy.node")
        found = Findings()
        found.number("copy.present_bytes", request.copy.present_bytes, 0, MAX_DISK_BYTES)
        found.text("copy.message", request.copy.message, MAX_MESSAGE)
        found.text("copy.manifest_digest", request.copy.manifest_digest, 64)
        _check_address(request.copy.address, found)
        found.raise_if_any()

        def note(dataset: pb.Dataset) -> None:
            others = [copy for copy in dataset.copies if copy.node != request.copy.node]
            mine = [request.copy] if request.copy.present_bytes or request.copy.state in _WITHOUT_BYTES else []
            copies = sorted([*others[: MAX_COPIES - 1], *mine], key=lambda copy: copy.node)
            del dataset.copies[:]
            dataset.copies.extend(copies)
            note_maker(dataset, request.copy, self._clock.now())

        entry = await records.change(self._store, keys.DATASETS, request.dataset, pb.Dataset, note, kind="dataset")
        return convert.dataset_of(entry)


_WITHOUT_BYTES = (pb.DATASET_COPY_STATE_PULLING, pb.DATASET_COPY_STATE_FAILED)


def _access(dataset: pb.Dataset) -> Access:
    return Access(frozenset(dataset.members))


def _sees(dataset: pb.Dataset) -> bool:
    """Whether it is there for the caller. Agents fetch what jobs name, and jobs name only what their owners may use."""
    who = auth.principal()
    seen = ownership.may_see(who, _access(dataset)) or ownership.is_owner(who, dataset.owner)
    return seen or who.role == roles.AGENT


def _check_address(address: str, found: Findings) -> None:
    found.text("copy.address", address, MAX_ADDRESS)
    try:
        _ = address and hostport.parse(address)
    except InvalidArgument as wrong:
        found.add("copy.address", wrong.violations[0].description)


def _check_members(members: Sequence[str], found: Findings) -> None:
    if len(members) > MAX_MEMBERS:
        found.add("dataset.members", f"are {len(members)}; name at most {MAX_MEMBERS}, or a group")
    for i, member in enumerate(members[:MAX_MEMBERS]):
        if not names.is_member(member):
            found.add(f"dataset.members[{i}]", f"{member[:80]!r} is neither users/NAME nor groups/NAME")
