"""The front door's questions: whose key is it, may a request go on, and to which replicas in which order.

Envoy asks twice about each inference request (ext_authz): first about its key, by the headers alone, so that nobody without one has a
body kept anywhere; then with the whole body, where 200 with a ranking lets it go on. Anything else is the client's answer. What needs
no replica (GET /v1/models) Envoy routes here outright. How it is asked: `policy_server`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, StatusError, Unavailable
from whaleflux.frontdoor import KEY_ADVICE, KEY_PREFIX, NO_REPLICA_STATUS, http_paths
from whaleflux.frontdoor.http_paths import HttpPath
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.auth import NOBODY
from whaleflux.rpc.rate import Rate, sender
from whaleflux.trust.audit import Audit, AuditRecord, NoAudit
from whaleflux_inference_router.core import fatal_requests, request_body
from whaleflux_inference_router.core.ranking import RANKED, Request, RoutingDecision
from whaleflux_inference_router.routing_state import Opening, RoutingState

WRONG_KEYS_PER_S, WRONG_KEYS_BURST = 2.0, 20.0  # of one address; then 429. A good key is served all the same
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the front door."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the front door shows it."""

    method: str
    path: str
    body: bytes = field(default=b"", repr=False)
    authorization: str = field(default="", repr=False)
    content_type: str = ""
    content_encoding: str = ""
    address: str = ""  # of whoever dialled the front door


class RequestAuthorizer:
    """Decides on one request. `open_access`: no key is asked for."""

    def __init__(self, routing: RoutingState, *, open_access: bool, trail: Audit | None = None) -> None:
        self._routing, self._open_access = routing, open_access
        self._trail: Audit = NoAudit() if trail is None else trail
        self._wrong_keys = Rate(WRONG_KEYS_PER_S, WRONG_KEYS_BURST)

    def answer(self, asked: Asked) -> Answer:
        """200 with the ranking, the list of models, or an error in the API's own format that says what to do."""
        try:
            opening = self._opening(asked)
        except Unavailable as starting:  # whose key it is cannot be told yet: that is no wrong key
            return _refused(starting)
        if opening is None:
            return self._without_key(asked)
        if asked.path.startswith(f"{KEY_PREFIX}/"):
            return Answer(200)
        path = asked.path.partition("?")[0]
        row = http_paths.find(asked.method, path)
        if row is None:
            return error(404, f"{asked.method} {path[:200]} is not part of the API; see GET /v1/models")
        if not row.engines:
            name = path.removeprefix("/v1/models").strip("/")
            return self._model(name, opening) if name else _json(200, self._models(opening))
        try:
            return self._send(row, asked, opening)
        except StatusError as refusal:
            return _refused(refusal)

    def _opening(self, asked: Asked) -> Opening | None:
        """What the request's key opens; None: it has none that is good."""
        scheme, _, secret = asked.authorization.partition(" ")
        found = self._routing.opened_by(secret.strip()) if scheme.lower() == "bearer" else None
        return self._routing.open_to_all() if found is None and self._open_access else found

    def _without_key(self, asked: Asked) -> Answer:
        self._trail.record(_refusal(asked))
        wait_s = self._wrong_keys.wait_s(sender(asked.address), self._routing.clock.monotonic())
        if wait_s:
            return error(429, "too many requests without a valid key from your address; wait", _after(wait_s))
        return error(401, KEY_ADVICE)

    def _send(self, row: HttpPath, asked: Asked, opening: Opening) -> Answer:
        facts = request_body.read(asked.body, asked.content_type, asked.content_encoding)
        model = facts.model or self._only_model(opening)
        if (refused := self._closed(model, opening)) is not None:
            self._trail.record(_foreign(asked, model, opening))
            return refused
        if (refused := self._not_for(row, model)) is not None:
            return refused
        fingerprint = fatal_requests.fingerprint(asked.body)
        ended = self._routing.engines_ended_by(fingerprint)
        if ended >= fatal_requests.REFUSED_AFTER:
            return error(
                422,
                f"{ended} engines ended while they worked on this request; it is not sent again for "
                f"{fatal_requests.REMEMBERED_S / 60:.0f} minutes: change it, or show it to whoever runs the engine",
            )
        again = row.repeatable and not facts.keeps and ended < fatal_requests.ALONE_AFTER
        request = Request(model, 0, facts.max_output_tokens, facts.prompt_bytes)
        decision_id, decision = self._routing.send(request, fingerprint, most=2 if again else RANKED)
        names = ",".join(ranked.replica.address for ranked in decision.ranking)
        chosen = (("x-gateway-destination-endpoint", names), ("x-wf-decision-id", decision_id))
        retried = "reset,5xx" if self._is_tried(decision) else "reset"
        return Answer(200, (*chosen, ("x-envoy-retry-on", retried)) if again else chosen)

    def _is_tried(self, decision: RoutingDecision) -> bool:
        """Whether the first of the ranking is a changed engine that is tried or was rolled back: of its errors the engine of before is asked."""
        model = self._routing.snapshot.models.get(decision.request.model)
        trial = None if model is None else model.trial
        return trial is not None and decision.ranking[0].replica.version != trial.serving

    def _not_for(self, row: HttpPath, model: str) -> Answer | None:
        """The refusal where engines of the model's kind do not get this path; a model that is not there is told by the ranking."""
        known = self._routing.snapshot.models.get(model)
        if known is None or known.engine in row.engines:
            return None
        taken = ", ".join(http_paths.engine_paths(known.engine))
        return error(404, f"{model} runs on {known.engine}, which is not asked for {row.path}; it answers {taken}")

    def _closed(self, model: str, opening: Opening) -> Answer | None:
        """The refusal of a model that the key does not open; one that its owner may not use is not there."""
        if not self._routing.opens(opening, model):
            return error(404, f"model {model[:100]!r} does not exist; see GET /v1/models")
        if opening.only and model not in opening.only:
            mine = ", ".join(sorted(opening.only)[:10])
            return error(
                403,
                f"this key is for {mine}; make one for {model[:100]} with: whaleflux keys create --model {model[:100]}",
            )
        return None

    def _only_model(self, opening: Opening) -> str:
        """For a form that names no model: the one that is served, when there is only one."""
        models = self._opened(opening)
        if len(models) != 1:
            raise InvalidArgument(
                FieldViolation("model", "is missing; add a form field `model` that names one of GET /v1/models")
            )
        return models[0]

    def _opened(self, opening: Opening) -> list[str]:
        """Models that a key opens, by name."""
        return [name for name in sorted(self._routing.snapshot.models) if self._closed(name, opening) is None]

    def _models(self, opening: Opening) -> dict[str, Any]:
        return {"object": "list", "data": [_model_object(name) for name in self._opened(opening)]}

    def _model(self, name: str, opening: Opening) -> Answer:
        return self._closed(name, opening) or _json(200, _model_object(name))


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "whaleflux"}


