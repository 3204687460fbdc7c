"""Keys of the inference API: each is somebody's, opens what they may use, or less, and is stored as a hash."""

from __future__ import annotations

import hashlib
import secrets

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, FieldViolation, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Put, Store
from whaleflux.trust import ownership
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert, rights
from whaleflux_inference_router.routing_state import RoutingState

MAX_TTL_S = 10 * 365 * 86400
MOST_MODELS = 100


class ApiKeys:
    """Any replica of the router does this; the front door knows within milliseconds, by each replica's watch."""

    def __init__(self, store: Store, clock: Clock, routing: RoutingState) -> None:
        self._store, self._clock, self._routing = store, clock, routing

    async def create(self, request: pb.CreateApiKeyRequest) -> pb.ApiKey:
        """A key with its secret, which nobody sees again. Raises NotFound for a model that the caller may not use."""
        if not 0 <= request.ttl_s <= MAX_TTL_S:
            raise InvalidArgument(FieldViolation("ttl_s", f"is {request.ttl_s}; use 0 (never ends) to {MAX_TTL_S}"))
        if len(request.display_name) > 200:
            raise InvalidArgument(FieldViolation("display_name", "is longer than 200 characters"))
        if len(request.models) > MOST_MODELS:
            raise InvalidArgument(FieldViolation("models", f"are {len(request.models)}; name at most {MOST_MODELS}"))
        self._check_models(request)
        owner = self._owner(request.owner)
        key_id, secret = names.ulid(), f"wf-{secrets.token_urlsafe(32)}"
        made = pb.ApiKey(name=f"apiKeys/{key_id}", display_name=request.display_name, owner=owner)
        made.models.extend(dict.fromkeys(request.models))
        made.create_time.FromDatetime(self._clock.now())
        if request.ttl_s:
            made.expire_time.FromSeconds(made.create_time.seconds + request.ttl_s)
        made.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        made.secret = hashlib.sha256(secret.encode()).hexdigest()
        key = keys.API_KEYS + key_id
        revision = await self._store.commit(Put(key, made.SerializeToString()), when=[Absent(key)])
        await self._routing.seen(self._routing.api_keys, revision)  # so that the key works at once, at least here
        made.secret = secret
        return made

    async def page(self, request: pb.ListApiKeysRequest) -> pb.ListApiKeysResponse:
        """The caller's; all of them for operators."""
        sight = self._routing.rights.sight()
        page = await list_page(
            self._store,
            keys.API_KEYS,
            convert.api_key,
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda key: sight.everything or ownership.is_owner(sight.principal, key.owner),
        )
        for key in page.items:
            key.secret = ""
        unreadable = page.unreadable if sight.everything else ()
        return pb.ListApiKeysResponse(api_keys=page.items, next_page_token=page.next_page_token, unreadable=unreadable)

    async def delete(self, request: pb.DeleteApiKeyRequest) -> None:
        """Revokes it: the same answer for others' keys as for none."""
        names.split(request.name, "apiKeys")
        sight = self._routing.rights.sight()
        entry = await self._store.get(keys.of_name(keys.API_KEYS, request.name))
        marked = pb.ApiKey() if entry is None else pb.ApiKey.FromString(entry.value)
        if entry is None or not (sight.everything or ownership.is_owner(sight.principal, marked.owner)):
            raise NotFound("apikey", request.name, "list yours with: whaleflux keys list")
        marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            revision = await changes.delete(self._store, entry, marked.SerializeToString())
        except ConditionFailed:
            raise Aborted(f"{request.name} was changed at the same time; repeat") from None
        await self._routing.seen(self._routing.api_keys, revision)

    def _owner(self, asked: str) -> str:
        who = auth.principal()
        if not asked:
            return who.subject
        if not who.is_operator:
            raise InvalidArgument(
                FieldViolation("owner", "is for operators to say; leave it out, and the key is yours")
            )
        role, _, name = asked.partition("/")
        if role not in roles.LOGIN or not name:
            raise InvalidArgument(FieldViolation("owner", f"{asked[:80]!r} is not role/name, as user/ann"))
        return asked

    def _check_models(self, request: pb.CreateApiKeyRequest) -> None:
        sight = self._routing.rights.sight()
        if (queues := sight.principal.queues) is not None and not request.models:
            mine = ", ".join(sorted(map(names.queue, queues)))
            raise InvalidArgument(
                FieldViolation("models", f"is empty, and your token is for {mine} alone; name models that run there")
            )
        for i, name in enumerate(request.models):
            names.split(name, "models", field=f"models[{i}]")
            model = self._routing.model(names.last(name))
            if model is None or not rights.sees(sight, model):
                raise NotFound("model", name, "list what you may use with: whaleflux models")
