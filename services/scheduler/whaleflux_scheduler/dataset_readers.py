"""For whom nodes read datasets that are for some: what agents ask before they give pieces of one to a neighbour.

A yes needs three things, each asked where it is known: the job names the dataset, its work or its claim is on that node now, and who submitted it may
use the dataset today. Whatever is not known is no: the neighbour reads at the source then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from whaleflux import names
from whaleflux.errors import NotFound
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Principal
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import agent_pb2
from whaleflux_scheduler.core.data_ahead import datasets_of
from whaleflux_scheduler.core.model import ACTIVE, Job
from whaleflux_scheduler.jobs import Jobs

Known = Callable[[str], Principal | None]
"""Who a record names, with the groups of today; None: not admitted any more (`TrustView.known`)."""
WhoMayUse = Callable[[str], Awaitable[tuple[str, Access] | None]]
"""The owner of a dataset, and whom it is for; None: there is none (`Submissions.who_may_use`)."""


class DatasetReaders:
    """See the module. `known` None: nobody keeps records of people here, so that nothing is for some."""

    def __init__(self, jobs: Jobs, who_may_use: WhoMayUse, known: Known | None) -> None:
        self._jobs, self._who_may_use, self._known = jobs, who_may_use, known

    async def find(self, request: agent_pb2.FindDatasetReaderRequest) -> agent_pb2.FindDatasetReaderResponse:
        """For an agent of that node's site; to others, and of jobs that are not there, it says no. Raises InvalidArgument."""
        names.split(request.dataset, "datasets", field="dataset")
        names.split(request.node, "sites", "nodes", field="node")
        names.split(request.job, "queues", "jobs", field="job")
        ownership.note_asked()
        near = names.top(auth.caller().node) == names.top(request.node)
        reads = near and await self._reads(request.dataset, request.node, request.job)
        return agent_pb2.FindDatasetReaderResponse(reads=reads)

    async def _reads(self, dataset: str, node: str, name: str) -> bool:
        try:
            stored = await self._jobs.placed(name)
        except NotFound:
            return False
        if not _is_there(stored.value, dataset, node) or self._known is None:
            return False
        submitter, found = self._known(stored.message.submitter), await self._who_may_use(dataset)
        if submitter is None or found is None:
            return False
        owner, access = found
        return ownership.may_see(submitter, access) or ownership.is_owner(submitter, owner)


def _is_there(job: Job, dataset: str, node: str) -> bool:
    """Whether the job, which names it, is at work on the node, or has its data pulled there."""
    if not job.readable or dataset not in datasets_of(job):
        return False
    claim, attempt = job.claim, job.attempt
    if claim is not None and not job.ended and dataset in claim.datasets and any(node == at for at, _ in claim.nodes):
        return True
    works = attempt is not None and job.state in ACTIVE and dataset not in attempt.remote_datasets
    return works and attempt is not None and any(task.node == node and not task.over for task in attempt.tasks)
