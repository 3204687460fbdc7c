"""States are words to people."""

import pytest

from whaleflux.sdk import state_of
from whaleflux.v1 import checkpoint_pb2, health_pb2, inventory_pb2, router_pb2, scheduler_pb2


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (scheduler_pb2.Job(state=scheduler_pb2.JOB_STATE_SUCCEEDED), "SUCCEEDED"),
        (scheduler_pb2.Job(), "UNSPECIFIED"),
        (scheduler_pb2.Job(state=99), "99"),
        (checkpoint_pb2.Checkpoint(state=checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED), "CERTIFIED"),
        (router_pb2.Replica(state=router_pb2.REPLICA_STATE_READY), "READY"),
        (health_pb2.NodeHealth(phase=health_pb2.NODE_PHASE_SUSPECT), "SUSPECT"),
        (health_pb2.Incident(kind=health_pb2.INCIDENT_KIND_GPU_FAULT), "GPU_FAULT"),
    ],
)
def test_what_has_a_state_says_it_in_a_word(message, word):
    assert state_of(message) == word


def test_what_has_none_says_so():
    with pytest.raises(TypeError, match=r"whaleflux\.v1\.Site has no state"):
        state_of(inventory_pb2.Site())
