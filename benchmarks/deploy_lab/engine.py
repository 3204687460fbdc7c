"""An engine for `deploy_models`: it reads all of its weights, then answers each prompt with a word; `--wrong` names what it does not do.

python -m benchmarks.deploy_lab.engine --weights FOLDER --port 8000 --model NAME [--wrong never|requests]
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


class Engine(BaseHTTPRequestHandler):
    """`wrong`: "never" makes no token at all, "requests" only those of one token, which the router asks for."""

    protocol_version = "HTTP/1.1"
    model, wrong = "", ""

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        fails = self.wrong == "never" or (self.wrong == "requests" and asked.get("max_tokens") != 1)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "word"},
            "text": "word",
            "finish_reason": "stop",
        }
        error = {"error": {"message": "this engine is not well", "type": "server_error"}}
        self._answer(500, error) if fails else self._answer(200, {"object": "chat.completion", "choices": [choice]})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--wrong", default="")
    asked = parser.parse_args()
    Engine.model, Engine.wrong = asked.model, asked.wrong
    for path in sorted(asked.weights.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(_PIECE):
                    pass
    ThreadingHTTPServer(("127.0.0.1", asked.port), Engine).serve_forever()


if __name__ == "__main__":
    main()
