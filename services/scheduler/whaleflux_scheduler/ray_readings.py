"""What is read of Ray clusters, as it reaches the leader: the newest of each, who says it, and how old it is."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from google.protobuf import json_format

from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.ray_nodes import Cluster
from whaleflux_scheduler.core.ray_sizing import Seen
from whaleflux_scheduler.ray_plans import cluster_of

STALE_AFTER_S = 10.0  # then it is not known what waits
MOST_UNPACKED_BYTES = 8 << 20
_ALIVE = frozenset({"IDLE", "RUNNING", "DRAINING"})


@dataclass(frozen=True, slots=True)
class Read:
    """A reading that could be made sense of."""

    demand: pb.RayDemand
    cluster: Cluster

    @property
    def instances(self) -> frozenset[str]:
        """Jobs whose nodes are in the cluster."""
        return frozenset(n.instance.rpartition("/")[0] for n in self.demand.nodes if n.status in _ALIVE)

    @property
    def waiting(self) -> int:
        """Tasks, actors and bundles of placement groups."""
        gangs = sum(gang.count * sum(one.count for one in gang.bundles) for gang in self.demand.gangs)
        return sum(one.count for one in self.demand.bundles) + gangs


@dataclass(slots=True)
class Reading:
    """The newest of a cluster. `job`, `epoch`, `node`: of the task that reads; times are monotonic seconds."""

    job: str
    epoch: int
    node: str
    number: int
    content: bytes
    dashboard: str
    came_s: float
    heard_s: float
    read: Read | None = None
    wrong: str = ""  # why it cannot be read
    been: set[str] = field(default_factory=set)  # jobs whose nodes were in this session of the cluster
    session: str = ""
    answered: bool = False  # workers were started for it

    def hear(self, said: agent_pb2.RayReading, now_s: float) -> bool:
        """Takes what the same task says later; whether it is news."""
        if not said.demand:
            if said.number == self.number:
                self.heard_s = now_s
            return False
        self.number, self.content, self.dashboard = said.number, said.demand, said.dashboard
        self.came_s = self.heard_s = now_s
        self.read, self.wrong, self.answered = None, "", False
        return True

    async def understand(self) -> Read | None:
        """What it says, made out once, in a thread; None: nothing that can be gone by, see `wrong`."""
        if self.read is not None or self.wrong:
            return self.read
        number = self.number
        try:
            read = await asyncio.to_thread(_read, self.content)
        except InvalidArgument as error:
            if number == self.number:
                self.wrong = error.message
            return None
        if number == self.number:
            self._take(read)
        return read

    def _take(self, read: Read) -> None:
        self.read = read
        if read.demand.session != self.session:
            self.session, self.been = read.demand.session, set()
        self.been |= read.instances

    def seen(self, read: Read, known: Iterable[str]) -> Seen:
        """Which of the jobs that are `known` are in it, and which have left."""
        self.been &= set(known)
        joined = read.instances
        return Seen(read.cluster, joined, frozenset(self.been - joined))


class Readings:
    """By the cluster's name; of one task of each."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, Reading] = {}

    def take(self, cluster: str, node: str, said: agent_pb2.RayReading) -> bool:
        """From the task that reads the cluster now; whether it is news."""
        now_s, known = self._clock.monotonic(), self._known.get(cluster)
        if known is not None and (known.job, known.epoch) == (said.job, said.epoch):
            known.node = node
            return known.hear(said, now_s)
        if said.demand:
            self._known[cluster] = Reading(
                said.job, said.epoch, node, said.number, said.demand, said.dashboard, now_s, now_s
            )
        return bool(said.demand)

    def of(self, cluster: str) -> Reading | None:
        return self._known.get(cluster)

    def age_s(self, cluster: str) -> float | None:
        """Since its reader was heard; None: never."""
        known = self._known.get(cluster)
        return None if known is None else max(0.0, self._clock.monotonic() - known.heard_s)

    def fresh(self, cluster: str) -> Reading | None:
        """One that may be gone by."""
        age_s = self.age_s(cluster)
        return self._known[cluster] if age_s is not None and age_s <= STALE_AFTER_S else None

    def keep(self, clusters: Iterable[str]) -> None:
        """Forgets all others."""
        for gone in self._known.keys() - set(clusters):
            del self._known[gone]


def _read(content: bytes) -> Read:
    """Raises InvalidArgument for what is no reading, or more than is taken."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(content, MOST_UNPACKED_BYTES)
        if not unpacker.eof:
            raise InvalidArgument(FieldViolation("demand", f"has more than {MOST_UNPACKED_BYTES} bytes, or is cut"))
        content = json.loads(text)
        if not isinstance(content, dict):
            raise InvalidArgument(FieldViolation("demand", "is no JSON object"))
        demand = json_format.ParseDict(content, pb.RayDemand(), ignore_unknown_fields=True)
        return Read(demand, cluster_of(demand))
    except InvalidArgument:
        raise
    except (
        Exception
    ) as error:  # a program says what it likes, and json, zlib and protobuf each refuse it in ways of their own
        raise InvalidArgument(FieldViolation("demand", f"is no demand of a Ray cluster: {str(error)[:300]}")) from None
