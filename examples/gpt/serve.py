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
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from model import Gpt, Shape

MAX_BODY_BYTES = 1 << 20
MAX_TOKENS = 4096


class Bad(Exception):
    """A request that cannot be served; its text says why."""


def prompt_of(body: dict[str, Any], chat: bool) -> str:
    """The text to go on from."""
    if not chat:
        prompt = body.get("prompt", "")
        if not isinstance(prompt, str):
            raise Bad("prompt: must be a string")
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Bad("messages: must be a list with at least one message")
    return "\n".join(str(message.get("content") or "") for message in messages)


class Replica(BaseHTTPRequestHandler):
    """One connection. `model`, `model_name` and `lock` are set on the class by main."""

    protocol_version = "HTTP/1.1"
    model: Gpt
    model_name: str
    lock: threading.Lock
    under_way = 0

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif self.path == "/metrics":
            self.answer_text(200, f"engine_requests_running {Replica.under_way}\n")
        elif self.path == "/v1/models":
            self.answer(
                200, {"object": "list", "data": [{"id": self.model_name, "object": "model", "owned_by": "whaleflux"}]}
            )
        else:
            self.answer(404, error(f"no such path: {self.path}"))

    def do_POST(self) -> None:
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            self.answer(404, error(f"no such path: {self.path}"))
            return
        try:
            size = int(self.headers.get("content-length") or 0)
            if size > MAX_BODY_BYTES:
                raise Bad(f"body: {size} bytes, at most {MAX_BODY_BYTES}")
            body = json.loads(self.rfile.read(size))
            length = int(body.get("max_completion_tokens") or body.get("max_tokens") or 64)
            if not 1 <= length <= MAX_TOKENS:
                raise Bad(f"max_tokens: {length}, must be 1 to {MAX_TOKENS}")
            prompt = prompt_of(body, chat)
        except (Bad, ValueError, AttributeError) as problem:
            self.answer(400, error(str(problem)))
            return
        Replica.under_way += 1
        try:
            text = self.generate(prompt, length, float(body.get("temperature", 0.8)), body.get("seed"))
            if body.get("stream"):
                self.stream(text, chat)
            else:
                self.answer(200, whole(self.model_name, prompt, "".join(text), chat))
        finally:
            Replica.under_way -= 1

    def generate(self, prompt: str, length: int, temperature: float, seed: int | None) -> Iterator[str]:
        """Characters; requests take turns at each one, so that a long answer does not hold up a short one."""
        characters = self.model.generate(prompt, length, temperature, seed)
        while True:
            with self.lock:
                character = next(characters, None)
            if character is None:
                return
            yield character

    def stream(self, text: Iterator[str], chat: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for character in text:
            self.chunk(piece(self.model_name, character, chat))
        self.chunk(piece(self.model_name, "", chat, reason="length"))
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
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Envoy keeps the access log."""


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def whole(model: str, prompt: str, text: str, chat: bool) -> dict[str, Any]:
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    used = {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": len(prompt) + len(text)}
    return {
        **head(model, "chat.completion" if chat else "text_completion"),
        "choices": [{"index": 0, **content, "finish_reason": "length"}],
        "usage": used,
    }


def piece(model: str, text: str, chat: bool, reason: str | None = None) -> dict[str, Any]:
    content = {"delta": {"content": text}} if chat else {"text": text}
    return {
        **head(model, "chat.completion.chunk" if chat else "text_completion"),
        "choices": [{"index": 0, **content, "finish_reason": reason}],
    }


def head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"gen-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="model.pt written by train.py")
    parser.add_argument("--name", default="gpt-stdlib", help="model name in the API")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    saved = torch.load(args.weights, weights_only=True, map_location="cpu")
    Replica.model = Gpt(Shape(**saved["shape"])).eval()
    Replica.model.load_state_dict(saved["weights"])
    Replica.model_name, Replica.lock = args.name, threading.Lock()
    server = ThreadingHTTPServer((args.host, args.port), Replica)
    server.daemon_threads = False  # SIGTERM lets answers end
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"serving {args.name} at http://{args.host}:{args.port}/v1", flush=True)
    server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
