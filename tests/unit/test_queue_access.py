"""Whom a queue is for, as it is stored and changed."""

import pytest

from tests.support.scheduler_world import World
from whaleflux.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import queue_access

TEAM = ["groups/research", "users/ann"]


def update(paths=(), **more):
    fields = {k: more.pop(k) for k in ("members", "max_priority", "weight") if k in more}
    request = pb.UpdateQueueRequest(queue=pb.Queue(name="queues/q", **fields), **more)
    request.update_mask.paths.extend(paths)
    return request


async def test_members_and_the_highest_priority_are_kept_changed_and_unset():
    async with World() as world:
        made = pb.Queue(members=[*TEAM, "users/ann"], max_priority=300)
        made = await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=made, request_id="r"), None)
        assert (list(made.members), made.max_priority) == (TEAM, 300), "nobody is named twice"
        again = await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=made, request_id="r"), None)
        assert again.etag == made.etag
        changed = await world.scheduler.UpdateQueue(update(["max_priority"], max_priority=0), None)
        assert changed.HasField("max_priority")
        assert changed.max_priority == 0, "0 is a limit, too"
        changed = await world.scheduler.UpdateQueue(update(["max_priority"]), None)
        assert not changed.HasField("max_priority")
        changed = await world.scheduler.UpdateQueue(update(add_members=["users/bob"], remove_members=TEAM), None)
        assert list(changed.members) == ["users/bob"]
        assert changed.last_change.reason == "members users/bob"
        assert list((await world.scheduler.GetQueue(pb.GetQueueRequest(name="queues/q"), None)).members) == [
            "users/bob"
        ]
        with pytest.raises(FailedPrecondition, match="--open"):
            await world.scheduler.UpdateQueue(update(remove_members=["users/bob"]), None)
        assert not (await world.scheduler.UpdateQueue(update(["members"]), None)).members, "that is said on purpose"


@pytest.mark.parametrize(
    ("queue", "field"),
    [
        (pb.Queue(members=["ann"]), "queue.members[0]"),
        (pb.Queue(members=["users/ann", "groups/"]), "queue.members[1]"),
        (pb.Queue(members=["users/ann/x"]), "queue.members[0]"),
        (pb.Queue(members=[f"users/u{i}" for i in range(1001)]), "queue.members"),
        (pb.Queue(max_priority=1001), "queue.max_priority"),
        (pb.Queue(max_priority=-1), "queue.max_priority"),
    ],
)
async def test_what_names_nobody_is_refused_by_field_and_nothing_is_made(queue, field):
    async with World() as world:
        with pytest.raises(InvalidArgument) as refused:
            await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="q", queue=queue), None)
        assert field in {one.field for one in refused.value.violations}
        listed = await world.scheduler.ListQueues(pb.ListQueuesRequest(), None)
        assert [one.name for one in listed.queues] == ["queues/default"]


def test_a_priority_above_the_limit_says_who_may_give_it():
    queue_access.check_priority(100, 100, "queues/q")
    with pytest.raises(PermissionDenied, match="ask an operator") as refused:
        queue_access.check_priority(101, 100, "queues/q")
    assert refused.value.metadata == {"priority": "101", "limit": "100", "queue": "queues/q"}
