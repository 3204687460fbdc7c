"""RouterService: models and keys in the store, replicas as they are, and the decision itself."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
from google.protobuf import empty_pb2

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.rpc.watching import fill, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Put, Store, Unchanged
from whaleflux.store.once import commit_once
from whaleflux.trust import ownership
from whaleflux.trust.sight import Sight
from whaleflux.trust.watched import Watched
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import router_pb2_grpc as rpc
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub
from whaleflux_inference_router import convert, model_addresses, model_changes, model_secrets, rights
from whaleflux_inference_router.api_keys import ApiKeys
from whaleflux_inference_router.core.ranking import Request, unknown_model
from whaleflux_inference_router.core.replicas import State
from whaleflux_inference_router.core.rollout import UNDER_WAY, Stage
from whaleflux_inference_router.deployments import Deployments, estimate, order_of
from whaleflux_inference_router.replica_reader import ReplicaReader
from whaleflux_inference_router.resolver import Resolver
from whaleflux_inference_router.routing_state import RoutingState
from whaleflux_inference_router.served_tokens import ServedTokens

_Context = grpc.aio.ServicerContext[object, object]


class Router(rpc.RouterServiceServicer):
    """See the module. Any replica of the router answers everything here."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        routing: RoutingState,
        resolver: Resolver | None = None,
        secrets: SecretServiceStub | None = None,
        deployments: Deployments | None = None,
        served: ServedTokens | None = None,
    ) -> None:
        self._store, self._clock, self._routing, self._rights = store, clock, routing, routing.rights
        self._resolver, self._secrets = resolver or Resolver(clock), secrets
        self._deployments = deployments or Deployments(None)
        self._served = served or ServedTokens(clock)
        self.keys = ApiKeys(store, clock, routing)

    async def CreateModel(self, request: pb.CreateModelRequest, context: _Context | None) -> pb.Model:
        name = names.model(names.check_id("model_id", request.model_id))
        convert.check(request.model)
        made = pb.Model()
        made.CopyFrom(request.model)
        made.name, made.owner = name, auth.principal().subject
        model_changes.clear_output(made)
        made.version = 1
        self._rights.check_use(rights.queue_of(made))
        model_addresses.settle_exemptions(made, (), by_operator=_is_operator())
        await model_addresses.check(made, self._resolver)
        await model_secrets.check(made, self._secrets)
        await self._deployments.settle(made)
        made.create_time.FromDatetime(self._clock.now())
        made.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        key = convert.model_key(name)
        if request.validate_only:
            if await self._store.get(key) is not None:
                raise _exists(name)
            return made
        try:
            revision = await commit_once(self._store, Put(key, convert.encode(made)), when=[Absent(key)], key=key)
        except ConditionFailed:
            existing = await self._store.get(key)
            if existing is None or not (request.request_id and _same_model(existing, made)):
                raise _exists(name) from None
            return self._shown(convert.model(existing), self._rights.sight())
        await self._routing.seen(self._routing.models, revision)
        made.etag = f'"{revision}"'
        return made

    async def GetModel(self, request: pb.GetModelRequest, context: _Context | None) -> pb.Model:
        sight = self._rights.sight()
        return self._shown(convert.model(await self._seen(request.name, sight)), sight)

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context | None) -> pb.ListModelsResponse:
        sight = self._rights.sight()
        page = await list_page(
            self._store,
            keys.MODELS,
            convert.model,
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda model: rights.sees(sight, model),
        )
        return pb.ListModelsResponse(
            models=[self._shown(model, sight) for model in page.items],
            next_page_token=page.next_page_token,
            unreadable=page.unreadable if sight.everything else (),
        )

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: _Context | None) -> pb.Model:
        convert.check(request.model)
        sight = self._rights.sight()
        entry = await self._changeable(request.model.name, sight)
        check_etag(request.model.etag, entry)
        changed, known = pb.Model(), convert.model(entry)
        changed.CopyFrom(request.model)
        model_changes.clear_output(changed)
        changed.version = known.version or 1
        changed.rollout.CopyFrom(known.rollout)
        changed.measures.extend(known.measures)
        changed.owner, changed.queue = known.owner, model_changes.fixed_queue(known, changed)
        if _most(changed) > _most(known):
            self._rights.check_more(known.name, rights.queue_of(known))
        model_addresses.settle_exemptions(changed, known.allowed_addresses, by_operator=_is_operator())
        await model_addresses.check(changed, self._resolver, known.engine.addresses)
        await self._roll(known, changed)
        changed.create_time.CopyFrom(known.create_time)
        changed.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), _what_changed(entry, changed)))
        try:
            revision = await self._store.commit(Put(entry.key, convert.encode(changed)), when=[Unchanged(entry)])
        except ConditionFailed:
            raise Aborted(f"{request.model.name} was changed at the same time; read it again and repeat") from None
        await self._routing.seen(self._routing.models, revision)
        changed.etag = f'"{revision}"'
        return self._shown(changed, sight)

    async def _roll(self, known: pb.Model, changed: pb.Model) -> None:
        """Checks where a changed model is to run, and begins a rollout where what its replicas run has changed.

        Other counts at the same sites ask nobody: they are changed while inventory is away, too.
        """
        same = model_changes.same_engine(known, changed)
        if not same or {site.site for site in changed.sites} - {site.site for site in known.sites}:
            facts = await self._deployments.settle(changed, known.engine.weights)
        if same:
            changed.engine.gpu_memory_bytes = known.engine.gpu_memory_bytes
            return
        model_changes.check_may_roll(known, changed)
        await model_secrets.check(changed, self._secrets)
        model_changes.begin(changed, known, order_of(changed, facts), self._clock.now())

    async def RollBackModel(self, request: pb.RollBackModelRequest, context: _Context | None) -> pb.Model:
        sight = self._rights.sight()
        entry = await self._changeable(request.name, sight)
        check_etag(request.etag, entry)
        known, changed = convert.model(entry), convert.model(entry)
        stage = convert.stage_of(known)
        if stage not in UNDER_WAY and stage is not Stage.DONE:
            raise FailedPrecondition(
                f"{request.name} has no engine of before to go back to: whaleflux rollout status {names.last(request.name)}",
                reason=ErrorReason.WRONG_STATE,
                metadata={"name": request.name},
            )
        now, who = self._clock.now(), auth.principal().subject
        model_changes.restore(changed)
        if stage is Stage.DONE:
            facts = await self._deployments.settle(changed, known.engine.weights)
            changed.version = known.version
            model_changes.begin(changed, known, order_of(changed, facts), now)
            changed.rollout.message = f"{who} goes back to v{known.rollout.from_version}: {changed.rollout.message}"
        else:
            changed.rollout.state = pb.ROLLOUT_STATE_ROLLED_BACK
            changed.rollout.message = f"v{known.rollout.to_version} was rolled back by {who}"
            changed.rollout.step_time.FromDatetime(now)
        changed.last_change.CopyFrom(changes.asked(What.CHANGED, now, "engine"))
        try:
            revision = await self._store.commit(Put(entry.key, convert.encode(changed)), when=[Unchanged(entry)])
        except ConditionFailed:
            raise Aborted(f"{request.name} was changed at the same time; read it again and repeat") from None
        await self._routing.seen(self._routing.models, revision)
        changed.etag = f'"{revision}"'
        return self._shown(changed, sight)

    async def EstimateDeployment(
        self, request: pb.EstimateDeploymentRequest, context: _Context | None
    ) -> pb.EstimateDeploymentResponse:
        sight = self._rights.sight()
        model, replicas, before = request.model, list[pb.Replica](), ""
        if request.name:
            model = convert.model(await self._seen(request.name, sight))
            if not sight.reads(rights.queue_of(model), model.owner):
                raise ownership.not_owner(request.name, model.owner)
            mine, before = names.last(request.name), model.rollout.from_engine.weights
            replicas = [r for r in self._routing.replicas.values.values() if convert.model_of(r.name) == mine]
        else:
            convert.check(model)
            model_changes.clear_output(model)
            known = self._routing.model(names.last(model.name)) if model.name else None
            if known is not None and sight.reads(rights.queue_of(known), known.owner):
                model.measures.extend(known.measures)
                before = known.engine.weights
        facts = await self._deployments.facts(model, before, needed=False)
        others = list(self._routing.models.values.values())
        return pb.EstimateDeploymentResponse(sites=estimate(model, facts, replicas, others))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: _Context | None) -> empty_pb2.Empty:
        entry = await self._changeable(request.name, self._rights.sight())
        check_etag(request.etag, entry)
        marked = convert.model(entry)
        marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            revision = await changes.delete(self._store, entry, convert.encode(marked))
        except ConditionFailed:
            raise Aborted(f"{request.name} was changed at the same time; repeat") from None
        await self._routing.seen(self._routing.models, revision)
        return empty_pb2.Empty()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: _Context | None) -> pb.ListReplicasResponse:
        model = _parent(request.parent)
        reader = ReplicaReader(self._routing, self._rights.sight())
        page = await list_page(
            self._store,
            keys.REPLICAS,
            convert.replica,
            size=page_size(request.page_size, default=500),
            token=request.page_token,
            scope=convert.replicas_of(model) if model else "",
            keep=lambda one: not reader.hides(one),
        )
        if request.with_served_tokens:
            await self._served.add_to(page.items)
        return pb.ListReplicasResponse(
            replicas=map(reader.shown, page.items),
            next_page_token=page.next_page_token,
            unreadable=page.unreadable if reader.sight.everything else (),
            resource_version=page.revision,
        )

    async def WatchReplicas(
        self, request: pb.WatchReplicasRequest, context: _Context | None
    ) -> AsyncIterator[pb.WatchReplicasResponse]:
        model, since = _parent(request.parent), request.resource_version
        reader = ReplicaReader(self._routing, self._rights.sight())
        changes = watch_resources(self._store, convert.replicas_of(model), since, convert.replica, clock=self._clock)
        seen = Watched(reader.sight, self._clock, reader.rules(resumed=since > 0))
        async with contextlib.aclosing(changes):
            async for change in changes:
                if (told := seen.as_told(change)) is not None:
                    yield fill(
                        pb.WatchReplicasResponse(), told, None if told.value is None else reader.shown(told.value)
                    )

    async def Route(self, request: pb.RouteRequest, context: _Context | None) -> pb.RouteResponse:
        numbers = (request.prompt_tokens, request.max_output_tokens, request.prompt_bytes)
        if not request.model or any(not 0 <= number <= 10**12 for number in numbers):
            raise InvalidArgument(FieldViolation("request", "needs a model, and numbers of 0 or more"))
        asked, sight = Request(request.model.removeprefix("models/"), *numbers), self._rights.sight()
        model = self._routing.model(asked.model)
        if model is None or not rights.sees(sight, model):
            raise unknown_model(asked.model)
        response = convert.response("", self._routing.decide(asked))
        return response if sight.reads(rights.queue_of(model), model.owner) else _without_addresses(response)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: _Context | None) -> pb.ApiKey:
        return await self.keys.create(request)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: _Context | None) -> pb.ListApiKeysResponse:
        return await self.keys.page(request)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: _Context | None) -> empty_pb2.Empty:
        await self.keys.delete(request)
        return empty_pb2.Empty()

    def _shown(self, model: pb.Model, sight: Sight) -> pb.Model:
        replicas = self._routing.snapshot.replicas.get(convert.model_of(model.name), ())
        model.ready_replicas = sum(r.state == State.READY.value for r in replicas)
        return rights.shown_model(model, sight)

    async def _seen(self, name: str, sight: Sight) -> Entry:
        """The record; raises NotFound, the same for one that is not there for the caller."""
        names.split(name, "models")
        entry = await self._store.get(convert.model_key(name))
        if entry is None or not rights.sees(sight, convert.model(entry)):
            raise NotFound("model", name)
        return entry

    async def _changeable(self, name: str, sight: Sight) -> Entry:
        """The record; raises PermissionDenied (NOT_OWNER) where the caller only sees it."""
        entry = await self._seen(name, sight)
        model = convert.model(entry)
        if not sight.changes(rights.queue_of(model), model.owner):
            raise ownership.not_owner(name, model.owner)
        return entry


