"""Agents' streams: desired state down, acknowledgements and log requests beside it.

A connection keeps no queue of changes: it is told that something changed, and works out what to send from what should be and what it
has sent. So a slow agent costs memory for its tasks, not for their history.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

from whaleflux.errors import OverLimit, Refusal
from whaleflux.v1 import agent_pb2

LOG_REQUESTS = 64  # per agent, waiting to be sent
Wanted = Callable[[str], tuple[Mapping[str, agent_pb2.DesiredTask], int]]
"""Desired tasks of a node by id, and the store's revision that they reflect."""


class Connection:
    """One agent's stream."""

    def __init__(self, node: str, wanted: Wanted) -> None:
        self.node = node
        self._wanted = wanted
        self._sent: dict[str, bytes] | None = None  # by task, as last sent; None: nothing yet
        self.told: set[str] = set()  # tasks that its agent knows of, from us or by itself, while they hold GPUs
        self._pending: set[int] = set()  # sequences that are not stored yet
        self._highest = self._acknowledged = 0
        self._outbox: deque[agent_pb2.SyncResponse] = deque()
        self._some = asyncio.Event()
        self._kicked = True  # what is desired may differ from what was sent
        self._end: Refusal | None = None
        self.open = True
        self._some.set()

    def kick(self) -> None:
        """Something that concerns this node may have changed."""
        self._kicked = True
        self._some.set()

    def close(self, reason: Refusal | None = None) -> None:
        """Ends the stream, with a refusal if one is given."""
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
        """Queues a message. Raises OverLimit when the agent does not take them."""
        if len(self._outbox) >= LOG_REQUESTS:
            raise OverLimit(f"{self.node} has {LOG_REQUESTS} messages waiting", reason="AGENT_BUSY", retry_after_s=1.0)
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
            for response in self._due():
                yield response

    def _due(self) -> list[agent_pb2.SyncResponse]:
        responses = self._desired() if self._kicked else []
        self._kicked = False
        stored = min(self._pending) - 1 if self._pending else self._highest
        if stored > self._acknowledged:
            self._acknowledged = stored
            responses.append(agent_pb2.SyncResponse(acknowledged_sequence=stored))
        while self._outbox:
            responses.append(self._outbox.popleft())
        return responses

    def _desired(self) -> list[agent_pb2.SyncResponse]:
        tasks, revision = self._wanted(self.node)
        now = {name: task.SerializeToString(deterministic=True) for name, task in tasks.items()}
        before, self._sent = self._sent, now
        self.told |= now.keys()
        if before is None:
            everything = agent_pb2.DesiredTasks(tasks=tasks.values(), revision=revision)
            return [agent_pb2.SyncResponse(desired=everything)]
        gone = [agent_pb2.SyncResponse(removed=name) for name in before if name not in now]
        changed = [
            agent_pb2.SyncResponse(changed=tasks[name]) for name, text in now.items() if before.get(name) != text
        ]
        return gone + changed


class Hub:
    """All connections, at most one per node. `connected` is shared with the fleet's view."""

    def __init__(self) -> None:
        self.connected: dict[str, Connection] = {}

    def add(self, connection: Connection) -> None:
        """A node's newest stream counts; an older one is a leftover of a broken connection."""
        if older := self.connected.get(connection.node):
            older.close()
        self.connected[connection.node] = connection

    def remove(self, connection: Connection) -> bool:
        """Whether it was the node's current stream."""
        if self.connected.get(connection.node) is not connection:
            return False
        del self.connected[connection.node]
        return True

    def kick(self, node: str) -> None:
        if connection := self.connected.get(node):
            connection.kick()

    def close(self, reason: Refusal) -> None:
        """Ends all streams."""
        for connection in list(self.connected.values()):
            connection.close(reason)
        self.connected.clear()
