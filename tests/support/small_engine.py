"""`python -m tests.support.small_engine [HOST]`: an OpenAI-like server in a process of its own; prints its port, then serves.

The request says how it behaves: `pause_s` before the answer, `stream` with `chunks` and `gap_s`, `fail_at` a list of
ports that answer `fail_with` (a status) instead, `hang_at` a list of ports that answer after ten seconds, `crash` the end of the process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or the kernel waits 40 ms between them
    disable_nagle_algorithm = True
    served = 0

    def do_GET(self) -> None:
        self._answer(200, {"ok": True, "served": Engine.served})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body) if body.startswith(b"{") else {}  # a form, or compressed: answered as it is
        Engine.served += asked.get("max_tokens") != 1  # the router's question for a first token is no client's
        port = self.server.server_address[1]
        time.sleep(10 if port in asked.get("hang_at", ()) else asked.get("pause_s", 0))
        if asked.get("crash"):
            os._exit(1)
        if port in asked.get("fail_at", ()):
            self._answer(asked["fail_with"], {"error": {"message": "the engine is not well"}})
        elif asked.get("stream"):
            self._stream(asked.get("chunks", 3), asked.get("gap_s", 0.0))
        else:
            self._answer(
                200, {"replica": port, "path": self.path, "headers": dict(self.headers), "choices": [{"index": 0}]}
            )

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, chunks: int, gap_s: float) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(chunks):
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
            time.sleep(gap_s)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Silent: the tests read stdout."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


if __name__ == "__main__":
    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    Server.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = Server((host, 0), Engine)
    print(server.server_address[1], flush=True)
    sys.stdout.close()
    server.serve_forever()
