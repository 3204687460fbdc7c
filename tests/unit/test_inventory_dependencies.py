"""What inventory hears of others before a node goes for good."""

import pytest

from whaleflux.errors import FailedPrecondition
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_inventory.dependencies import Peers

NODE = "sites/s/nodes/a"


class Scheduler:
    def __init__(self, *pages):
        self.pages = list(pages)

    async def ListAllocations(self, request, timeout):
        return self.pages.pop(0)


def held(node, gpus, **more):
    task = pb.Task(node=node, gpu_uuids=[f"GPU-{n}" for n in range(gpus)])
    return pb.ListAllocationsResponse(allocations=[pb.Allocation(task=task)], **more)


async def test_gpus_are_counted_over_all_pages():
    scheduler = Scheduler(
        held(NODE, 2, next_page_token="t"), held("sites/s/nodes/b", 4, next_page_token="u"), held(NODE, 1)
    )
    assert await Peers(scheduler=scheduler).gpus_held(NODE) == 3


async def test_a_job_of_unknown_whereabouts_is_not_taken_for_one_that_holds_nothing():
    with pytest.raises(FailedPrecondition) as refused:
        await Peers(scheduler=Scheduler(held("sites/s/nodes/b", 1, unreadable=["queues/q/jobs/j"]))).gpus_held(NODE)
    assert refused.value.reason == "RECORD_UNREADABLE"