def _refused(refusal: StatusError) -> Answer:
    if isinstance(refusal, NotFound):
        return error(404, refusal.message)
    if isinstance(refusal, InvalidArgument):
        return error(400, refusal.message)
    if isinstance(refusal, Unavailable):
        answer = error(503, refusal.message, _after(1))
        return replace(answer, status=NO_REPLICA_STATUS)  # the front door turns it into 503 again
    return error(500, refusal.message)


def _json(status: int, content: Any, *headers: tuple[str, str]) -> Answer:
    return Answer(status, (("content-type", "application/json"), *headers), orjson.dumps(content))


def _refusal(asked: Asked) -> AuditRecord:
    """What the audit trail keeps of a request without a valid key: never the key."""
    path = asked.path.removeprefix(KEY_PREFIX).partition("?")[0]
    reason = ErrorReason.KEY_UNKNOWN if asked.authorization else ErrorReason.KEY_MISSING
    return AuditRecord(NOBODY.subject, "", f"{asked.method} {path}", "", "UNAUTHENTICATED", reason, asked.address)


def _foreign(asked: Asked, model: str, opening: Opening) -> AuditRecord:
    """What the audit trail keeps of a request with a key that does not open the model; also where there is no such model."""
    who = f"app/{opening.key}" if opening.key else NOBODY.subject
    method = f"{asked.method} {asked.path.partition('?')[0]}"
    return AuditRecord(who, "", method, model, "PERMISSION_DENIED", ErrorReason.NOT_OWNER, asked.address)


def _after(wait_s: float) -> tuple[str, str]:
    return "retry-after", str(math.ceil(wait_s))


def error(status: int, message: str, *headers: tuple[str, str]) -> Answer:
    """OpenAI's error format, so that their client libraries show the message."""
    kind = _KINDS.get(status, "server_error")
    return _json(status, {"error": {"message": message, "type": kind, "param": None, "code": status}}, *headers)
