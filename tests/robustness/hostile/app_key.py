"""Whoever has an API key: one of Eve's, that opens no model of Ann's, and one of Ann's, at what an engine has beside the API."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable

from tests.robustness.hostile.attempts import CLOSED, DOOR, NOTHING, TRAIL, UNKNOWN, Attempt, Calls, Reply
from tests.robustness.hostile.place import Place
from whaleflux.v1 import identity_pb2, router_pb2, scheduler_pb2, trust_pb2

NOBODY, DENIED = "anonymous/-", "PERMISSION_DENIED"
CHAT = "/v1/chat/completions"
NO_PATH = "NOT_FOUND"
MALFORMED = "nothing"  # answered 400 like anybody's typing error: nobody was refused anything


async def raw(port: int, content: bytes, wait_s: float = 10.0) -> Reply:
    """The answer to these bytes."""
    try:
        async with asyncio.timeout(wait_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(content)
                answer = await reader.read(65536)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return Reply(CLOSED)
    head = answer.split(b" ")
    return Reply(
        head[1].decode()[:3] if len(head) > 1 and head[0].startswith(b"HTTP/") else CLOSED, answer.decode("latin-1")
    )


def request(
    method: str, path: str, key: str, body: bytes = b"", *headers: str, kind: str = "application/json"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", f"content-type: {kind}", *headers]
    if key:
        lines.append(f"authorization: Bearer {key}")
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def asks(model: object) -> bytes:
    return json.dumps({"model": model, "messages": [], "prompt": "x"}).encode()


class Http:
    """Attempts at the inference API."""

    def __init__(self, place: Place) -> None:
        self.port, self.engine = place.world.suite.ports["http"], place.world.engine

    def attempt(
        self,
        name: str,
        content: bytes,
        *refused: str,
        who: str = NOBODY,
        what: str = "",
        result: str = "",
        seen_by: str = TRAIL,
    ) -> Attempt:
        """The engine must not have got it."""

        async def do() -> Reply:
            before = len(self.engine.paths)
            reply = await raw(self.port, content)
            reached = self.engine.paths[before:]
            return Reply("reached the engine", f"{reached}") if reached else reply

        return Attempt(name, do, frozenset(refused), seen_by, who, what, result)

    def smuggled(self, name: str, content: bytes, harmless: Callable[[dict[str, str]], bool]) -> Attempt:
        """Ann's engine gets it, without what was smuggled."""

        async def do() -> Reply:
            before = len(self.engine.headers)
            reply = await raw(self.port, content)
            got = self.engine.headers[before:]
            return reply if all(map(harmless, got)) else Reply("gained", str(got))

        return Attempt(name, do, frozenset({"200"}), NOTHING)


async def attempts(place: Place) -> list[Attempt]:
    http = Http(place)
    eve, ann = place.world.api_keys["other model"], place.world.api_keys["own"]
    subject = f"app/{await _id_of(place, 'eves')}"
    return [
        *_at_anns_model(http, eve, subject, place.world.model),
        *_at_the_engine(http, ann),
        *_as_others(http, place, await _disabled(place)),
        *_by_smuggling(http, ann, place),
        *_at_the_control_plane(place, ann),
    ]


async def _id_of(place: Place, kind: str) -> str:
    listed = await place.world.admin.router.ListApiKeys(router_pb2.ListApiKeysRequest())
    return next(key.name.rpartition("/")[2] for key in listed.api_keys if key.display_name == "eve's")


async def _disabled(place: Place) -> str:
    """A key whose owner is disabled since."""
    user = trust_pb2.Principal(role="user", kind=trust_pb2.PRINCIPAL_KIND_USER)
    identity = place.world.admin.identity
    await identity.CreateUser(identity_pb2.CreateUserRequest(user_id="kim", user=user))
    kim = place.stubs(place.channel_with(place.authority().issue("user", "kim", place.now)))
    made = await kim.router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="kim's"))
    await identity.DisableUser(identity_pb2.DisableUserRequest(name="users/kim"))
    return str(made.secret)


