"""Between stored messages and what the core decides on."""

from __future__ import annotations

import copy
from typing import cast

from whaleflux import names
from whaleflux.convert import enum_name
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests import model_checks
from whaleflux.rpc.etags import etag_of
from whaleflux.store import keys
from whaleflux.store.api import Entry
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.core import ranking
from whaleflux_inference_router.core.replicas import State

_STATES = {state.value: state for state in State}
_STATE = "REPLICA_STATE_"


def state_of(replica: pb.Replica) -> State:
    """UNKNOWN for a state that only a newer version knows."""
    return _STATES.get(enum_name(pb.ReplicaState, replica.state, _STATE), State.UNKNOWN)


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
    return names.top(name)


def routed_model(found: pb.Model) -> ranking.Model:
    rules = sorted(found.classes, key=lambda c: c.max_prompt_tokens or float("inf"))
    classes = tuple(ranking.RequestClass(c.max_prompt_tokens, tuple(c.gpu_models)) for c in rules)
    return ranking.Model(model_of(found.name), found.context_window_tokens, classes, found.engine.kind or "openai")


def exempt(found: pb.Model) -> tuple[str, ...]:
    """ip:port that an operator allows it; checked when it was declared."""
    return tuple(found.allowed_addresses)


def routed_replica(found: pb.Replica) -> ranking.Replica:
    state = state_of(found)
    return ranking.Replica(
        found.name,
        found.address,
        state is State.READY,
        state.value,
        found.gpu_model,
        found.gpu_memory_bytes,
        found.usd_per_hour,
        found.message,
    )


def check(found: pb.Model) -> None:
    """Refuses what cannot be served, naming each field, its limit and the fix."""
    if wrong := model_checks.violations(found):
        raise InvalidArgument([FieldViolation(f"model.{one.field}", one.description) for one in wrong])


def response(decision_id: str, decision: ranking.RoutingDecision) -> pb.RouteResponse:
    return pb.RouteResponse(
        decision_id=decision_id,
        prompt_tokens=decision.request.tokens,
        ranking=[
            pb.RankedReplica(replica=r.replica.name, address=r.replica.address, score=r.score, reasons=r.reasons)
            for r in decision.ranking
        ],
        excluded=[pb.ReplicaExclusion(replica=r.name, reason=why) for r, why in decision.excluded],
    )
