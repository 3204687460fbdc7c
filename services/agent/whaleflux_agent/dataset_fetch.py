"""One fetch of a dataset, as those who wait for it see it, and how it can end without a copy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from whaleflux import telemetry
from whaleflux.data import progress
from whaleflux.data.manifest import ManifestWrong
from whaleflux.data.sources import Source, SourceFailed, SourceReplaced
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.dataset_donors import Given
from whaleflux_agent.dataset_progress import Progress, Stopped
from whaleflux_agent.dataset_pull import Pull, in_thread
from whaleflux_agent.dataset_reports import FAILED, CopyReports
from whaleflux_agent.dataset_store import Copy
from whaleflux_agent.dataset_wanted import Wanted
from whaleflux_agent.runtime.api import LaunchFailed

_log = telemetry.get_logger("whaleflux.agent")


class Unkept(Exception):
    """It cannot be kept here; who may reads it where it is."""

    def __init__(self, dataset: inventory_pb2.Dataset, wanted: Wanted, source: Source, why: str) -> None:
        super().__init__(why)
        self.dataset, self.wanted, self.source = dataset, wanted, source


class MadeElsewhere(Exception):
    """Another node of the site reads it first."""

    def __init__(self, dataset: inventory_pb2.Dataset) -> None:
        super().__init__(dataset.name)
        self.dataset = dataset


@dataclass(slots=True)
class Fetch:
    """One fetch of a dataset, for all who wait for it."""

    progress: Progress = field(default_factory=Progress)
    task: asyncio.Task[Copy] = field(init=False)
    unkept: Unkept | None = None  # why there is a part of it only, or nothing
    given: Given = field(default_factory=Given)  # what other copies here have of it
    looked: tuple[float, int] = (0.0, 0)  # when, and at how many bytes

    def words(self, dataset: str) -> str:
        """How far it is, and how fast since the last look."""
        now_s, (then_s, before) = asyncio.get_running_loop().time(), self.looked
        self.looked = now_s, self.progress.pulled_bytes
        if self.progress.waits_for:
            return f"{dataset}, which {self.progress.waits_for} reads first"
        if not self.progress.total_bytes:
            return dataset
        rate = (self.progress.pulled_bytes - before) / max(now_s - then_s, 0.001) if then_s else 0
        return f"{dataset} {progress.words(self.progress.done_bytes, self.progress.total_bytes, rate)}"


@asynccontextmanager
async def said_of(dataset: str, reports: CopyReports, uri: Callable[[], str] = lambda: "") -> AsyncIterator[None]:
    """In the block it is fetched: what fails there is said to inventory, and why the task is not launched. Raises LaunchFailed, Unkept."""
    try:
        yield
    except (SourceFailed, ManifestWrong, OSError) as failure:
        await reports.say(dataset, FAILED, message=str(failure))
        why = f"{dataset}: cannot fetch {uri() or 'it'}: {failure}"
        raise LaunchFailed(why, unfit=isinstance(failure, SourceReplaced)) from None
    except StatusError as failed:
        raise LaunchFailed(f"{dataset}: {failed.message}") from None
    except Stopped:
        raise LaunchFailed(f"{dataset}: the agent stops") from None
    except (LaunchFailed, Unkept):
        raise
    except Exception as bug:  # whatever is wrong with this one, the node's other work goes on
        _log.exception(Event.DATASET_UNCACHED, dataset=dataset, reason=repr(bug))
        raise LaunchFailed(f"{dataset}: {bug!r}; the agent's log has more") from None


@asynccontextmanager
async def running(pull: Pull) -> AsyncIterator[asyncio.Event]:
    """In the block, as far as it comes, and whether it came to its end; what it fails at somebody else finds out."""
    ended = asyncio.Event()

    async def run() -> None:
        await in_thread(pull.run)
        ended.set()

    task = asyncio.create_task(run())
    try:
        yield ended
    finally:
        pull.progress.stop.set()
        await asyncio.gather(task, return_exceptions=True)