def _at_anns_model(http: Http, key: str, subject: str, model: str) -> list[Attempt]:
    def chat(name: str, body: bytes, *more: str, path: str = CHAT, kind: str = "application/json") -> Attempt:
        return http.attempt(
            name,
            request("POST", path, key, body, *more, kind=kind),
            "404",
            "403",
            who=subject,
            what=f"POST {path}",
            result=DENIED,
        )

    def malformed(name: str, body: bytes, *more: str) -> Attempt:
        content = request("POST", CHAT, key, body, *more)
        return http.attempt(name, content, "400", "404", "413", seen_by=MALFORMED)

    twice = b'{"model": "absent", "model": "%s", "messages": []}' % model.encode()
    first = b'{"model": "%s", "model": "absent", "messages": []}' % model.encode()
    form = (
        f'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nabsent\r\n'
        f'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\n{model}\r\n--b--\r\n'
    ).encode()
    bomb = gzip.compress(bytes(64 << 20), 9)
    return [
        chat("Ann's model", asks(model)),
        chat("as a path", asks(f"../{model}")),
        chat("by its full name", asks(f"models/{model}")),
        chat("in capitals", asks(model.upper())),
        chat("with a letter of another alphabet", asks(model.replace("a", "\N{CYRILLIC SMALL LETTER A}"))),
        chat("with a blank behind it", asks(f"{model} ")),
        chat("named twice, hers last", twice),
        chat("named twice, hers first", first),
        chat("in a form that names two", form, path="/v1/audio/transcriptions", kind="multipart/form-data; boundary=b"),
        chat("with a protocol upgrade (h2c)", asks(model), "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
        chat("in chunks with trailers", _chunked(asks(model)), "transfer-encoding: chunked", "trailer: authorization"),
        malformed("in a list", asks([model])),
        malformed("in an object", asks({"name": model})),
        malformed("in a compressed bomb", bomb, "content-encoding: gzip"),
        malformed("below a thousand brackets", b"[" * 100_000),
        http.attempt("by the list", request("GET", f"/v1/models/{model}", key), "404", "403", seen_by=NOTHING),
    ]  # fmt: skip


def _chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\nauthorization: Bearer x\r\n\r\n" % (len(body), body)


def _at_the_engine(http: Http, key: str) -> list[Attempt]:
    """Ann's own key, at the switches of the engine and behind it."""

    def detour(method: str, path: str, *more: str, body: bytes = b"{}") -> Attempt:
        return http.attempt(
            f"{method} {path}", request(method, path, key, body, *more), "404", what=f"{method} *", result=NO_PATH
        )

    def refused(name: str, content: bytes, *codes: str) -> Attempt:
        return http.attempt(name, content, *codes, seen_by=DOOR)

    return [
        detour("POST", "/v1/load_lora_adapter"),
        detour("POST", "/v1/unload_lora_adapter"),
        detour("GET", "/metrics"),
        detour("POST", "/sleep"),
        detour("POST", "/collective_rpc"),
        detour("POST", f"{CHAT}/../../../metrics"),
        detour("POST", "/v1//load_lora_adapter"),
        detour("POST", "/V1/chat/completions"),
        detour("DELETE", CHAT),
        detour("GET", CHAT, "x-http-method-override: POST"),
        detour("POST", "http://127.0.0.1:2379/v3/kv/range"),
        detour("POST", "/policy/../key/v1/models"),
        refused("an escaped slash", request("POST", "/v1/chat%2f..%2fmetrics", key, b"{}"), "400"),
        refused("a zero in the path", request("POST", "/v1/chat\0", key, b"{}"), "400"),
        refused("CONNECT", b"CONNECT 127.0.0.1:2379 HTTP/1.1\r\nhost: 127.0.0.1:2379\r\n\r\n", "404", "400", "405", "403"),
        refused("a websocket", request("GET", CHAT, key, b"", "upgrade: websocket", "connection: upgrade"), "403", "404", "400"),
    ]  # fmt: skip


def _as_others(http: Http, place: Place, disabled: str) -> list[Attempt]:
    body, own = asks(place.world.model), place.world.api_keys["own"]

    def unknown(name: str, content: bytes, method: str = "POST", path: str = CHAT) -> Attempt:
        return http.attempt(name, content, "401", "429", what=f"{method} {path}", result="UNAUTHENTICATED")

    return [
        unknown("a key that has ended", request("POST", CHAT, place.world.api_keys["ended"], body)),
        unknown("a key whose owner is disabled", request("POST", CHAT, disabled, body)),
        unknown("a key nearly right", request("POST", CHAT, own[:-1] + ("a" if own[-1] != "a" else "b"), body)),
        unknown("the key in the address", request("GET", f"/v1/models?api_key={own}&key={own}", ""), "GET", "/v1/models"),
        unknown("the key in another scheme", request("POST", CHAT, "", body, f"authorization: Basic {own}")),
        unknown("the key in another header", request("POST", CHAT, "", body, f"x-api-key: {own}")),
        unknown("from another address, it says", request("POST", CHAT, "wf-guess", body, "x-forwarded-for: 10.9.8.7")),
        unknown("as the front door itself", request("POST", CHAT, "", body, "x-forwarded-client-cert: URI=spiffe://whaleflux/admin/ada")),
    ]  # fmt: skip


def _by_smuggling(http: Http, key: str, place: Place) -> list[Attempt]:
    body, etcd = asks(place.world.model), place.world.suite.ports["etcd"]

    def with_header(name: str, value: str) -> Attempt:
        content = request("POST", CHAT, key, body, f"{name}: {value}")
        return http.smuggled(f"header {name}", content, lambda got: value not in got.values())

    def both(*lines: str) -> bytes:
        inner = b"0\r\n\r\nPOST /sleep HTTP/1.1\r\nhost: x\r\n\r\n"
        return request("POST", CHAT, key, inner, *lines)

    def refused(name: str, content: bytes, *codes: str) -> Attempt:
        return http.attempt(name, content, *codes, seen_by=DOOR)

    return [
        with_header("x-gateway-destination-endpoint", f"127.0.0.1:{etcd}"),
        with_header("x-wf-decision-id", "forged-decision"),
        with_header("x-wf-subject", "admin/ada"),
        with_header("x-envoy-original-path", "/sleep"),
        with_header("x-envoy-upstream-rq-timeout-ms", "86400000"),
        with_header("x-data-parallel-rank", "7777"),
        with_header("x-request-id", "forged-request"),
        with_header("x-forwarded-for", "10.9.8.7"),
        http.smuggled(
            "a line break in a header", request("POST", CHAT, key, body, "user-agent: b\rx-wf-subject: admin/ada"),
            lambda got: "\r" not in str(got.values()) and "x-wf-subject" not in got,
        ),
        http.smuggled("the key to the engine", request("POST", CHAT, key, body), lambda got: key not in str(got)),
        refused("two lengths (CL.TE)", both("content-length: 4", "transfer-encoding: chunked"), "400", CLOSED),
        refused("two lengths (CL.CL)", both("content-length: 4", "content-length: 40"), "400", CLOSED),
        refused("an unknown encoding (TE.TE)", both("transfer-encoding: xchunked"), "400", "501", CLOSED),
        refused("a header of 100 KB", request("GET", "/v1/models", key, b"", "x-big: " + "x" * 100_000), "431", CLOSED),
        refused("a thousand headers", request("GET", "/v1/models", key, b"", *[f"x-{n}: 1" for n in range(1000)]), "431", CLOSED),
        refused("a header with an underscore", request("GET", "/v1/models", key, b"", "x_wf_subject: admin/ada"), "400", CLOSED),
    ]  # fmt: skip


def _at_the_control_plane(place: Place, key: str) -> list[Attempt]:
    """The key where certificates are asked for."""
    bearer = (("authorization", f"Bearer {key}"),)
    outside = Calls(place.as_caller("no certificate"), NOBODY)
    submit = scheduler_pb2.CreateJobRequest(parent="queues/open")
    app = Calls(place.as_caller("application"), "app/chat")
    return [
        outside.attempt("models, by the key", "Router/ListModels", router_pb2.ListModelsRequest(), UNKNOWN, metadata=bearer),
        outside.attempt("a job, by the key", "Scheduler/CreateJob", submit, UNKNOWN, metadata=bearer),
        outside.attempt("a key, by the key", "Router/CreateApiKey", router_pb2.CreateApiKeyRequest(), UNKNOWN, metadata=bearer),
        app.attempt("a job, as an application", "Scheduler/CreateJob", submit, DENIED),
        app.attempt("models, as an application", "Router/ListModels", router_pb2.ListModelsRequest(), DENIED),
        app.attempt("Ann's model, as an application", "Router/Route", router_pb2.RouteRequest(model="models/anns-model"), "NOT_FOUND"),
    ]  # fmt: skip
