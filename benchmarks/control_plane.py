"""How fast is the control plane: durable submissions next to bare etcd puts, and time from submission to running.

Submissions go through gRPC over mTLS into etcd and are acknowledged when etcd has them on disk. The bare puts are etcd's own Put calls
with a value of the same size: the limit that the disk and etcd set. Both are generated stubs on one plain grpc.aio channel each, called by
the same process with as many callers in turn, so that what differs is what is between the caller and the disk. The puts are as bare as a
Python client can make them: without the checks and retries of a client library, without TLS, and to etcd itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from aetcd import rpc as etcd_rpc
from aetcd.rpc import rpc_pb2_grpc as etcd_grpc

from benchmarks.common import Options, Report, Row, Target, main, percentile
from benchmarks.control_plane_suite import Suite, machine, request
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub

CONCURRENCY = (1, 64)
WAITING = {"gpu": pb.GpuRequirement(any_of=["no-such-gpu"])}  # so that what is measured is submitting alone


async def rate(work: Callable[[int], Awaitable[object]], concurrency: int, seconds: float) -> float:
    """Calls per second of `concurrency` callers that each wait for their answer."""
    numbers, done = itertools.count(), 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await work(next(numbers))
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return done / (time.perf_counter() - begun)


async def throughput(
    suite: Suite, *, rounds: int, seconds: float, concurrencies: Sequence[int] = CONCURRENCY
) -> list[Row]:
    """Callers take turns among the replicas: any of them takes jobs, only one decides."""
    asked = request(8, **WAITING)
    rows: list[Row] = []
    etcd = f"127.0.0.1:{suite.client_port}"
    async with contextlib.AsyncExitStack() as channels:
        kv = etcd_grpc.KVStub(await channels.enter_async_context(grpc.aio.insecure_channel(etcd)))
        ports = (suite.scheduler_port, *suite.follower_ports)
        opened = [await channels.enter_async_context(suite.plain_channel(port=port)) for port in ports]
        stubs = [SchedulerServiceStub(channel) for channel in opened]
        value = (await stubs[0].CreateJob(asked)).SerializeToString()

        async def put(number: int) -> None:
            await kv.Put(etcd_rpc.PutRequest(key=b"/bare/%d" % number, value=value))

        async def submit(number: int) -> None:
            await stubs[number % len(stubs)].CreateJob(asked)

        for concurrency in concurrencies:
            await rate(submit, concurrency, 0.3)
            pairs = [
                (await rate(put, concurrency, seconds), await rate(submit, concurrency, seconds)) for _ in range(rounds)
            ]
            bare, submitted = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(s / b for b, s in pairs)
            rows.append(
                {
                    "measure": "submissions",
                    "replicas": len(stubs),
                    "concurrency": concurrency,
                    "bare puts/s": bare,
                    "submissions/s": submitted,
                    "ratio": ratio,
                }
            )
    return rows


async def latency(suite: Suite, *, per_s: float, seconds: float, seed: int) -> list[Row]:
    """Jobs at a steady rate, whether or not the last ones are through (open loop)."""
    submitted: dict[str, float] = {}
    assigned: dict[str, float] = {}
    running: dict[str, float] = {}
    created: list[float] = []
    stub: Any = suite.stub()

    def on_task(task: agent_pb2.DesiredTask) -> None:
        assigned.setdefault(task.job, time.perf_counter())

    for agent in suite.agents.values():
        agent.on_task = on_task

    async def watch() -> None:
        async for change in suite.stub("user", "eve").WatchJobs(pb.WatchJobsRequest()):
            job = change.modified if change.HasField("modified") else change.added
            if job.state in (pb.JOB_STATE_RUNNING, pb.JOB_STATE_SUCCEEDED) and job.name in submitted:
                running.setdefault(job.name, time.perf_counter())

    async def submit(number: int, at: float) -> None:
        name = f"lat-{seed}-{number}"
        submitted[f"queues/default/jobs/{name}"] = at
        one = request(1)
        one.job_id = name
        await stub.CreateJob(one)
        created.append(time.perf_counter() - at)

    watching = asyncio.create_task(watch())
    begun = time.perf_counter()
    calls = []
    for number in range(int(per_s * seconds)):
        at = begun + number / per_s
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        calls.append(asyncio.create_task(submit(number, at)))
    await asyncio.gather(*calls)
    async with asyncio.timeout(60):
        while len(running) < len(submitted):
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return [
        _latencies("submit to stored", created, per_s),
        _latencies("submit to assignment", [assigned[name] - at for name, at in submitted.items()], per_s),
        _latencies("submit to running", [running[name] - at for name, at in submitted.items()], per_s),
    ]


def _latencies(measure: str, values: list[float], per_s: float) -> Row:
    return {
        "measure": measure,
        "jobs/s": per_s,
        "jobs": len(values),
        "p50 ms": percentile(values, 50) * 1e3,
        "p99 ms": percentile(values, 99) * 1e3,
        "worst ms": max(values) * 1e3,
    }


async def run(options: Options) -> list[Row]:
    quick = options.quick
    with tempfile.TemporaryDirectory() as folder:
        async with Suite(Path(folder), []) as suite:
            rows = await throughput(suite, rounds=3 if quick else 7, seconds=1.0 if quick else 3.0)
    with tempfile.TemporaryDirectory() as folder:
        async with Suite(Path(folder), [], followers=1) as suite:
            rows += await throughput(
                suite, rounds=3 if quick else 7, seconds=1.0 if quick else 3.0, concurrencies=CONCURRENCY[-1:]
            )
    nodes = [machine(f"site/node-{i}") for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        async with Suite(Path(folder), nodes, run_s=0.2) as suite:
            await latency(suite, per_s=20, seconds=1.0, seed=options.seed + 1)
            rows += await latency(suite, per_s=100, seconds=5.0 if quick else 30.0, seed=options.seed)
    return rows


def measure(options: Options) -> Report:
    """Durable submissions per second next to bare etcd puts, and latency from submission to running."""
    rows = asyncio.run(run(options))
    submissions = [row for row in rows if row["measure"] == "submissions"]
    ratio = {row["concurrency"]: row["ratio"] for row in submissions if row["replicas"] == 1}
    best = max(row["ratio"] for row in submissions if row["concurrency"] == CONCURRENCY[-1])
    assignment = next(row for row in rows if row["measure"] == "submit to assignment")
    return Report(
        rows=rows,
        targets=[
            Target("submissions/bare puts, concurrency 1", ratio[1], 0.4, "", "higher"),
            Target("submissions/bare puts, concurrency 64, one replica or two", best, 0.2, "", "higher"),
            Target("submit to assignment, p99 at 100 jobs/s", assignment["p99 ms"], 100.0, "ms", per="python"),
        ],
        simulated="16 nodes x 8 GPUs, their agents (accept and start at once, without processes), inventory and health monitor",
        notes=["etcd, the scheduler and the load generator (with the played agents) share the host's cores"],
    )


if __name__ == "__main__":
    sys.exit(main("control_plane", measure))
