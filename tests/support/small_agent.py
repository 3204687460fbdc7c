"""`python -m tests.support.small_agent FOLDER NODE JOB INVENTORY HEALTH`: as much of an agent as detection needs.

Registers, answers probes, sends heartbeats, and says that it runs one task of queues/q/jobs/JOB whose step grows by itself.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from whaleflux.errors import StatusError
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.channel import connect
from whaleflux.rpc.pki import TlsFiles, server_name
from whaleflux.rpc.server import Server
from whaleflux.v1 import agent_pb2, health_pb2, inventory_pb2
from whaleflux.v1.agent_pb2_grpc import NodeServiceServicer, add_NodeServiceServicer_to_server
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub

HEARTBEAT_S = 0.5


class Probed(NodeServiceServicer):
    def __init__(self, node):
        self._node = node

    async def Probe(self, request, context):
        return agent_pb2.ProbeResponse(node=self._node)


async def heartbeats(node, job, address):
    hello = health_pb2.HeartbeatHello(node=node, boot_id="boot-1", probe_address=address)
    hello.interval.FromMilliseconds(int(HEARTBEAT_S * 1000))
    yield health_pb2.HeartbeatRequest(hello=hello)
    sequence = 0
    while True:
        sequence += 1
        task = health_pb2.RunningTask(
            task="j-1-0", job=f"queues/q/jobs/{job}", epoch=1, step=int(time.time() * 5), alive=True
        )
        yield health_pb2.HeartbeatRequest(heartbeat=health_pb2.Heartbeat(sequence=sequence, tasks=[task]))
        await asyncio.sleep(HEARTBEAT_S)


async def main(folder: str, node: str, job: str, inventory: str, health: str) -> None:
    tls = TlsFiles.under(Path(folder), "agent")
    server = Server(tls, Authority())
    address = f"127.0.0.1:{server.bind('127.0.0.1:0')}"
    server.add(add_NodeServiceServicer_to_server, Probed(node), "whaleflux.v1.NodeService")
    await server.start()
    facts = inventory_pb2.NodeFacts(address=address, simulated=True)
    facts.gpus.add(index=0, model="H200", uuid=f"GPU-{node}", memory_bytes=141 << 30, healthy=True)
    register = inventory_pb2.RegisterNodeRequest(name=node, facts=facts, boot_id="boot-1")
    stub = InventoryServiceStub(connect(inventory, tls, server=server_name("inventory")))
    await stub.RegisterNode(register, timeout=20, wait_for_ready=True)
    print("registered", flush=True)
    stub = HealthServiceStub(connect(health, tls, server=server_name("health_monitor")))
    while True:
        try:
            async with stub.Heartbeat(heartbeats(node, job, address)) as answers:
                async for _ in answers:
                    pass
        except StatusError as error:
            print(error, flush=True)
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
