"""Serves the trained GPT behind the OpenAI API: completions and chat completions, whole or streamed.

    python examples/gpt/serve.py --weights model.pt --port 8000

One process is one replica. It generates one character per token with the trained weights, so prompts and answers
count characters as tokens. SIGTERM finishes what is under way.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from completions import Asked, Refused, asked, head, streamed_choice, until_stop, usage, whole_choice

MAX_BODY_BYTES = 1 << 20
PATHS = {"/v1/completions": False, "/v1/chat/completions": True}  # whether it is a chat


class Replica(BaseHTTPRequestHandler):
    """One connection. `model`, `model_name` and `lock` are set on the class by `server`."""

    protocol_version = "HTTP/1.1"
    model: Any
    model_name: str
    lock: threading.Lock
    under_way = 0

    def do_GET(self) -> None:
        try:
            self.read_body()
        except Refused as refused:
            self.answer(refused.status, refused.body())
            return
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif self.path == "/metrics":
            self.answer_text(200, f"engine_requests_running {Replica.under_way}\n")
        elif self.path == "/v1/models":
            listed = {"id": self.model_name, "object": "model", "owned_by": "whaleflux"}
            self.answer(200, {"object": "list", "data": [listed]})
        else:
            self.answer(404, Refused("", f"no such path: {self.path}").body())

    def do_POST(self) -> None:
        try:
            request = self.request_of(self.read_body())
        except Refused as refused:
            self.answer(refused.status, refused.body())
            return
        Replica.under_way += 1
        try:
            if request.stream:
                self.stream(request)
            else:
                self.answer(200, self.whole(request))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone
        finally:
            Replica.under_way -= 1

    def read_body(self) -> bytes:
        """The whole body, whatever becomes of the request: what is left unread would be the next one's beginning.

        Where it cannot be read the connection ends with the answer. Raises Refused.
        """
        given = self.headers.get("content-length", "0")
        readable = given.isdecimal() and "transfer-encoding" not in self.headers
        if readable and int(given) <= MAX_BODY_BYTES:
            return self.rfile.read(int(given))
        self.close_connection = True
        if not readable:
            raise Refused("", "the body needs a content-length", 411)
        raise Refused("", f"the body has {given} bytes, at most {MAX_BODY_BYTES} are read", 413)

    def request_of(self, data: bytes) -> Asked:
        if self.path not in PATHS:
            raise Refused("", f"no such path: {self.path}", 404)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as wrong:
            raise Refused("", f"the body is not JSON: {wrong}") from None
        return asked(body, chat=PATHS[self.path])

    def generate(self, request: Asked, prompt: str, seed: int | None) -> Iterator[tuple[str, str | None]]:
        return until_stop(self.characters(request, prompt, seed), request.stops)

    def characters(self, request: Asked, prompt: str, seed: int | None) -> Iterator[str]:
        """Requests take turns at each one, so that a long answer does not hold up a short one."""
        found = self.model.generate(prompt, request.tokens, request.temperature, seed, request.top_p)
        while True:
            with self.lock:
                character = next(found, None)
            if character is None:
                return
            yield character

    def whole(self, request: Asked) -> dict[str, Any]:
        choices, generated = [], 0
        for index, prompt, seed in request.choices():
            pieces = list(self.generate(request, prompt, seed))
            text = "".join(piece for piece, _ in pieces)
            generated += len(text)
            choices.append(whole_choice(request, index, text, pieces[-1][1] or "length"))
        kind = "chat.completion" if request.chat else "text_completion"
        return {**head(self.model_name, kind), "choices": choices, "usage": usage(request, generated)}

    def stream(self, request: Asked) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        first = head(self.model_name, "chat.completion.chunk" if request.chat else "text_completion")
        if request.stream_usage:
            first["usage"] = None
        generated = 0
        for index, prompt, seed in request.choices():
            for text, reason in self.generate(request, prompt, seed):
                generated += len(text)
                self.chunk({**first, "choices": [streamed_choice(request, index, text, reason)]})
        if request.stream_usage:
            self.chunk({**first, "choices": [], "usage": usage(request, generated)})
        self.write_chunk(b"data: [DONE]\n\n")
        self.write_chunk(b"")

    def chunk(self, content: dict[str, Any]) -> None:
        self.write_chunk(f"data: {json.dumps(content)}\n\n".encode())

    def write_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def answer(self, status: int, content: dict[str, Any]) -> None:
        self.answer_text(status, json.dumps(content), "application/json")

    def answer_text(self, status: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For what the base class cannot read: other methods, broken request lines."""
        self.close_connection = True
        self.answer(code, Refused("", message or explain or "the request cannot be read").body())

    def log_message(self, format: str, *args: Any) -> None:
        """Envoy keeps the access log."""


def server(model: Any, name: str, host: str, port: int) -> ThreadingHTTPServer:
    """A bound server; `model` has `generate` as Gpt has it."""
    Replica.model, Replica.model_name, Replica.lock = model, name, threading.Lock()
    made = ThreadingHTTPServer((host, port), Replica)
    made.daemon_threads = False  # SIGTERM lets answers end
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="model.pt written by train.py")
    parser.add_argument("--name", default="gpt-stdlib", help="model name in the API")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    args = parser.parse_args()
    import torch
    from model import Gpt, Shape

    torch.set_num_threads(1)
    saved = torch.load(args.weights, weights_only=True, map_location="cpu")
    model = Gpt(Shape(**saved["shape"])).eval()
    model.load_state_dict(saved["weights"])
    serving = server(model, args.name, args.host, args.port)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=serving.shutdown).start())
    print(f"serving {args.name} at http://{args.host}:{args.port}/v1", flush=True)
    serving.serve_forever()
    serving.server_close()


if __name__ == "__main__":
    main()
