"""The second half of the demo: the trained model behind the front door, and the loss of one of its replicas."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from whaleflux import names
from whaleflux.context import Context
from whaleflux.demo.fleet import DemoFleet
from whaleflux.demo.training import Say, until
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import router_pb2

PROMPTS = ("def ", "import ", "class ", "    return ", "for i in ", "if __name__ ")


@dataclass(slots=True)
class Served:
    """What clients got. `failed` counts requests whose answer was not a whole 200."""

    asked: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sample: str = ""
    killed_replica: str = ""
    by_replica: Counter[str] = field(default_factory=Counter)
    healed_s: float = -1.0


async def serve(client: AsyncClient, model_id: str, model: router_pb2.Model, say: Say) -> list[router_pb2.Replica]:
    """Declares the model and waits until all of its replicas answer."""
    await client.router.CreateModel(router_pb2.CreateModelRequest(model_id=model_id, model=model), timeout=20)
    replicas: list[router_pb2.Replica] = []

    async def look() -> None:
        while sum(r.state == router_pb2.REPLICA_STATE_READY for r in replicas) < model.replicas.min:
            answer = await client.router.ListReplicas(
                router_pb2.ListReplicasRequest(parent=names.model(model_id)), timeout=10
            )
            replicas[:] = answer.replicas
            await asyncio.sleep(0.1)

    async with asyncio.timeout(90):
        await look()
    for replica in replicas:
        say(f"      {replica.name} is READY at {replica.address} on {replica.node} ({replica.gpu_model})")
    return replicas


async def send_requests(
    context: Context, model: str, served: Served, total: int, width: int, on_sent: Callable[[int], None]
) -> None:
    """`total` requests, `width` at a time, with the openai client and without any retries of its own."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    numbers = iter(range(total))

    async def worker(api: Any) -> None:
        for number in numbers:
            served.asked += 1
            on_sent(number)
            began = time.monotonic()
            try:
                answer = await api.completions.create(
                    model=model, prompt=PROMPTS[number % len(PROMPTS)], max_tokens=48, seed=number
                )
                served.seconds.append(time.monotonic() - began)
                served.sample = served.sample or PROMPTS[number % len(PROMPTS)] + answer.choices[0].text
            except Exception as error:
                served.failed += 1
                served.errors.append(f"{type(error).__name__}: {error}"[:300])

    async with AsyncOpenAI(
        base_url=context.inference_url,
        api_key=context.api_key or "none",
        max_retries=0,
        timeout=30,
        http_client=DefaultAsyncHttpxClient(trust_env=False),  # a proxy of the environment is no way to this machine
    ) as api:
        await asyncio.gather(*(worker(api) for _ in range(width)))


async def lose_a_replica(
    client: AsyncClient, fleet: DemoFleet, model_id: str, replicas: list[router_pb2.Replica], served: Served, say: Say
) -> None:
    """Requests all the while; a third of the way through, SIGKILL to the processes of one replica."""
    victim, total = replicas[0], 120

    def kill_at_a_third(number: int) -> None:
        if number != total // 3:
            return
        pids = fleet.processes_of_job(victim.job)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        served.killed_replica = victim.name
        say(f"KILL  {victim.name}: SIGKILL to its {len(pids)} processes, request {number} of {total} being sent")

    began = time.monotonic()
    await send_requests(fleet.context, model_id, served, total, 4, kill_at_a_third)
    say(f"      {served.asked} requests asked, {served.failed} failed")
    ready: list[int] = []

    async def heal() -> None:
        while len(ready) < len(replicas):
            answer = await client.router.ListReplicas(
                router_pb2.ListReplicasRequest(parent=names.model(model_id)), timeout=10
            )
            ready[:] = [1 for r in answer.replicas if r.state == router_pb2.REPLICA_STATE_READY]
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(heal())
    await until(watching.done, "the killed replica to come back", 60)
    await watching
    served.healed_s = time.monotonic() - began
    say("      the killed replica is READY again")
