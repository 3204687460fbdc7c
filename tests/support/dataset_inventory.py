"""Inventory, as far as agents' datasets need it: in memory, with its own rule of who makes a manifest."""

from datetime import UTC, datetime

from whaleflux.data import manifest
from whaleflux.errors import NotFound, Unavailable
from whaleflux.v1 import inventory_pb2
from whaleflux_inventory.dataset_makers import note_maker

STATE = "DATASET_COPY_STATE_"


class Inventory:
    """Knows every dataset that it has a source of, and what the first node found it to be."""

    def __init__(self, uri, **others):
        self.uris = {"datasets/c4": str(uri), **{f"datasets/{name}": str(uri) for name, uri in others.items()}}
        self.manifests, self.copies, self.away, self.pinned = {}, {}, False, []
        self.members, self.pins = [], []
        self.away_for = set()  # datasets of which nothing is said
        self.declared_s = {}  # when, by dataset
        self.rights = {}  # owner and members by dataset, where they are not those of all
        self.tells_pins, self.makers, self.now = True, {}, datetime(2026, 1, 1, tzinfo=UTC)

    def _dataset(self, name):
        if self.away or name in self.away_for:
            raise Unavailable("nobody answers")
        if name not in self.uris:
            raise NotFound("dataset", name)
        found = inventory_pb2.Dataset(name=name, uri=self.uris[name])
        if name in self.declared_s:
            found.create_time.FromSeconds(self.declared_s[name])
        found.owner, members = self.rights.get(name, ("", self.members))
        found.members.extend(members)
        found.pins.extend(inventory_pb2.DatasetPin(node=node) for node in self.pins)
        found.makers.extend(self.makers.get(name, ()))
        found.copies.extend({copy.node: copy for copy in self.copies.get(name, ())}.values())
        if known := self.manifests.get(name):
            found.manifest_digest = manifest.from_proto(known).digest
        return found

    async def GetDataset(self, request, timeout):
        return self._dataset(request.name)

    async def GetDatasetManifest(self, request, timeout):
        return self.manifests[request.name]

    async def SetDatasetManifest(self, request, timeout):
        self.manifests.setdefault(request.dataset, request.manifest)
        return self._dataset(request.dataset)

    async def ListNodePins(self, request, timeout):
        if not self.tells_pins:
            raise Unavailable("nobody answers")
        return inventory_pb2.ListNodePinsResponse(datasets=[self._dataset(name) for name in self.pinned])

    async def ReportCachedDataset(self, request, timeout):
        self.copies.setdefault(request.dataset, []).append(request.copy)
        found = self._dataset(request.dataset)
        note_maker(found, request.copy, self.now)
        self.makers[request.dataset] = list(found.makers)
        return self._dataset(request.dataset)

    def states(self, name):
        return [
            inventory_pb2.DatasetCopyState.Name(copy.state).removeprefix(STATE) for copy in self.copies.get(name, ())
        ]
