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
from whaleflux_inference_router.core import ranking, rollout
from whaleflux_inference_router.core.replicas import Standing, State
from whaleflux_inference_router.core.rollout import Stage

_STATES = {state.value: state for state in State}
_STATE = "REPLICA_STATE_"
_STAGES = {stage.value: stage for stage in Stage}
_ROLLOUT = "ROLLOUT_STATE_"


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


def router_view(entry: Entry) -> pb.RouterView:
    return pb.RouterView.FromString(entry.value)


def encode(message: pb.Model | pb.Replica) -> bytes:
    stored = copy.deepcopy(message)
    stored.etag = ""
    return stored.SerializeToString()


def model_key(name: str) -> str:
    return keys.of_name(keys.MODELS, name)


def replica_key(name: str) -> str:
    return keys.of_name(keys.REPLICAS, name)


def replicas_of(model: str) -> str:
    """Prefix of the keys of a model's replicas; of all replicas for ""."""
    return f"{keys.REPLICAS}{model}/" if model else keys.REPLICAS


def model_of(name: str) -> str:
    """Id of the model that a replica or model name belongs to."""
    return names.top(name)


def routed_model(found: pb.Model) -> ranking.Model:
    rules = sorted(found.classes, key=lambda c: c.max_prompt_tokens or float("inf"))
    classes = tuple(ranking.RequestClass(c.max_prompt_tokens, tuple(c.gpu_models)) for c in rules)
    kind = found.engine.kind or "openai"
    under_way = stage_of(found) in rollout.UNDER_WAY
    windows = {found.rollout.from_version: found.rollout.from_context_window_tokens} if under_way else {}
    return ranking.Model(model_of(found.name), found.context_window_tokens, classes, kind, _trial(found), windows)


def _trial(found: pb.Model) -> ranking.Trial | None:
    """While a changed engine is tried, and while one that was rolled back has not left."""
    stage = stage_of(found)
    share = rollout.share_of(stage, policy_of(found))
    if share is None:
        return None
    behind = ranking.ROLLED_BACK if stage is Stage.ROLLED_BACK else ranking.OTHER_VERSION
    return ranking.Trial(found.rollout.to_version, share, found.rollout.from_version, behind)


def stage_of(found: pb.Model) -> Stage:
    """NONE for a stage that only a newer version knows: what serves goes on as it is."""
    return _STAGES.get(enum_name(pb.RolloutState, found.rollout.state, _ROLLOUT), Stage.NONE)


def stage_number(stage: Stage) -> pb.RolloutState:
    return cast("pb.RolloutState", pb.RolloutState.Value(_ROLLOUT + stage.value))


def policy_of(found: pb.Model) -> rollout.Policy:
    """What the model says of rollouts, and the defaults."""
    asked = found.rollout_policy
    return rollout.Policy(
        asked.canary_percent / 100 if asked.canary_percent else rollout.SHARE,
        asked.watch.ToNanoseconds() / 1e9 if asked.HasField("watch") else rollout.WATCH_S,
        asked.ready_within.ToNanoseconds() / 1e9 if asked.HasField("ready_within") else rollout.READY_WITHIN_S,
    )


def engine_at(found: pb.Model, version: int, site: str) -> pb.Engine:
    """The engine of a version as it is at a site: with that site's GPU types, words and variables."""
    before = version == found.rollout.from_version and version != found.version and stage_of(found) is not Stage.NONE
    engine, sites = (found.rollout.from_engine, found.rollout.from_sites) if before else (found.engine, found.sites)
    here = next((one for one in sites if one.site == site), None)
    made = model_checks.with_site(engine, here or pb.ModelSite())
    if here is not None and here.args:
        model_checks.add_arguments(made)
    return made


def objective_at(found: pb.Model, version: int) -> tuple[pb.ServiceObjective, int]:
    """What the replicas of a version are to keep, and the tokens of their longest request."""
    old = found.rollout
    if version == old.from_version and version != found.version and stage_of(found) is not Stage.NONE:
        return old.from_objective, old.from_context_window_tokens
    return found.objective, found.context_window_tokens


def is_engine_known(found: pb.Model, version: int) -> bool:
    """Whether a replica of that version could be started again; not one that was rolled back."""
    return version in {found.version or 1, found.rollout.from_version or 1}


def standing(found: pb.Replica) -> Standing:
    """What of a replica decides on whether it stays."""
    return Standing(state_of(found), found.version or 1, found.site, bool(found.declared_address))


def rollout_of(found: pb.Model) -> rollout.Rollout:
    """The rollout; of a model whose engine was never changed one that is over."""
    asked, stage = model_checks.replicas_of(found), stage_of(found)
    order = [site for site in found.rollout.order if site in asked]
    wanted = {site: asked[site] for site in (*order, *asked)}
    to = found.rollout.to_version if stage is not Stage.NONE else found.version or 1
    old = found.rollout
    before = {site.site: site.replicas or old.from_replicas for site in old.from_sites} or {"": old.from_replicas}
    return rollout.Rollout(stage, old.from_version, to, wanted, before, policy_of(found))


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
        found.version or 1,
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
