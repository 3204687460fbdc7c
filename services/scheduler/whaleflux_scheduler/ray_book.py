"""Ray clusters in the store: made, changed and given up by people through any replica; what follows is the leader's (`ray_loop`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from whaleflux.manifests.ray_file import IDLE_S
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import changes
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Present, Put, Store, Unchanged
from whaleflux.trust import audit, ownership
from whaleflux.trust.sight import Sight
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import ray_clusters
from whaleflux_scheduler.fleet_sites import FleetSites
from whaleflux_scheduler.job_access import JobAccess, queue_not_there
from whaleflux_scheduler.job_verbs import RACES, contended
from whaleflux_scheduler.ray_records import RAY_CLUSTERS, in_words

UPDATABLE = ("priority", "max_gpus", "sites", "gpu_types", "idle")
_ASKED = (*UPDATABLE, "queue", "python", "head_cpu_millicores", "head_memory_bytes", "address")
_SITES = "ray_cluster.sites"
MOST_SAID = 20
MOST_KEPT = 200  # clusters of a fleet: the leader looks at each of them every second
Status = Callable[[str], pb.RayClusterStatus | None]


class RayBook:
    """`status` says what the leader knows of a cluster; None where this replica does not lead."""

    def __init__(self, store: Store, access: JobAccess, clock: Clock, status: Status, sites: FleetSites) -> None:
        self._store, self._access, self._clock, self._status, self._sites = store, access, clock, status, sites

    # reading

    async def get(self, name: str, sight: Sight) -> pb.RayCluster:
        """Raises NotFound, for one that is not there for the caller too."""
        return self._shown(await self._entry(name, sight), sight, whole=True)

    async def page(self, request: pb.ListRayClustersRequest, sight: Sight) -> Page[pb.RayCluster]:
        """Those that are there for the caller."""
        ownership.note_asked()
        return await list_page(
            self._store,
            keys.RAY_CLUSTERS,
            lambda entry: self._shown(entry, sight, whole=False),
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda one: _sees(one, sight),
        )

    async def _entry(self, name: str, sight: Sight) -> Entry:
        names.split(name, "rayClusters")
        ownership.note_asked()
        entry = await self._store.get(keys.of_name(keys.RAY_CLUSTERS, name))
        if entry is None or not _sees(RAY_CLUSTERS.read(entry.value), sight):
            raise NotFound("ray_cluster", name, "list what there is with: whaleflux ray ls")
        return entry

    def _shown(self, entry: Entry, sight: Sight, *, whole: bool) -> pb.RayCluster:
        """Who sees it and does not read what is private of its jobs reads neither how to reach it nor what runs in it."""
        message = pb.RayCluster()
        message.CopyFrom(RAY_CLUSTERS.read(entry.value))
        message.etag = etag_of(entry)
        if not sight.reads(names.last(message.queue), message.creator):
            message.ClearField("address")
            message.ClearField("python")
            return message
        if (status := self._status(message.name)) is not None:
            message.status.CopyFrom(status)
            if not whole:
                message.status.ClearField("demand")
        return message

    # changing

    async def create(self, request: pb.CreateRayClusterRequest) -> pb.RayCluster:
        """A repeated request (by its request_id) answers with what the first made."""
        name = names.ray_cluster(names.check_id("ray_cluster_id", request.ray_cluster_id))
        message, now = _asked(request.ray_cluster, name), self._clock.now()
        _refuse(ray_clusters.id_mistakes(names.last(name)))
        _check(message)
        await self._sites.check(_SITES, message.sites)
        queue = names.last(message.queue)
        await self._access.check_use(queue, message.priority)
        message.creator, message.uid = changes.actor(), names.ulid()
        message.create_time.FromDatetime(now)
        message.state_time.FromDatetime(now)
        message.last_change.CopyFrom(changes.asked(What.CREATED, now, in_words(message)))
        key = keys.of_name(keys.RAY_CLUSTERS, name)
        for _ in range(RACES):
            if (existing := await self._store.get(key)) is not None:
                return self._made_before(existing, message, request)
            await self._check_number()
            if request.validate_only:
                return message
            with contextlib.suppress(ConditionFailed):
                put, there = Put(key, RAY_CLUSTERS.pack(message)), Present(keys.QUEUES + queue)
                message.etag = f'"{await self._store.commit(put, when=[Absent(key), there])}"'
                return message
            if await self._store.get(keys.QUEUES + queue) is None:
                raise queue_not_there(queue)
        raise contended(name)

    async def update(self, request: pb.UpdateRayClusterRequest) -> pb.RayCluster:
        """Sets the fields that the mask names."""
        paths, sight = paths_of(request.update_mask.paths, UPDATABLE), self._access.sight()
        for _ in range(RACES):
            entry = await self._entry(request.ray_cluster.name, sight)
            message = self._for_change(entry, sight, request.ray_cluster.etag)
            _check_up(message)
            audit.note(before=in_words(message))
            for path in paths:
                _set(message, request.ray_cluster, path)
            _check(message)
            await self._sites.check(_SITES, message.sites if "sites" in paths else ())
            self._access.check_priority(names.last(message.queue), message.priority)
            if request.validate_only:
                return message
            message.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), in_words(message)))
            if (written := await self._write(entry, message)) is not None:
                return self._shown(written, sight, whole=False)
        raise contended(request.ray_cluster.name)

    async def delete(self, request: pb.DeleteRayClusterRequest) -> pb.RayCluster:
        """From now on it is taken down; the same again changes nothing."""
        sight = self._access.sight()
        for _ in range(RACES):
            entry = await self._entry(request.name, sight)
            message = self._for_change(entry, sight, request.etag)
            if message.state == pb.RAY_CLUSTER_STATE_ENDING:
                return self._shown(entry, sight, whole=False)
            message.state, now = pb.RAY_CLUSTER_STATE_ENDING, self._clock.now()
            message.state_time.FromDatetime(now)
            message.last_change.CopyFrom(changes.deletion(now))
            if (written := await self._write(entry, message)) is not None:
                return self._shown(written, sight, whole=False)
        raise contended(request.name)

    def _for_change(self, entry: Entry, sight: Sight, etag: str) -> pb.RayCluster:
        message = pb.RayCluster()
        message.CopyFrom(RAY_CLUSTERS.read(entry.value))
        if not sight.changes(names.last(message.queue), message.creator):
            raise ownership.not_owner(message.name, message.creator)
        check_etag(etag, entry)
        return message

    async def _write(self, entry: Entry, message: pb.RayCluster) -> Entry | None:
        """None: it changed meanwhile."""
        value = RAY_CLUSTERS.pack(message)
        try:
            revision = await self._store.commit(Put(entry.key, value), when=[Unchanged(entry)])
        except ConditionFailed:
            return None
        return Entry(entry.key, value, revision, entry.created)

    async def _check_number(self) -> None:
        known = await self._store.list(keys.RAY_CLUSTERS, limit=MOST_KEPT)
        if len(known.entries) >= MOST_KEPT:
            raise FailedPrecondition(
                f"there are {MOST_KEPT} Ray clusters, which is the most; take one down with: whaleflux ray down NAME",
                reason=ErrorReason.WRONG_STATE,
            )

    def _made_before(
        self, existing: Entry, wanted: pb.RayCluster, request: pb.CreateRayClusterRequest
    ) -> pb.RayCluster:
        found = RAY_CLUSTERS.read(existing.value)
        same = all(getattr(found, path) == getattr(wanted, path) for path in _ASKED)
        sight = self._access.sight()
        if not (request.request_id and same and found.creator == wanted.creator and _sees(found, sight)):
            again = "change its bounds with: whaleflux ray up FILE, or choose another name"
            raise AlreadyExists("ray_cluster", found.name, again)
        return self._shown(existing, sight, whole=False)


def _sees(one: pb.RayCluster, sight: Sight) -> bool:
    return sight.sees(names.last(one.queue), one.creator)


def _asked(given: pb.RayCluster, name: str) -> pb.RayCluster:
    """What may be asked for with its defaults, and nothing else."""
    asked = pb.RayCluster(name=name, state=pb.RAY_CLUSTER_STATE_UP)
    for path in _ASKED:
        _set(asked, given, path)
    asked.queue = asked.queue or names.DEFAULT_QUEUE
    asked.python = asked.python or ray_clusters.PYTHON
    asked.head_cpu_millicores = asked.head_cpu_millicores or ray_clusters.HEAD_MILLICORES
    names.split(asked.queue, "queues", field="ray_cluster.queue")
    return asked


def _set(message: pb.RayCluster, wanted: pb.RayCluster, path: str) -> None:
    if path in ("sites", "gpu_types"):
        getattr(message, path)[:] = dict.fromkeys(getattr(wanted, path))
    elif path == "idle":
        message.idle.CopyFrom(wanted.idle)
        if not wanted.HasField("idle"):
            message.idle.FromNanoseconds(round(IDLE_S * 1e9))
    else:
        setattr(message, path, getattr(wanted, path))


def _check(message: pb.RayCluster) -> None:
    _refuse(ray_clusters.mistakes(RAY_CLUSTERS.to_domain(message)))


def _check_up(message: pb.RayCluster) -> None:
    if message.state == pb.RAY_CLUSTER_STATE_ENDING:
        raise FailedPrecondition(
            f"{message.name} is being taken down; wait until it is gone, and make it anew",
            reason=ErrorReason.WRONG_STATE,
            metadata={"name": message.name},
        )


def _refuse(found: Iterable[FieldViolation]) -> None:
    if wrong := list(found):
        raise InvalidArgument(wrong[:MOST_SAID])
