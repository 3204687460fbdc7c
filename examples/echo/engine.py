"""Answers each prompt with the prompt, word by word: the smallest engine of the OpenAI API. It needs no GPU, no model and no library.

    python examples/echo/engine.py --port 8000

Take it to try a fleet, its keys and its routes, or as the pattern of an engine of your own: `/health` answers 200 when it can
serve, `/v1/models` names the model, `/metrics` counts tokens (what a million of them costs follows), a stream ends with `[DONE]`, and SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "echo"
MAX_BODY_BYTES = 1 << 20
TOKENS = {"prompt_tokens_total": 0, "generation_tokens_total": 0}  # a word is one
_counting = threading.Lock()


class Engine(BaseHTTPRequestHandler):
    """One connection."""

    model = MODEL
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/metrics":
            lines = (f"# TYPE {name} counter\n{name} {tokens}\n" for name, tokens in TOKENS.items())
            self.send(200, "text/plain; version=0.0.4", "".join(lines).encode())
            return
        models = {"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "examples"}]}
        known = {"/health": {"status": "ok"}, "/v1/models": models}
        self.answer(200 if self.path in known else 404, known.get(self.path, _error(f"no such path: {self.path}")))

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        if self.path != "/v1/chat/completions" or length > MAX_BODY_BYTES:
            self.close_connection = True  # the body is not read
            self.answer(404, _error("POST /v1/chat/completions, with at most 1 MiB, is all that is answered here"))
            return
        try:
            asked = json.loads(self.rfile.read(length))
            words = str(asked["messages"][-1]["content"]).split()
        except (ValueError, KeyError, IndexError, TypeError):
            self.answer(400, _error("messages: a list is needed whose last entry has `content`"))
            return
        count(len(words))
        if asked.get("stream"):
            self.stream(words)
        else:
            message = {"role": "assistant", "content": " ".join(words)}
            counted = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(200, _envelope("chat.completion") | {"choices": [choice], "usage": counted})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        self.send(status, "application/json", json.dumps(content).encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, words: list[str]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for word in words:
            choice = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
            self.event(json.dumps(_envelope("chat.completion.chunk") | {"choices": [choice]}))
            time.sleep(0.05)
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        self.event(json.dumps(_envelope("chat.completion.chunk") | {"choices": [last]}))
        self.event("[DONE]")
        self.close_connection = True

    def event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()


def count(words: int) -> None:
    """A prompt of so many words, and its answer."""
    with _counting:
        for name in TOKENS:
            TOKENS[name] += words


def _envelope(kind: str) -> dict[str, Any]:
    name = f"{os.environ.get('WHALEFLUX_NODE', 'here')}-{time.time_ns()}"
    return {"id": f"echo-{name}", "object": kind, "created": int(time.time()), "model": MODEL}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default=MODEL, help="the name that it answers to")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 where the front door is on another machine")
    asked = parser.parse_args()
    Engine.model = asked.model
    ThreadingHTTPServer((asked.host, asked.port), Engine).serve_forever()


if __name__ == "__main__":
    main()
