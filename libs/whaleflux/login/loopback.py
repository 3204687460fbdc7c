"""Where a browser comes back to after a login: one request on 127.0.0.1, on a port of its own (RFC 8252, 7.3)."""

from __future__ import annotations

import http.server
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, Self

_PATH = "/callback"
_MOST_REQUESTS = 100  # a browser asks for icons too
_REQUEST_S = 5.0  # for which one connection may keep the others waiting


class Loopback:
    """Listens while the block runs."""

    def __init__(self) -> None:
        self._server = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
        self._server.found = None  # type: ignore[attr-defined]
        self._server.state = ""  # type: ignore[attr-defined]
        self.redirect_uri = f"http://127.0.0.1:{self._server.server_port}{_PATH}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def wait(self, within_s: float, state: str) -> Mapping[str, str] | None:
        """The query of the answer with that `state`; what else comes is turned away. None when none comes in time."""
        self._server.state = state  # type: ignore[attr-defined]
        deadline = time.monotonic() + within_s
        for _ in range(_MOST_REQUESTS):
            self._server.timeout = max(0.0, deadline - time.monotonic())
            self._server.handle_request()
            found: Mapping[str, str] | None = self._server.found  # type: ignore[attr-defined]
            if found is not None or time.monotonic() >= deadline:
                return found
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = _REQUEST_S

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
        if parts.path != _PATH or query.get("state") != self.server.state:  # type: ignore[attr-defined]
            self._say(404, "This is not the page of a login.")
            return
        self.server.found = query  # type: ignore[attr-defined]
        self._say(200, "Done. Go back to the terminal; this page may be closed.")

    def _say(self, status: int, text: str) -> None:
        body = f"<!doctype html><title>WhaleFlux</title><p>{text}</p>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the query has a code in it."""
