"""The jobs of a history: what each asks for, and how it must end."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import held_gpu_setup
from whaleflux.v1 import scheduler_pb2

SUCCEEDED, ENDED, FAILED = (
    scheduler_pb2.DEPENDENCY_CONDITION_SUCCEEDED,
    scheduler_pb2.DEPENDENCY_CONDITION_ENDED,
    scheduler_pb2.DEPENDENCY_CONDITION_FAILED,
)
TIME_LIMIT_S = 2


@dataclass(slots=True)
class Submitted:
    """A job of this history that was acknowledged, and what must become of it."""

    name: str
    timeline: int
    exit_code: int = 0
    saves: bool = False
    endless: bool = False  # only its time limit ends it
    after: str = ""  # the job that it depends on
    when: scheduler_pb2.DependencyCondition = SUCCEEDED
    cancelled: bool = False

    @property
    def own_end(self) -> str:
        return "FAILED" if self.exit_code or self.endless else "SUCCEEDED"

    def may_run(self, end_of_other: str) -> bool:
        """Whether the job that it depends on ended as it must."""
        if self.when == ENDED or not self.after:
            return True
        return (end_of_other == "SUCCEEDED") == (self.when == SUCCEEDED)

    def __str__(self) -> str:
        return ", ".join(
            filter(
                None,
                (
                    f"exit {self.exit_code}",
                    "saves" if self.saves else "",
                    "endless" if self.endless else "",
                    f"after {self.after}, when {self.when}" if self.after else "",
                ),
            )
        )


def chosen_job(pick: random.Random, name: str, timeline: int, others: Sequence[Submitted]) -> Submitted:
    """A job by chance; one in six depends on one of the others."""
    job = Submitted(name, timeline, pick.choice((0, 0, 0, 0, 3)), pick.random() < 0.3, pick.random() < 0.08)
    if others and pick.random() < 0.16:
        job.after, job.when = pick.choice(others).name, pick.choice((SUCCEEDED, ENDED, FAILED))
    return job


def spec_of(pick: random.Random, job: Submitted, folder: Path) -> scheduler_pb2.JobSpec:
    """What is submitted; its ranks write into `folder`."""
    spec = scheduler_pb2.JobSpec(working_directory=str(Path(__file__).parents[3]))
    seconds, sets_up = f"{pick.uniform(0.2, 6):.1f}", pick.random() < 0.1
    spec.command[:] = [sys.executable, "-m", "tests.support.held_gpu", str(folder), seconds, str(job.exit_code)]
    spec.command.extend(["--save"] * job.saves + ["--stubborn"] * (pick.random() < 0.15))
    spec.command.extend(["--set-up"] * sets_up + ["--endless"] * job.endless)
    if sets_up:
        spec.setup[:] = ["sh", "-c", held_gpu_setup.SCRIPT, str(folder / "setup")]
    if pick.random() < 0.1:
        spec.ranks = pick.choice((1, 2, 3))  # work without GPUs
    else:
        spec.gpus = pick.choice((1, 1, 2, 3, 4, 6))
    if job.endless:
        spec.time_limit.FromSeconds(TIME_LIMIT_S)
    if job.after:
        spec.depends_on.add(job=job.after, when=job.when)
    spec.retry.backoff.FromMilliseconds(100)
    spec.retry.max_restarts = 1 if job.exit_code else 50
    spec.stop_grace.FromMilliseconds(500)
    spec.checkpoint.every_steps, spec.checkpoint.keep = 1, 3
    return spec
