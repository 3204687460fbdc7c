"""EC2 as tests meet it: moto's model behind a WSGI shim of our own that keeps client tokens, and fails by plan.

moto proves the shape of requests, tags, states and answers. What it cannot do, the shim answers itself, and none of it is AWS:
client tokens (moto makes two machines of one), capacity reservations (moto: HTTP 500), events of DescribeInstanceStatus, and
spot requests of machines that RunInstances has made. Keys are not checked by either; `auth` is a fault.
"""

from __future__ import annotations

import io
import socket
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree as ET

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "example"}
REGION = "us-east-1"
ERRORS = {
    "no_capacity": (500, "InsufficientInstanceCapacity", "We currently do not have sufficient capacity"),
    "throttled": (503, "RequestLimitExceeded", "Request limit exceeded."),
    "auth": (401, "AuthFailure", "AWS was not able to validate the provided access credentials"),
    "unsupported": (400, "Unsupported", "Your requested instance type is not supported in your requested zone"),
    "broken": (500, "InternalError", "An internal error has occurred"),
}
_VERSION = "2016-11-15"
_XML = f"http://ec2.amazonaws.com/doc/{_VERSION}"


@dataclass
class Shim:
    """`fault`: asked with each call's action what it meets: "", a key of ERRORS, lost_before, lost_reply, duplicate, zombie.

    `now_s`: the time by which machines are `lag_s` old before they are listed.
    """

    fault: Callable[[str], str] = lambda action: ""
    now_s: Callable[[], float] = lambda: 0.0
    lag_s: float = 0.0
    page: int = 0  # most machines of an answer; 0: as asked
    calls: Counter[str] = field(default_factory=Counter)
    launches: list[dict[str, str]] = field(default_factory=list)
    reservations: dict[str, int] = field(default_factory=dict)  # id -> machines that it has room for
    events: dict[str, tuple[str, float]] = field(default_factory=dict)  # machine -> code, when
    interrupted: dict[str, float] = field(default_factory=dict)  # machine -> when its spot request was marked
    url: str = ""
    _tokens: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    _born_s: dict[str, float] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _client: Any = None
    _moto: Any = None

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        asked = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
        with self._lock:
            status, answer = self._answer(environ, asked)
        if status:
            start_response(f"{status} as planned", [("Content-Type", "text/xml"), ("Content-Length", str(len(answer)))])
            return iter([answer])
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # the caller is never told
        start_response("200 OK", [])
        return iter([b""])

    def client(self) -> Any:
        """The test's own client."""
        if self._client is None:
            keys = {name.lower(): value for name, value in KEYS.items()}
            self._client = boto3.client("ec2", endpoint_url=self.url, region_name=REGION, **keys)
        return self._client

    def alive(self) -> list[dict[str, Any]]:
        """Machines that are paid for, whatever lists say."""
        with self.without_faults():
            pages = self.client().get_paginator("describe_instances").paginate()
            there = [one for page in pages for many in page["Reservations"] for one in many["Instances"]]
        return [one for one in there if one["State"]["Name"] not in ("terminated", "shutting-down")]

    def kill(self, machine: str) -> None:
        """Ends a machine as AWS does, unasked."""
        with self.without_faults():
            self.client().terminate_instances(InstanceIds=[machine])

    @contextmanager
    def without_faults(self) -> Iterator[None]:
        fault, lag_s, self.fault, self.lag_s = self.fault, self.lag_s, lambda action: "", 0.0
        try:
            yield
        finally:
            self.fault, self.lag_s = fault, lag_s

    def _answer(self, environ: dict[str, Any], asked: dict[str, str]) -> tuple[int, bytes]:
        """Status 0: no answer is sent."""
        action = asked.get("Action", "")
        self.calls[action] += 1
        fault = self.fault(action)
        if fault in ERRORS:
            return _error(*ERRORS[fault])
        if fault == "lost_before":
            return 0, b""
        made = self._made(environ, action, asked, fault)
        return (0, b"") if fault == "lost_reply" else made

    def _made(self, environ: dict[str, Any], action: str, asked: dict[str, str], fault: str) -> tuple[int, bytes]:
        if action == "RunInstances":
            return self._run(environ, asked, twice=fault == "duplicate")
        if action == "TerminateInstances" and fault == "zombie":
            return _xml(action, "")
        if action == "DescribeInstanceStatus":
            return _xml(action, f"<instanceStatusSet>{''.join(self._event_items())}</instanceStatusSet>")
        if action == "DescribeSpotInstanceRequests":
            return _xml(action, f"<spotInstanceRequestSet>{''.join(self._spot_items())}</spotInstanceRequestSet>")
        if action == "DescribeInstances" and self.page:
            asked = asked | {"MaxResults": str(self.page)}
        status, answer = self._forwarded(environ, asked)
        return status, self._lagging(answer) if action == "DescribeInstances" and status == 200 else answer

    def _run(self, environ: dict[str, Any], asked: dict[str, str], *, twice: bool) -> tuple[int, bytes]:
        self.launches.append(asked)
        token, words = asked.get("ClientToken", ""), repr(sorted(asked.items()))
        if token in self._tokens:
            return self._again(environ, token, words)
        reservation = asked.pop("CapacityReservationSpecification.CapacityReservationTarget.CapacityReservationId", "")
        if reservation and reservation not in self.reservations:
            return _error(400, "InvalidCapacityReservationId.NotFound", f"{reservation} does not exist")
        if reservation and not self.reservations[reservation]:
            return _error(400, "ReservationCapacityExceeded", f"{reservation} has no room")
        if asked.get("InstanceMarketOptions.MarketType") == "capacity-block":
            del asked["InstanceMarketOptions.MarketType"]
        status, answer = self._forwarded(environ, asked)
        if status == 200:
            self._tokens[token] = words, answer
            self.reservations[reservation] = self.reservations.get(reservation, 0) - 1
            self._born_s |= dict.fromkeys(_machines(answer), self.now_s())
        if twice:
            self._born_s |= dict.fromkeys(_machines(self._forwarded(environ, asked)[1]), self.now_s())
        return status, answer

    def _again(self, environ: dict[str, Any], token: str, words: str) -> tuple[int, bytes]:
        before, answer = self._tokens[token]
        if words != before:
            return _error(400, "IdempotentParameterMismatch", "Arguments on this idempotent request are inconsistent")
        shown = {"Action": "DescribeInstances", "Version": _VERSION, "InstanceId.1": _machines(answer)[0]}
        states = ET.fromstring(self._forwarded(environ, shown)[1]).iter(f"{{{_XML}}}instanceState")
        if not {state.findtext(f"{{{_XML}}}name") for state in states} & {"pending", "running"}:
            return _error(400, "IdempotentInstanceTerminated", "The instance of this client token is terminated")
        return 200, answer

    def _forwarded(self, environ: dict[str, Any], asked: dict[str, str]) -> tuple[int, bytes]:
        body, said = urllib.parse.urlencode(asked).encode(), dict[str, Any]()
        passed = environ | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}

        def start(status: str, headers: Any, exc_info: Any = None) -> None:
            said["status"] = int(status.partition(" ")[0])

        answer = b"".join(self._moto(passed, start))
        return said["status"], answer

    def _lagging(self, answer: bytes) -> bytes:
        """Without machines that are too young to be listed."""
        young = {one for one, born_s in self._born_s.items() if self.now_s() < born_s + self.lag_s}
        if not young:
            return answer
        root = ET.fromstring(answer)
        for there in root.iter(f"{{{_XML}}}instancesSet"):
            for item in list(there):
                if item.findtext(f"{{{_XML}}}instanceId") in young:
                    there.remove(item)
        return ET.tostring(root)

    def _event_items(self) -> Iterator[str]:
        for machine, (code, at_s) in self.events.items():
            said = f"<code>{code}</code><description>The host is degraded</description><notBefore>{_time(at_s)}</notBefore>"
            yield f"<item><instanceId>{machine}</instanceId><eventsSet><item>{said}</item></eventsSet></item>"

    def _spot_items(self) -> Iterator[str]:
        for machine, at_s in self.interrupted.items():
            status = f"<code>marked-for-termination</code><updateTime>{_time(at_s)}</updateTime>"
            yield f"<item><instanceId>{machine}</instanceId><state>active</state><status>{status}</status></item>"


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def running(shim: Shim) -> Iterator[Shim]:
    """Serves it on a port of this host; moto's model begins empty."""
    from moto.backends import get_backend

    get_backend("ec2").reset()
    server = make_server("127.0.0.1", 0, shim, threaded=True, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shim.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield shim
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def image() -> str:
    """One that moto knows."""
    return "ami-03cf127a"


def _machines(answer: bytes) -> list[str]:
    return [one.text or "" for one in ET.fromstring(answer).iter(f"{{{_XML}}}instanceId")]


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _xml(action: str, content: str) -> tuple[int, bytes]:
    return 200, f'<{action}Response xmlns="{_XML}"><requestId>r</requestId>{content}</{action}Response>'.encode()


def _error(status: int, code: str, message: str) -> tuple[int, bytes]:
    said = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return status, f"<Response><Errors>{said}</Errors><RequestID>r</RequestID></Response>".encode()
