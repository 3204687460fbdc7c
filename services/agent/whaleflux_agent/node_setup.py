"""What a job does once per node before its ranks: as one more process under a shim of its own, in the custody that ranks have.

Its folder is `setup/` in that of the task. The next agent finds there whether it was begun and how it ended: it is neither
run twice in an attempt nor taken for done when nobody saw its end. Its output stands before that of the node's first rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from whaleflux.manifests import shell_text
from whaleflux_agent.core.work import Work
from whaleflux_agent.exit_text import MESSAGE_CHARS, describe
from whaleflux_agent.runtime import logs
from whaleflux_agent.runtime.api import LaunchPlan, RankExit, RankPlan
from whaleflux_agent.runtime.job_files import opener

FOLDER = "setup"


class SetupFailed(Exception):
    """It did not end well; the text says how, with its last words, for people."""

    def __init__(self, ended: RankExit, text: str) -> None:
        super().__init__(text)
        self.ended = ended


def wanted(work: Work) -> bool:
    """Whether it runs by itself: in a container it is the first thing that the node's one process does."""
    return bool(work.spec.setup) and not work.spec.image


def plan_of(work: Work, ranks: LaunchPlan, environment: Mapping[str, str]) -> LaunchPlan:
    """`ranks` is the plan of one process that may use what all ranks may; this is another in its place."""
    first = ranks.ranks[0]
    command = shell_text.passes_signals_on(work.spec.setup)
    return replace(
        ranks,
        task=f"{ranks.task}.{FOLDER}",
        folder=ranks.folder / FOLDER,
        ranks=(RankPlan(first.rank, command, tuple(environment.items()), first.log),),
    )


def announce(plan: LaunchPlan, node: str) -> None:
    """The first line of its output. Blocks."""
    plan.folder.mkdir(mode=0o700, exist_ok=True)
    _mark(plan.ranks[0].log, f"setup on {node}")


def conclude(plan: LaunchPlan, node: str, ended: RankExit) -> None:
    """The last line of its output. Blocks. Raises SetupFailed."""
    log = plan.ranks[0].log
    if ended.code == 0:
        took_s = max(0.0, time.time() - (plan.folder / "attempt.json").stat().st_mtime)
        _mark(log, f"setup ended well after {took_s:.1f} s")
        return
    text = describe(ended, logs.last_text(log, MESSAGE_CHARS), f"setup on {node}")
    _mark(log, text.partition("\n")[0])
    raise SetupFailed(ended, text)


def _mark(log: Path, text: str) -> None:
    with open(log, "a", opener=opener) as file:
        file.write(f"whaleflux: {text}\n")
