"""What the agent offers to its site on its mTLS port."""

from __future__ import annotations

from typing import Any

from whaleflux.clock import Clock
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux_agent.supervisor import Supervisor


class NodeServicer(agent_pb2_grpc.NodeServiceServicer):
    """Answers while the agent lives."""

    def __init__(self, node: str, supervisor: Supervisor, clock: Clock) -> None:
        self._node, self._supervisor, self._clock = node, supervisor, clock
        self._started_s = clock.monotonic()

    async def Probe(self, request: agent_pb2.ProbeRequest, context: Any) -> agent_pb2.ProbeResponse:
        answer = agent_pb2.ProbeResponse(node=self._node)
        answer.tasks.extend(task.task for task in self._supervisor.running() if task.alive)
        answer.uptime.FromMilliseconds(int((self._clock.monotonic() - self._started_s) * 1000))
        return answer
