"""A service that rents machines by REST as Lambda publishes its API, on a port of this host; it fails by plan. No machine is made.

Shapes: `GET /instances`, `POST /instance-operations/launch|terminate`, errors as {"error": {"code", "message", "suggestion"}}.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret_key_1"
ERRORS = {
    "no_capacity": (400, "instance-operations/launch/insufficient-capacity"),
    "quota": (400, "global/quota-exceeded"),
    "throttled": (429, "global/too-many-requests"),
    "auth": (401, "global/invalid-api-key"),
    "broken": (500, "global/unknown"),
}


@dataclass
class Service:
    """`fault`: asked with each path what its call meets: "", a key of ERRORS, lost_before, lost_reply, zombie, garbage, endless, elsewhere.

    `now_s`: the time by which machines are `lag_s` old before they are listed.
    """

    fault: Callable[[str], str] = lambda path: ""
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    now_s: Callable[[], float] = lambda: 0.0
    lag_s: float = 0.0
    born_s: dict[str, float] = field(default_factory=dict)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, path: str, key: str, body: dict[str, Any]) -> tuple[int, Any]:
        if key != f"Bearer {KEY}":
            return _error(*ERRORS["auth"])
        if (method, path) == ("GET", "/instances"):
            shown = [
                one for id_, one in self.machines.items() if self.now_s() >= self.born_s.get(id_, 0.0) + self.lag_s
            ]
            return 200, {"data": shown}
        if (method, path) == ("POST", "/instance-operations/launch"):
            return self._launched(body)
        if (method, path) == ("POST", "/instance-operations/terminate"):
            return self._terminated(body["instance_ids"])
        return _error(404, "global/object-does-not-exist")

    def alive(self) -> dict[str, str]:
        """Machines that are paid for, with their names."""
        with self.lock:
            return {id_: one["name"] for id_, one in self.machines.items() if one["status"] in ("booting", "active")}

    def kill(self, machine: str) -> None:
        """Ends a machine as its owner does, unasked."""
        with self.lock:
            self.machines[machine]["status"] = "terminated"

    def _launched(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.launches.append(body)
        wrong = [field for field in ("region_name", "instance_type_name", "ssh_key_names") if not body.get(field)]
        if wrong or len(body.get("name", "")) > 64:
            return _error(400, "global/invalid-parameters")
        id_ = f"{len(self.launches):032x}"
        shown = {"id": id_, "name": body["name"], "status": "booting", "region": {"name": body["region_name"]}}
        self.machines[id_], self.born_s[id_] = shown, self.now_s()
        return 200, {"data": {"instance_ids": [id_]}}

    def _terminated(self, ids: list[str]) -> tuple[int, Any]:
        if not set(ids) <= set(self.machines):
            return _error(404, "global/object-does-not-exist")
        for id_ in ids:
            self.machines[id_]["status"] = "terminating"
        return 200, {"data": {"terminated_instances": [self.machines[id_] for id_ in ids]}}


@contextmanager
def running(service: Service) -> Iterator[Service]:
    """Serves it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def _serve(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.removeprefix("/api/v1")
            service.calls.append(path)
            fault = service.fault(path)
            if fault in ERRORS:
                self._send(*_error(*ERRORS[fault]))
                return
            status, answer = 0, None
            if fault == "zombie":
                status, answer = 200, {"data": {"terminated_instances": []}}
            elif fault != "lost_before":
                with service.lock:
                    status, answer = service.answer(
                        method, path, self.headers.get("Authorization", ""), json.loads(body or b"{}")
                    )
            if fault in ("lost_before", "lost_reply"):
                self.close_connection = True
            elif fault == "garbage":
                self._send(200, "<html>")
            elif fault == "elsewhere":
                self._send(302, answer)
            elif fault == "endless":
                self._stream()
            else:
                self._send(status, answer)

        def _send(self, status: int, answer: Any) -> None:
            said = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "7")
            if status == 302:
                self.send_header("Location", f"{service.url}/elsewhere")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                while True:
                    self.wfile.write(b" " * (64 << 10))
            except OSError:  # whoever asked has heard enough
                return

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Whoever asked has gone: a killed keeper does."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}/api/v1"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _error(status: int, code: str) -> tuple[int, Any]:
    return status, {"error": {"code": code, "message": "as planned", "suggestion": None}, "field_errors": {}}
