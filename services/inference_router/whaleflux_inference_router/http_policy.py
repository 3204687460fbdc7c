"""The front door's question, answered over HTTP: may a request go on, and to which replicas in which order.

Envoy sends each inference request here with its whole body (ext_authz); 200 with a ranking lets it go on, anything else
is the client's answer. What needs no replica (GET /v1/models) Envoy routes here outright. An own small server rather
than a framework: this is on the path of every request. It listens where only the front door can reach it (loopback, or
the pod's network) and speaks no TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httptools
import orjson

from whaleflux import telemetry
from whaleflux.embedded.envoy import NO_REPLICA_STATUS
from whaleflux.errors import FieldViolation, Invalid, NotFound, Refusal, Unavailable
from whaleflux.telemetry import Metric
from whaleflux_inference_router.core.policy import Request
from whaleflux_inference_router.routing import Routing

MAX_BODY_BYTES = 17 << 20  # the front door refuses above 16 MiB; a little more, so that its answer is the one seen
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the front door."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Gate:
    """Decides on one request. `open_access`: no key is asked for."""

    def __init__(self, routing: Routing, *, open_access: bool) -> None:
        self._routing, self._open_access = routing, open_access

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> Answer:
        """200 with the ranking, the list of models, or an error in the API's own format that says what to do."""
        scheme, _, secret = authorization.partition(" ")
        if not self._open_access and not (scheme.lower() == "bearer" and self._routing.knows_key(secret.strip())):
            return _error(
                401, "this API needs a key: Authorization: Bearer <key>; make one with: whaleflux keys create"
            )
        path = path.partition("?")[0]
        about_models = path == "/v1/models" or path.startswith("/v1/models/")
        if method == "GET" and about_models:
            name = path.removeprefix("/v1/models").strip("/")
            return self._model(name) if name else _json(200, self._models())
        if method != "POST" or about_models:
            return _error(404, f"{method} {path[:200]} is not part of the API; see GET /v1/models")
        try:
            decision_id, decision = self._routing.send(request_of(body))
        except Refusal as refusal:
            return _refused(refusal)
        names = ",".join(ranked.replica.address for ranked in decision.ranking)
        return Answer(200, (("x-gateway-destination-endpoint", names), ("x-wf-decision-id", decision_id)))

    def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_model_object(name) for name in sorted(self._routing.snapshot.models)]}

    def _model(self, name: str) -> Answer:
        if name in self._routing.snapshot.models:
            return _json(200, _model_object(name))
        return _error(404, f"model {name[:100]!r} does not exist; see GET /v1/models")


def request_of(body: bytes) -> Request:
    """What routing reads of an OpenAI request. Raises Invalid naming the field."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Invalid(FieldViolation("body", f"is not JSON: {str(error)[:100]}")) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), str) or not content["model"]:
        raise Invalid(FieldViolation("model", "is missing; name one of GET /v1/models"))
    asked = content.get("max_completion_tokens", content.get("max_tokens"))
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or not 0 < asked <= 10**9):
        raise Invalid(FieldViolation("max_tokens", "must be a whole number above 0"))
    # Without a limit the engine answers as long as fits: nothing to refuse here.
    return Request(content["model"], 0, asked or 0, _prompt_bytes(content))


def _prompt_bytes(content: dict[str, Any]) -> int:
    """Size of what the model has to read: text only, images and audio are not counted."""
    prompt = content.get("messages", content.get("prompt", content.get("input", "")))
    pending, size = [prompt], 0
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            size += len(part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            pending.extend(value for key, value in part.items() if key in {"content", "text"})
    return size


class _Connection(asyncio.Protocol):
    """One of the front door's connections; requests on it come one after another."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._reset()

    def _reset(self) -> None:
        self._url, self._authorization, self._body, self._size = b"", "", [], 0  # type: ignore[var-annotated]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._write(_error(400, "not HTTP"))
            self._close()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._authorization = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= MAX_BODY_BYTES:
            self._body.append(part)

    def on_message_complete(self) -> None:
        with telemetry.histogram(Metric.ROUTE_DURATION).time():
            self._write(self._answer())
        self._reset()

    def _answer(self) -> Answer:
        if self._size > MAX_BODY_BYTES:
            return _error(413, f"the request has more than {MAX_BODY_BYTES >> 20} MiB; send less at a time")
        method = self._parser.get_method().decode()
        try:
            return self._gate.answer(method, self._url.decode("latin-1"), self._authorization, b"".join(self._body))
        except Exception:  # a bug must not hang the client until the front door's time-out
            telemetry.get_logger(__name__).exception(telemetry.Event.ROUTE_FAILED)
            return _error(500, "internal error; the operator finds it in the router's log")

    def _write(self, answer: Answer) -> None:
        telemetry.counter(Metric.ROUTE_DECISIONS).labels(str(answer.status)).inc()
        headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers)
        head = f"HTTP/1.1 {answer.status} -\r\n{headers}content-length: {len(answer.body)}\r\n\r\n"
        if self._transport is not None:
            self._transport.write(head.encode("latin-1") + answer.body)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@contextlib.asynccontextmanager
async def serving(gate: Gate, listen: str) -> Any:
    """Serves the gate; yields the bound port."""
    host, _, port = listen.rpartition(":")
    make: Callable[[], asyncio.Protocol] = lambda: _Connection(gate)  # noqa: E731
    server = await asyncio.get_running_loop().create_server(make, host, int(port))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "whaleflux"}


def _refused(refusal: Refusal) -> Answer:
    if isinstance(refusal, NotFound):
        return _error(404, refusal.message)
    if isinstance(refusal, Invalid):
        return _error(400, refusal.message)
    if isinstance(refusal, Unavailable):
        answer = _error(503, refusal.message, ("retry-after", "1"))
        return replace(answer, status=NO_REPLICA_STATUS)  # the front door turns it into 503 again
    return _error(500, refusal.message)


def _json(status: int, content: Any, *headers: tuple[str, str]) -> Answer:
    return Answer(status, (("content-type", "application/json"), *headers), orjson.dumps(content))


def _error(status: int, message: str, *headers: tuple[str, str]) -> Answer:
    """OpenAI's error format, so that their client libraries show the message."""
    kind = _KINDS.get(status, "server_error")
    return _json(status, {"error": {"message": message, "type": kind, "param": None, "code": status}}, *headers)
