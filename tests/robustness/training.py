"""The cheap training job of these tests: submitted, watched through its ranks' own records, ended."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from tests.robustness.history import Step
from tests.robustness.recording import restores_of, steps_of
from tests.support.suite import RunningSuite, until
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

SCRIPT = Path(__file__).parents[1] / "support" / "slow_steps.py"
EVERY = 20
_RESTORABLE = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)


@dataclass(frozen=True, slots=True)
class Training:
    """Two ranks on two nodes; `folder` has their records."""

    client: AsyncClient
    name: str
    folder: Path

    @classmethod
    async def start(
        cls, suite: RunningSuite, client: AsyncClient, id_: str, sites: Sequence[str] = ("onprem", "cloud")
    ) -> Training:
        """Submits it and returns when both ranks step."""
        folder = suite.state / id_
        folder.mkdir()
        spec = scheduler_pb2.JobSpec(
            command=[sys.executable, str(SCRIPT), str(folder), "--every", str(EVERY)],
            gpus=2,
            nodes=scheduler_pb2.NodeCount(min=2),
            sites=sites,
            checkpoint=scheduler_pb2.CheckpointPolicy(every_steps=EVERY, keep=3),
        )
        spec.retry.backoff.FromMilliseconds(200)
        spec.retry.max_restarts = 3
        request = scheduler_pb2.CreateJobRequest(
            parent="queues/default", job_id=id_, job=scheduler_pb2.Job(spec=spec), request_id=id_
        )
        job = await client.scheduler.CreateJob(request, timeout=20)
        training = cls(client, job.name, folder)
        await until(lambda: training.ranks_at(epoch=1) == {0, 1}, "both ranks step", 60)
        return training

    def steps(self) -> list[Step]:
        return steps_of(self.folder) if self.folder.exists() else []

    def ranks_at(self, epoch: int) -> set[int]:
        """Ranks that have made a step in this epoch."""
        return {step.rank for step in self.steps() if step.epoch == epoch}

    def restores(self, rank: int = 0) -> list[tuple[int, int, str]]:
        return restores_of(self.folder, rank)

    async def job(self) -> scheduler_pb2.Job:
        found: scheduler_pb2.Job = await self.client.scheduler.GetJob(
            scheduler_pb2.GetJobRequest(name=self.name), timeout=5
        )
        return found

    async def checkpoints(self) -> list[checkpoint_pb2.Checkpoint]:
        """Newest first."""
        request = checkpoint_pb2.ListCheckpointsRequest(parent=self.name, page_size=500)
        return list((await self.client.checkpoint.ListCheckpoints(request, timeout=5)).checkpoints)

    async def restorable(self) -> list[checkpoint_pb2.Checkpoint]:
        """Newest first."""
        return [c for c in await self.checkpoints() if c.state in _RESTORABLE]

    async def faults(self) -> dict[str, str]:
        """What is wrong with the files of each restorable checkpoint; call it when nothing is saved any more."""
        found = {}
        for listed in await self.restorable():
            request = checkpoint_pb2.GetCheckpointRequest(name=listed.name)
            whole = await self.client.checkpoint.GetCheckpoint(request, timeout=5)
            faults = [fault for piece in whole.pieces if (fault := _fault(Path(whole.location), piece))]
            found[whole.name] = "; ".join(faults) if whole.pieces else "it has no pieces"
        # The agents deliver the last saves after the job has ended: what was replaced meanwhile need not have its files.
        still = {checkpoint.name for checkpoint in await self.restorable()}
        return {name: fault for name, fault in found.items() if name in still}

    async def finish(self) -> scheduler_pb2.Job:
        """Lets the ranks end; returns the job when it has."""
        (self.folder / "finish").touch()
        ended = scheduler_pb2.Job()

        async def over() -> bool:
            ended.CopyFrom(await self.job())
            return bool(ended.HasField("end_time"))

        await until(over, f"{self.name} ends", 60)
        return ended


def _fault(folder: Path, piece: checkpoint_pb2.Piece) -> str:
    try:
        content = (folder / piece.path).read_bytes()
    except OSError as error:
        return f"{piece.path}: {error.strerror}"
    return "" if piece.checksum == f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}" else f"{piece.path} is damaged"
