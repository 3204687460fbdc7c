"""RouterService: models and keys in the store, replicas as they are, and the decision itself."""

from __future__ import annotations

import hashlib
import secrets

import grpc
from google.protobuf import empty_pb2

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, Conflict, FieldViolation, Invalid, NotFound, WrongState
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Put, Store, Unchanged
from whaleflux.store.once import commit_once
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import router_pb2_grpc as rpc
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.policy import Request
from whaleflux_inference_router.core.replicas import State
from whaleflux_inference_router.routing import Routing

MAX_KEY_TTL_S = 10 * 365 * 86400
_Context = grpc.aio.ServicerContext[object, object]


class Router(rpc.RouterServiceServicer):
    """See the module. Any replica of the router answers everything here."""

    def __init__(self, store: Store, clock: Clock, routing: Routing) -> None:
        self._store, self._clock, self._routing = store, clock, routing

    async def CreateModel(self, request: pb.CreateModelRequest, context: _Context | None) -> pb.Model:
        name = f"models/{names.check_id('model_id', request.model_id)}"
        convert.check(request.model)
        made = pb.Model()
        made.CopyFrom(request.model)
        made.name, made.ready_replicas = name, 0
        made.create_time.FromDatetime(self._clock.now())
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
            return self._shown(convert.model(existing))
        await self._routing.seen(self._routing.models, revision)
        made.etag = f'"{revision}"'
        return made

    async def GetModel(self, request: pb.GetModelRequest, context: _Context | None) -> pb.Model:
        return self._shown(convert.model(await self._existing("model", convert.model_key(request.name), request.name)))

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context | None) -> pb.ListModelsResponse:
        page = await list_page(
            self._store, keys.MODELS, convert.model, size=page_size(request.page_size), token=request.page_token
        )
        return pb.ListModelsResponse(models=map(self._shown, page.items), next_page_token=page.next_page_token)

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: _Context | None) -> pb.Model:
        key = convert.model_key(request.model.name)
        convert.check(request.model)
        entry = await self._existing("model", key, request.model.name)
        check_etag(request.model.etag, entry)
        changed = pb.Model()
        changed.CopyFrom(request.model)
        _check_engine(convert.model(entry), changed)
        changed.create_time.CopyFrom(convert.model(entry).create_time)
        changed.ready_replicas = 0
        try:
            revision = await self._store.commit(Put(key, convert.encode(changed)), when=[Unchanged(entry)])
        except ConditionFailed:
            raise Conflict(f"{request.model.name} was changed at the same time; read it again and repeat") from None
        await self._routing.seen(self._routing.models, revision)
        changed.etag = f'"{revision}"'
        return self._shown(changed)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: _Context | None) -> empty_pb2.Empty:
        key = convert.model_key(request.name)
        entry = await self._existing("model", key, request.name)
        check_etag(request.etag, entry)
        try:
            revision = await self._store.commit(Delete(key), when=[Unchanged(entry)])
        except ConditionFailed:
            raise Conflict(f"{request.name} was changed at the same time; repeat") from None
        await self._routing.seen(self._routing.models, revision)
        return empty_pb2.Empty()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: _Context | None) -> pb.ListReplicasResponse:
        (model,) = (
            ("",) if request.parent in {"", "models/-"} else names.split(request.parent, "models", field="parent")
        )
        page = await list_page(
            self._store,
            keys.REPLICAS,
            convert.replica,
            size=page_size(request.page_size, default=500),
            token=request.page_token,
            scope=f"{keys.REPLICAS}{model}/" if model else "",
        )
        shown = []
        for replica in page.items:
            load = self._routing.book.loads.get(replica.name)
            replica.in_flight = load.in_flight if load else 0
            shown.append(replica)
        return pb.ListReplicasResponse(replicas=shown, next_page_token=page.next_page_token)

    async def Route(self, request: pb.RouteRequest, context: _Context | None) -> pb.RouteResponse:
        numbers = (request.prompt_tokens, request.max_output_tokens, request.prompt_bytes)
        if not request.model or any(not 0 <= number <= 10**12 for number in numbers):
            raise Invalid(FieldViolation("request", "needs a model, and numbers of 0 or more"))
        asked = Request(request.model.removeprefix("models/"), *numbers)
        return convert.response("", self._routing.decide(asked))

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: _Context | None) -> pb.ApiKey:
        if not 0 <= request.ttl_s <= MAX_KEY_TTL_S:
            raise Invalid(FieldViolation("ttl_s", f"is {request.ttl_s}; use 0 (never ends) to {MAX_KEY_TTL_S}"))
        if len(request.display_name) > 200:
            raise Invalid(FieldViolation("display_name", "is longer than 200 characters"))
        key_id, secret = names.ulid(), f"wf-{secrets.token_urlsafe(32)}"
        made = pb.ApiKey(name=f"apiKeys/{key_id}", display_name=request.display_name)
        made.create_time.FromDatetime(self._clock.now())
        if request.ttl_s:
            made.expire_time.FromSeconds(made.create_time.seconds + request.ttl_s)
        made.secret = hashlib.sha256(secret.encode()).hexdigest()
        revision = await self._store.commit(
            Put(keys.API_KEYS + key_id, made.SerializeToString()), when=[Absent(keys.API_KEYS + key_id)]
        )
        await self._routing.seen(self._routing.api_keys, revision)  # so that the key works at once, at least here
        made.secret = secret
        return made

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: _Context | None) -> pb.ListApiKeysResponse:
        page = await list_page(
            self._store, keys.API_KEYS, convert.api_key, size=page_size(request.page_size), token=request.page_token
        )
        for key in page.items:
            key.secret = ""
        return pb.ListApiKeysResponse(api_keys=page.items, next_page_token=page.next_page_token)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: _Context | None) -> empty_pb2.Empty:
        names.split(request.name, "apiKeys")
        key = keys.of_name(keys.API_KEYS, request.name)
        entry = await self._existing("apikey", key, request.name)
        await self._routing.seen(self._routing.api_keys, await self._store.commit(Delete(entry.key)))
        return empty_pb2.Empty()

    def _shown(self, model: pb.Model) -> pb.Model:
        replicas = self._routing.snapshot.replicas.get(convert.model_of(model.name), ())
        model.ready_replicas = sum(r.state == State.READY.value for r in replicas)
        return model

    async def _existing(self, kind: str, key: str, name: str) -> Entry:
        collection = "apiKeys" if kind == "apikey" else f"{kind}s"
        names.split(name, collection)
        entry = await self._store.get(key)
        if entry is None:
            raise NotFound(kind, name)
        return entry


def _exists(name: str) -> AlreadyExists:
    return AlreadyExists("model", name, "change it with UpdateModel, or delete it first")


def _same_model(existing: Entry, made: pb.Model) -> bool:
    """Whether a repeated CreateModel asks for what is there."""
    found = convert.model(existing)
    found.etag = ""
    found.create_time.CopyFrom(made.create_time)
    return found == made


def _check_engine(before: pb.Model, after: pb.Model) -> None:
    """Replicas that run keep their engine: what they serve must not differ from what the model says."""
    old, new = pb.Engine(), pb.Engine()
    old.CopyFrom(before.engine)
    new.CopyFrom(after.engine)
    if old.addresses and new.addresses:  # servers that run elsewhere come and go
        new.addresses[:] = old.addresses
    if old != new:
        raise WrongState(
            f"the engine of {before.name} cannot change while it is served; delete the model and create it again, or "
            "serve the new engine under another name",
            reason="ENGINE_FIXED",
            metadata={"model": before.name},
        )
