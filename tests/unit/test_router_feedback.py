"""What the front door's records say of an engine: Envoy's messages, through the service that it streams them to."""

import contextlib

import pytest
from envoy.service.accesslog.v3 import als_pb2

from whaleflux.clock import VirtualClock
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.convert import encode
from whaleflux_inference_router.core.outcomes import Tally
from whaleflux_inference_router.feedback import Feedback
from whaleflux_inference_router.routing_state import routing

NAME = "models/m/replicas/m-0"


def message(log_name, **fields):
    """A record of the replica's; times in milliseconds."""
    made = als_pb2.StreamAccessLogsMessage()
    made.identifier.log_name = log_name
    entry = made.http_logs.log_entry.add()
    entry.request.request_headers["x-wf-decision-id"] = "d1"
    common = entry.common_properties
    common.upstream_remote_address.socket_address.address = "10.0.0.1"
    common.upstream_remote_address.socket_address.port_value = 9001
    if fields.get("status"):
        entry.response.response_code.value = fields["status"]
    for field in ("time_to_first_upstream_rx_byte", "time_to_last_downstream_tx_byte"):
        if field in fields:
            getattr(common, field).FromMilliseconds(fields[field])
    for flag in fields.get("flags", ()):
        setattr(common.response_flags, flag, True)
    return made


async def told(*messages):
    store, clock = MemoryStore(), VirtualClock()
    replica = pb.Replica(name=NAME, state=pb.REPLICA_STATE_READY, address="10.0.0.1:9001")
    other = pb.Replica(name="models/a/replicas/a-0", state=pb.REPLICA_STATE_READY, address="10.0.0.1:9001")
    await store.commit(Put(keys.REPLICAS + "m/m-0", encode(replica)), Put(keys.REPLICAS + "a/a-0", encode(other)))
    async with routing(store, clock) as current:
        current.load_tracker.open("d1", NAME, 0.0)

        async def stream():
            for one in messages:
                yield one

        await Feedback(current, clock).StreamAccessLogs(stream(), contextlib.nullcontext())
        return current.load_tracker.outcomes.tally([NAME], 0.0), current.load_tracker.open_count


DONE = {"time_to_first_upstream_rx_byte": 100, "time_to_last_downstream_tx_byte": 900}


@pytest.mark.parametrize(
    ("record", "counts"),
    [
        ({"status": 200, **DONE}, (1, 0, 0, 0)),
        ({"status": 400, **DONE}, (0, 0, 1, 0)),
        ({"status": 422, **DONE}, (0, 0, 1, 0)),
        ({"flags": ["downstream_connection_termination"]}, (0, 0, 0, 1)),
        ({"flags": ["downstream_remote_reset"]}, (0, 0, 0, 1)),
        ({"status": 200, "time_to_first_upstream_rx_byte": 100, "flags": ["downstream_connection_termination"]}, (0,) * 4),
        ({"status": 503, "flags": ["upstream_connection_failure"]}, (0,) * 4),
        ({"status": 302, **DONE}, (0,) * 4),
    ],
)  # fmt: skip
async def test_how_a_request_ended_counts_for_or_against_the_engine_that_had_it(record, counts):
    tally, still_open = await told(message("request", **record))
    assert (tally.answered, tally.failed, tally.refused, tally.left) == counts
    assert still_open == 0


async def test_a_failed_attempt_is_the_engines_and_how_long_answers_lasted_is_kept():
    failed, _ = await told(message("attempt", status=500, time_to_first_upstream_rx_byte=5))
    assert failed.failed == 1
    answered, _ = await told(message("request", status=200, **DONE))
    assert answered.first_byte_p99_s is None
    assert answered.longer_than(0.5) == (1, 1)
    assert answered.longer_than(1.0) == (0, 1)


async def test_a_record_of_nobody_says_nothing():
    stray = message("request", status=400, **DONE)
    stray.http_logs.log_entry[0].common_properties.upstream_remote_address.socket_address.port_value = 1
    assert (await told(stray))[0] == Tally()
