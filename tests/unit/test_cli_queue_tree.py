"""The tree that `whaleflux queue ls` shows."""

from whaleflux.cli.queue_tree import rows
from whaleflux.v1 import scheduler_pb2 as pb


def test_what_is_held_below_counts_above_and_children_stand_under_their_parents():
    queues = [
        pb.Queue(name="queues/zoo"),
        pb.Queue(name="queues/team", parent="queues/org", guaranteed_gpus=4, weight=2.0),
        pb.Queue(name="queues/org"),
        pb.Queue(name="queues/deep", parent="queues/team"),
    ]
    found = rows(queues, {"deep": 5, "org": 1})
    shown = [(row.queue.name, row.level, row.held, row.guaranteed, row.borrowed) for row in found]
    assert shown == [
        ("queues/org", 0, 6, 4, 2),
        ("queues/team", 1, 5, 4, 1),
        ("queues/deep", 2, 5, 0, 5),
        ("queues/zoo", 0, 0, 0, 0),
    ]
    assert {row.share for row in found} == {"-"}


def test_what_the_leader_counts_is_shown_and_a_parent_that_is_not_there_for_the_caller_is_passed_over():
    queue = pb.Queue(name="queues/team", parent="queues/hidden", weight=2.0)
    queue.use.CopyFrom(pb.QueueUse(held_gpus=7, borrowed_gpus=7, fair_share_gpus=5.0))
    (row,) = rows([queue], {"team": 3})
    assert (row.level, row.held, row.share) == (0, 7, "2.5")
