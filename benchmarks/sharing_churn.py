"""How much of a GPU-sharing fleet is allocated while jobs come and go, placed by the production engine: with and without the mix of what is asked for.

openb's requests and lives on every 24th of its nodes, as jobs of the service: parts of GPUs are shares of memory, jobs of several GPUs need
one node. Arrivals are Poisson at 1.05 and 1.2 times the fleet's GPUs; what fits nowhere at its arrival is dropped, as FGD's protocol does. The
mix is learned from the jobs that were placed so far, nothing is known in advance. Without it the engine takes the tightest fit.
"""

from __future__ import annotations

import heapq
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.packing_columns import DeviceArrays
from benchmarks.packing_openb import DAY_S, Stream, Workload, draw_stream, read_fleet, read_workload
from whaleflux.fleet.model import Gpu, Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.asked_mix import AskedMix
from whaleflux_scheduler.core.model import Attempt, Job, JobState
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.request import place_request

EVERY_NODE = 24  # of the trace is taken
GPU_BYTES = 80 * 10**9
LOADS = (1.05, 1.2)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
WARM_UP, LONGEST_LIFE_S = 0.4, 0.5 * DAY_S  # part of the time that is not measured; lives are capped


def measure(options: Options) -> Report:
    """Allocated GPU share, tightest fit against the learned mix."""
    folder = options.trace("openb")
    whole, models = read_fleet(folder)
    fleet = DeviceArrays(*(column[::EVERY_NODE] for column in whole))
    work = read_workload(folder, "default", models)
    report = Report(simulated="the fleet, its jobs and its time; the engine and the mix are the production code's")
    days = 0.6 if options.quick else 4.0
    for load in LOADS[:1] if options.quick else LOADS:
        stream = draw_stream(work, int(fleet.free_milli.sum()), load, days, LONGEST_LIFE_S, options.seed)
        rows = {
            label: churn(fleet, work, stream, days, mixed=mixed)
            for label, mixed in (("tightest fit", False), ("learned mix", True))
        }
        report.rows += [{"load": load, "rule": label, **row} for label, row in rows.items()]
        gain = float(rows["learned mix"]["allocated %"]) - float(rows["tightest fit"]["allocated %"])
        report.targets.append(Target(f"more allocated by the mix at {load:g}x", gain, 0.0, "points", "higher"))
    report.notes.append(
        f"{len(fleet.model)} nodes, {int(fleet.free_milli.sum()) // 1000} GPUs, {days:g} days, lives capped at 12 h"
    )
    return report


def churn(fleet: DeviceArrays, work: Workload, stream: Stream, days: float, *, mixed: bool) -> Row:
    """One run; GPU time from the end of the warm-up on."""
    engine, mix = Engine(), AskedMix()
    for node in nodes(fleet):
        engine.upsert_node(node)
    ends: list[tuple[float, str]] = []
    from_s, until_s = WARM_UP * days * DAY_S, days * DAY_S
    used_s, dropped, gangs, dropped_gangs, begun = 0.0, 0, 0, 0, time.perf_counter()
    for at, (at_s, kind, life_s) in enumerate(zip(stream.time_s, stream.kind, stream.life_s, strict=True)):
        while ends and ends[0][0] <= at_s:
            engine.release(heapq.heappop(ends)[1])
        spec = spec_of(work, int(kind))
        placement = engine.fits(place_request(f"j{at}", spec))
        gangs += spec.gpus > 1
        if placement is None:
            dropped += 1
            dropped_gangs += spec.gpus > 1
            continue
        engine.apply(placement)
        heapq.heappush(ends, (at_s + life_s, f"j{at}"))
        worth = spec.gpus * (spec.share_memory_bytes / GPU_BYTES if spec.share_memory_bytes else 1.0)
        used_s += worth * max(0.0, min(at_s + life_s, until_s) - max(at_s, from_s))
        if mixed and mix.learn(placed(f"j{at}", spec, at_s)):
            engine.expect(mix.mix())
    spent_s = time.perf_counter() - begun
    capacity_s = float(fleet.free_milli.sum()) / 1000 * (until_s - from_s)
    return {
        "allocated %": 100 * used_s / capacity_s,
        "dropped %": 100 * dropped / len(stream.kind),
        "dropped of several GPUs %": 100 * dropped_gangs / max(1, gangs),
        "jobs": len(stream.kind),
        "ms a job": 1000 * spent_s / len(stream.kind),
    }


def nodes(fleet: DeviceArrays) -> list[Node]:
    """One leaf, and GPUs of one size."""
    made = []
    for at, slots in enumerate(fleet.free_milli):
        gpus = tuple(
            Gpu(i, f"GPU-{at}-{i}", f"M{fleet.model[at]}", GPU_BYTES, (9, 0))
            for i in range(int(np.count_nonzero(slots)))
        )
        made.append(
            Node(f"sites/s/nodes/n{at}", "s", gpus=gpus, leaf="l", cpu_millicores=int(fleet.cpu_millicores[at]),
                 memory_bytes=int(fleet.memory_bytes[at]), network_bytes_per_s=50e9)
        )  # fmt: skip
    return made


def spec_of(work: Workload, kind: int) -> Spec:
    """The request as a job file says it. CPU and memory are per rank; pods without GPUs become ranks without GPUs."""
    kinds = work.kinds
    gpus, milli, models = int(kinds.gpus[kind]), int(kinds.gpu_milli[kind]), int(kinds.models[kind])
    ranks = max(gpus, 1)
    return Spec(
        command=("x",),
        gpus=gpus,
        ranks=0 if gpus else 1,
        max_nodes=1,
        any_of=tuple(f"M{bit}" for bit in range(63) if models >> bit & 1),
        share_memory_bytes=GPU_BYTES * milli // 1000 if gpus == 1 and milli < 1000 else 0,
        cpu_millicores_per_rank=int(kinds.cpu_millicores[kind]) // ranks,
        memory_bytes_per_rank=int(kinds.memory_bytes[kind]) // ranks,
    )


def placed(name: str, spec: Spec, at_s: float) -> Job:
    """The job's record, as far as the mix reads it."""
    at = BEGIN + timedelta(seconds=at_s)
    job = Job(f"queues/q/jobs/{name}", spec, JobState.RUNNING, at)
    return replace(job, attempt=Attempt(1, (), at))


if __name__ == "__main__":
    sys.exit(main("sharing_churn", measure))
