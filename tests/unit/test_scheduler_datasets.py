"""What placement is told of a dataset: where it is whole, and where its room is taken for good."""

from datetime import UTC, datetime, timedelta

from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_scheduler.dataset_feed import dataset_fact

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def pin(node, ends=None):
    made = pb.DatasetPin(node=node)
    if ends is not None:
        made.expire_time.FromDatetime(ends)
    return made


def test_whole_copies_pins_that_last_and_what_tasks_read():
    dataset = pb.Dataset(name="datasets/c4", size_bytes=10)
    dataset.copies.add(node="whole", present_bytes=10, state=pb.DATASET_COPY_STATE_READY)
    dataset.copies.add(node="read", present_bytes=10, state=pb.DATASET_COPY_STATE_READY, pinned=True)
    dataset.copies.add(node="part", present_bytes=5, state=pb.DATASET_COPY_STATE_PARTIAL)
    dataset.copies.add(node="coming", state=pb.DATASET_COPY_STATE_PULLING)
    hour = timedelta(hours=1)
    dataset.pins.extend([pin("coming"), pin("until later", NOW + hour), pin("until before", NOW - hour)])
    fact = dataset_fact(dataset, NOW)
    assert (fact.name, fact.size_bytes) == ("datasets/c4", 10)
    assert fact.cached_on == ("whole", "read")
    assert fact.held_on == ("coming", "read", "until later")
