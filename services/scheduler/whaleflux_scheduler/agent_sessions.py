"""Agents' streams: desired state down, acknowledgements and log requests beside it.

A session keeps no queue of changes: `wake` says that something changed, and it works out what to send from what should be and what it
has sent. So a slow agent costs memory for its tasks, not for their history.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from datetime import timedelta

from whaleflux.errors import ResourceExhausted, StatusError, node_name_taken, node_runs_twice
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import agent_pb2

LOG_REQUESTS = 64  # per agent, waiting to be sent
DesiredOf = Callable[[str], tuple[Mapping[str, agent_pb2.DesiredTask], int]]
"""Desired tasks of a node by id, and the store's revision that they reflect."""
DataOf = Callable[[str], agent_pb2.DesiredData]
"""What a node is to pull ahead."""


class AgentSession:
    """One agent's stream."""

    def __init__(
        self,
        node: str,
        desired_of: DesiredOf,
        machine_id: str = "",
        unreadable: Callable[[], frozenset[str]] = frozenset,
        boot_id: str = "",
        jobs: frozenset[str] = frozenset(),
        data_of: DataOf = lambda _: agent_pb2.DesiredData(),
    ) -> None:
        self.node, self.machine_id, self.boot_id = node, machine_id, boot_id
        self.clock_behind = timedelta()  # how much later than its agent's clock ours is
        self._named_jobs = jobs  # of which its agent had something when it connected
        self._desired_of, self._unreadable, self._data_of = desired_of, unreadable, data_of
        self._data = agent_pb2.DesiredData()  # to be pulled ahead, as last sent
        self.said_of_data: tuple[agent_pb2.DataProgress, ...] = ()  # by its agent, at last
        self._left_alone: frozenset[str] = frozenset()  # as last sent
        self._sent: dict[str, bytes] | None = None  # by task, as last sent; None: nothing yet
        self._known: set[str] = set()  # tasks that its agent knows of, from us or by itself, while they hold GPUs
        self._pending: set[int] = set()  # sequences that are not stored yet
        self._highest = self._acknowledged = 0
        self._outbox: deque[agent_pb2.SyncResponse] = deque()
        self._some = asyncio.Event()
        self._woken = True  # what is desired may differ from what was sent
        self._end: StatusError | None = None
        self.open = True
        self._some.set()

    def knows(self, task: str) -> bool:
        """Whether its agent was ever sent the task, or named it."""
        return task in self._known

    def learn_of(self, tasks: Iterable[str]) -> None:
        """Its agent knows these."""
        self._known.update(tasks)

    def keep_known(self, tasks: Collection[str]) -> None:
        """Forgets all but these."""
        self._known.intersection_update(tasks)

    def wake(self) -> None:
        """Something that concerns this node may have changed."""
        self._woken = True
        self._some.set()

    def close(self, reason: StatusError | None = None) -> None:
        """Ends the stream, with an error if one is given."""
        self.open, self._end = False, reason
        self._some.set()

    def received(self, sequence: int) -> None:
        """A report came; it is acknowledged after `stored`."""
        if sequence > self._acknowledged:
            self._pending.add(sequence)
            self._highest = max(self._highest, sequence)

    def stored(self, sequence: int) -> None:
        """What the report said is in the store, or will never be."""
        self._pending.discard(sequence)
        self._highest = max(self._highest, sequence)
        self._some.set()

    def send(self, response: agent_pb2.SyncResponse) -> None:
        """Queues a message. Raises ResourceExhausted when the agent does not take them."""
        if len(self._outbox) >= LOG_REQUESTS:
            raise ResourceExhausted(
                f"{self.node} has {LOG_REQUESTS} messages waiting", reason=ErrorReason.AGENT_BUSY, retry_after_s=1.0
            )
        self._outbox.append(response)
        self._some.set()

    async def responses(self) -> AsyncIterator[agent_pb2.SyncResponse]:
        """What to send, until closed."""
        while True:
            await self._some.wait()
            self._some.clear()
            if not self.open:
                if self._end is not None:
                    raise self._end
                return
            for response in self.due():
                yield response

    def due(self) -> list[agent_pb2.SyncResponse]:
        responses = self._desired() if self._woken else []
        self._woken = False
        stored = min(self._pending) - 1 if self._pending else self._highest
        if stored > self._acknowledged:
            self._acknowledged = stored
            responses.append(agent_pb2.SyncResponse(acknowledged_sequence=stored))
        while self._outbox:
            responses.append(self._outbox.popleft())
        return responses

    def _desired(self) -> list[agent_pb2.SyncResponse]:
        tasks, revision = self._desired_of(self.node)
        now = {name: task.SerializeToString(deterministic=True) for name, task in tasks.items()}
        left_alone = self._unreadable() & (self._named_jobs | {task.job for task in tasks.values()})
        before, self._sent = (self._sent if left_alone == self._left_alone else None), now
        self._left_alone = left_alone
        self._known |= now.keys()
        if before is None:
            everything = agent_pb2.DesiredTasks(
                tasks=tasks.values(), revision=revision, unreadable_jobs=sorted(left_alone)
            )
            takes_readings = agent_pb2.SyncResponse(ray=agent_pb2.RayDecision())
            return [agent_pb2.SyncResponse(desired=everything), *self._new_data(anew=True), takes_readings]
        gone = [agent_pb2.SyncResponse(removed=name) for name in before if name not in now]
        changed = [
            agent_pb2.SyncResponse(changed=tasks[name]) for name, text in now.items() if before.get(name) != text
        ]
        return gone + changed + self._new_data()

    def _new_data(self, *, anew: bool = False) -> list[agent_pb2.SyncResponse]:
        """What is to be pulled ahead, when that is another thing than it was told; `anew`: it may have been told by somebody else."""
        before, self._data = self._data, self._data_of(self.node)
        return [agent_pb2.SyncResponse(data=self._data)] if anew or self._data != before else []


