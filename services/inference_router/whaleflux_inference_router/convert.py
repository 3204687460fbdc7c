"""Between stored messages and what the core decides on."""

from __future__ import annotations

import copy
from typing import cast

from whaleflux.rpc.etags import etag_of
from whaleflux.store import keys
from whaleflux.store.api import Entry
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.core import policy
from whaleflux_inference_router.core.replicas import State, check_model

_STATE = "REPLICA_STATE_"


def state_of(replica: pb.Replica) -> State:
    return State(pb.ReplicaState.Name(replica.state).removeprefix(_STATE))


def state_number(state: State) -> pb.ReplicaState:
    return cast("pb.ReplicaState", pb.ReplicaState.Value(_STATE + state.value))


def model(entry: Entry) -> pb.Model:
    found = pb.Model.FromString(entry.value)
    found.etag = etag_of(entry)
    return found


def replica(entry: Entry) -> pb.Replica:
    found = pb.Replica.FromString(entry.value)
    found.etag = etag_of(entry)
    return found


def api_key(entry: Entry) -> pb.ApiKey:
    """The stored key; its `secret` field holds the SHA-256 of the secret and is never shown."""
    return pb.ApiKey.FromString(entry.value)


def encode(message: pb.Model | pb.Replica) -> bytes:
    stored = copy.deepcopy(message)
    stored.etag = ""
    return stored.SerializeToString()


def model_key(name: str) -> str:
    return keys.of_name(keys.MODELS, name)


def replica_key(name: str) -> str:
    return keys.of_name(keys.REPLICAS, name)


def model_of(name: str) -> str:
    """Id of the model that a replica or model name belongs to."""
    return name.split("/")[1]


def routed_model(found: pb.Model) -> policy.Model:
    rules = sorted(found.classes, key=lambda c: c.max_prompt_tokens or float("inf"))
    classes = tuple(policy.RequestClass(c.max_prompt_tokens, tuple(c.gpu_models)) for c in rules)
    return policy.Model(model_of(found.name), found.context_window_tokens, classes)


def routed_replica(found: pb.Replica) -> policy.Replica:
    state = state_of(found)
    return policy.Replica(
        found.name,
        found.address,
        state is State.READY,
        state.value,
        found.gpu_model,
        found.gpu_memory_bytes,
        found.usd_per_hour,
    )


def check(found: pb.Model) -> None:
    """Refuses what cannot be served."""
    check_model(
        command=found.engine.command,
        image=found.engine.image,
        addresses=found.engine.addresses,
        gpus=found.engine.gpus,
        least=found.replicas.min,
        most=found.replicas.max,
        window=found.context_window_tokens,
    )


def response(decision_id: str, decision: policy.Decision) -> pb.RouteResponse:
    return pb.RouteResponse(
        decision_id=decision_id,
        prompt_tokens=decision.request.tokens,
        ranking=[
            pb.RankedReplica(replica=r.replica.name, address=r.replica.address, score=r.score, reasons=r.reasons)
            for r in decision.ranking
        ],
        excluded=[pb.ReplicaExclusion(replica=r.name, reason=why) for r, why in decision.excluded],
    )