def _parent(name: str) -> str:
    """Id of the model whose replicas are asked for; "": of all."""
    return "" if name in {"", "models/-"} else names.split(name, "models", field="parent")[0]


def _most(model: pb.Model) -> int:
    """Replicas that it may have."""
    return max(model.replicas.min, model.replicas.max)


def _is_operator() -> bool:
    return auth.caller().role in roles.OPERATORS


def _exists(name: str) -> AlreadyExists:
    return AlreadyExists("model", name, "change it with UpdateModel, or delete it first")


def _same_model(existing: Entry, made: pb.Model) -> bool:
    """Whether a repeated CreateModel asks for what is there."""
    found = convert.model(existing)
    found.etag = ""
    found.create_time.CopyFrom(made.create_time)
    found.last_change.CopyFrom(made.last_change)
    return found == made


def _what_changed(before: Entry, after: pb.Model) -> str:
    """Names of the fields that differ."""
    old = convert.model(before)
    names_ = (field.name for field in pb.Model.DESCRIPTOR.fields)
    skipped = {"name", "create_time", "ready_replicas", "last_change", "owner", "etag"}
    return ", ".join(name for name in names_ if name not in skipped and getattr(old, name) != getattr(after, name))


def _without_addresses(response: pb.RouteResponse) -> pb.RouteResponse:
    """For who may use the model only: where its engines are is not told."""
    for ranked in response.ranking:
        ranked.address = ""
    for excluded in response.excluded:
        excluded.reason = excluded.reason.partition(":")[0]
    return response
