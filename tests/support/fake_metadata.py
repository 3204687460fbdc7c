"""EC2's metadata service as an agent meets it (IMDSv2), with what a test has it announce."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SPOT, REBALANCE, MAINTENANCE = (
    "spot/instance-action", "events/recommendations/rebalance", "events/maintenance/scheduled",
)  # fmt: skip


@dataclass
class Metadata:
    """`says`: by path below meta-data; what is not there is 404."""

    says: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refused: int = 0
    given: int = 0
    url: str = ""

    def take_spot(self, at_s: float) -> None:
        at = datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.says[SPOT] = json.dumps({"action": "terminate", "time": at})

    def schedule(self, at_s: float, state: str = "active") -> None:
        at = datetime.fromtimestamp(at_s, UTC).strftime("%d %b %Y %H:%M:%S GMT")
        event = {"NotBefore": at, "Code": "system-reboot", "Description": "scheduled reboot", "State": state}
        self.says[MAINTENANCE] = json.dumps([event])


@contextmanager
def running() -> Iterator[Metadata]:
    """On a port of this host."""
    metadata = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asks_for = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            if not asks_for:
                self._answer(400, "")
                return
            metadata.given += 1
            token = f"token-{metadata.given}"
            metadata.tokens.add(token)
            self._answer(200, token)

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") not in metadata.tokens:
                metadata.refused += 1
                self._answer(401, "")
                return
            said = metadata.says.get(self.path.removeprefix("/latest/meta-data/"))
            self._answer(404 if said is None else 200, said or "")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    metadata.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield metadata
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