class AgentSessions:
    """All sessions, at most one per node. `connected` is shared with the view of the nodes."""

    def __init__(self) -> None:
        self.connected: dict[str, AgentSession] = {}
        self._networks: dict[str, str] = {}  # by node, also of those that are away now

    def add(self, session: AgentSession) -> None:
        """A node's newest stream counts; an older one of the same machine is a leftover of a broken connection.

        Another machine's is not: the later of two is refused (NODE_NAME_TAKEN). Nor is that of a copy of the machine, which booted otherwise
        (NODE_RUNS_TWICE); of a machine that was rebooted the transport ends the older stream within half a minute.
        """
        if older := self.connected.get(session.node):
            if older.open and older.machine_id and older.machine_id != session.machine_id:
                raise node_name_taken(session.node, older.machine_id, session.machine_id)
            if older.open and older.boot_id and session.boot_id not in ("", older.boot_id):
                raise node_runs_twice(session.node, older.boot_id, session.boot_id)
            older.close()
        self.connected[session.node] = session

    def learn_network(self, node: str, network: str) -> None:
        """Which network stack the node's agent said to be on."""
        self._networks[node] = network

    def elsewhere(self, node: str, nodes: Iterable[str]) -> str:
        """The first of `nodes` that is known not to share loopback addresses with `node`; empty when none is."""
        if not (own := self._networks.get(node, "")):
            return ""
        return next((other for other in nodes if self._networks.get(other, own) not in ("", own)), "")

    def remove(self, session: AgentSession) -> bool:
        """Whether it was the node's current stream."""
        if self.connected.get(session.node) is not session:
            return False
        del self.connected[session.node]
        return True

    def said_of_data(self, nodes: Iterable[str]) -> list[tuple[str, agent_pb2.DataProgress]]:
        """By node: how far data is that was asked for ahead; nothing of nodes that are not connected."""
        known = ((node, self.connected.get(node)) for node in nodes)
        return [(node, one) for node, session in known if session is not None for one in session.said_of_data]

    def wake(self, node: str) -> None:
        if session := self.connected.get(node):
            session.wake()

    def tell(self, node: str, response: agent_pb2.SyncResponse) -> bool:
        """Sends what an agent may miss; False: it is not connected, or reads too slowly."""
        session = self.connected.get(node)
        if session is None or not session.open:
            return False
        with contextlib.suppress(ResourceExhausted):
            session.send(response)
            return True
        return False

    def close(self, reason: StatusError) -> None:
        """Ends all streams."""
        for session in list(self.connected.values()):
            session.close(reason)
        self.connected.clear()
