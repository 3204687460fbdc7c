"""What routing reads of a request's body, in bounded time whatever the body is. Pure.

A small body is parsed. A large one is scanned from its start: strings are skipped at the speed of a memory search, and what
is left of a budget of structural bytes bounds the work (a body of nothing but brackets costs what a long chat costs). When
the budget ends first, the model's name is looked for at the end of the body, where clients that put it last have it.

Only the model's name is needed. Everything else is a guess for routing, and a guess never refuses a request that an engine
would take: bodies that are not quite JSON go on to the engine, which judges them.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import orjson

from whaleflux.errors import FieldViolation, InvalidArgument

WHOLE_BYTES = 64 << 10  # bodies up to this size are parsed; 64 KiB of brackets take under 10 ms
MAX_STEPS = 20_000  # strings, brackets and escaped quotes that a scan looks at: under 20 ms
MAX_STRUCTURE_BYTES = 1 << 20  # bytes between strings that a scan looks at
INFLATED_BYTES = 1 << 20  # of a compressed body
EDGE_BYTES = 64 << 10  # at the end of a body, where a scan that ended early looks for the model
MAX_MODEL_BYTES = 512
BYTES_PER_TOKEN_ID = 4  # a token id stands for as much text as `ranking.BYTES_PER_TOKEN`
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")  # of chat, responses, and older clients
_PROMPTS = ("messages", "prompt", "input", "instructions", "tools")
_KEPT = ("store", "background")  # the engine keeps something of such a request: it is not sent a second time
_SCALARS = frozenset({"model", *_LIMITS, *_KEPT})
_SPACE = re.compile(rb"\s{0,1024}")
STRUCTURE = re.compile(rb'["\[\]{}]')
_COLON = re.compile(rb"\s{0,64}:\s{0,64}")
_SCALAR = re.compile(rb'"(?:[^"\\]|\\.){0,%d}"|[-+0-9.eE]{1,40}|true|false|null' % MAX_MODEL_BYTES)
_MODEL = re.compile(rb'(?<!\\)"model"\s{0,64}:\s{0,64}("(?:[^"\\]|\\.){1,%d}")' % MAX_MODEL_BYTES)
_FORM_MODEL = re.compile(
    rb'name="?model"?[^\r\n]{0,200}(?:\r?\n[^\r\n]{1,200}){0,5}\r?\n\r?\n([^\r\n]{1,%d})' % MAX_MODEL_BYTES
)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """`model` "" where a form names none; `max_output_tokens` 0: not said; `prompt_bytes` of text, estimated."""

    model: str
    max_output_tokens: int
    prompt_bytes: int
    keeps: bool = False  # the engine stores it or goes on in the background


def read(body: bytes, content_type: str = "", content_encoding: str = "") -> RequestFacts:
    """What is in the body. Raises InvalidArgument where no model can be read from what should be JSON."""
    if "multipart/form-data" in content_type.lower():
        return _of_form(body)
    if content_encoding.lower() in {"gzip", "deflate", "x-gzip"}:
        inflated = _inflated(body)
        return _of_json(inflated, partial=len(inflated) == INFLATED_BYTES)
    return _of_json(body.removeprefix(_BYTE_ORDER_MARK))


def _of_form(body: bytes) -> RequestFacts:
    """Uploads: audio and images are no text, so their size says nothing of the prompt."""
    found = _FORM_MODEL.search(body[:EDGE_BYTES]) or _FORM_MODEL.search(body[-EDGE_BYTES:])
    return RequestFacts(found.group(1).decode(errors="replace").strip() if found else "", 0, 0, keeps=True)


def _inflated(body: bytes) -> bytes:
    """The first `INFLATED_BYTES` of a compressed body; a bomb costs no more."""
    try:
        return zlib.decompressobj(wbits=47).decompress(body, INFLATED_BYTES).removeprefix(_BYTE_ORDER_MARK)
    except zlib.error:
        raise InvalidArgument(
            FieldViolation("body", "is not what its content-encoding says; send plain JSON")
        ) from None


def _of_json(body: bytes, *, partial: bool = False) -> RequestFacts:
    if len(body) <= WHOLE_BYTES and not partial:
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError:  # a lone surrogate, NaN, a trailing comma: engines take some of these
            content = None
        if isinstance(content, dict):
            return _of_content(content)
    scan = _Scan(body)
    scan.run()
    if not scan.is_object or (scan.cut_off and "model" not in scan.found and len(body) <= WHOLE_BYTES):
        raise InvalidArgument(FieldViolation("body", 'is not a JSON object; send {"model": ..., ...}'))
    if "model" not in scan.found and not scan.finished:
        at_end = _MODEL.findall(body[-EDGE_BYTES:])
        scan.found["model"] = _scalar(at_end[-1]) if at_end else None
    return _facts(scan.found, scan.text_bytes if scan.finished else len(body))


def _of_content(content: dict[str, Any]) -> RequestFacts:
    return _facts(content, sum(_text_bytes(content[key]) for key in _PROMPTS if key in content))


def _facts(content: dict[str, Any], prompt_bytes: int) -> RequestFacts:
    model = content.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidArgument(
            FieldViolation("model", "is missing; name one of GET /v1/models (in a long request put it first)")
        )
    limit = next((content[key] for key in _LIMITS if content.get(key) is not None), 0)
    keeps = any(content.get(key) is True for key in _KEPT)
    return RequestFacts(model, _tokens(limit), prompt_bytes, keeps)


def _tokens(limit: Any) -> int:
    """0 for what says nothing (-1, null, text): whether it is right is the engine's to say."""
    usable = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit <= 10**9
    return int(limit) if usable else 0


def _text_bytes(prompt: Any) -> int:
    """Size of what the model has to read: text and token ids; images and audio are not counted."""
    pending, size = [prompt], 0
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            size += len(part.encode("utf-8", "surrogatepass"))
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            pending.extend(
                value for key, value in part.items() if key not in {"image_url", "input_audio", "file", "type"}
            )
        elif isinstance(part, int) and not isinstance(part, bool):
            size += BYTES_PER_TOKEN_ID
    return size


@dataclass(slots=True)
class _Scan:
    """One pass over a JSON object: the scalars of its top level that matter, and how much text it holds."""

    body: bytes
    found: dict[str, Any] = field(default_factory=dict)
    text_bytes: int = 0
    is_object: bool = False
    finished: bool = False
    cut_off: bool = False  # it ends before its last bracket
    _steps: int = MAX_STEPS
    _structure_bytes: int = MAX_STRUCTURE_BYTES

    def run(self) -> None:
        at = _SPACE.match(self.body).end()  # type: ignore[union-attr]  # it matches nothing too
        self.is_object = self.body[at : at + 1] == b"{"
        depth = 0
        while self.is_object and self._steps > 0 and self._structure_bytes > 0:
            token = STRUCTURE.search(self.body, at, at + self._structure_bytes)
            self._steps -= 1
            if token is None:
                self.cut_off = at + self._structure_bytes >= len(self.body)
                return
            self._structure_bytes -= token.end() - at
            at = token.end()
            if token.group() == b'"':
                at = self._string(at, top=depth == 1)
                if at < 0:
                    self.cut_off = self._steps > 0
                    return
            else:
                depth += 1 if token.group() in b"[{" else -1
                if depth == 0:
                    self.finished = True
                    return

    def _string(self, at: int, *, top: bool) -> int:
        """Past the string that begins at `at`, or past the scalar that it names; -1: it does not end within the budget."""
        end = self._end_of_string(at)
        if end < 0:
            return -1
        colon = _COLON.match(self.body, end + 1)
        if colon is None:
            if self.body[at : at + 5] != b"data:":
                self.text_bytes += end - at
            return end + 1
        key = self.body[at:end].decode(errors="replace") if top and end - at <= 32 else ""
        value = _SCALAR.match(self.body, colon.end()) if key in _SCALARS else None
        if value is None:
            return colon.end()
        self.found[key] = _scalar(value.group())
        return value.end()

    def _end_of_string(self, at: int) -> int:
        while self._steps > 0:
            end = self.body.find(b'"', at)
            if end < 0:
                return -1
            slashes = 0
            while self.body[end - 1 - slashes] == 0x5C and self._steps > 0:
                slashes += 1
                self._steps -= 1
            self._steps -= 1
            if slashes % 2 == 0:
                return end
            at = end + 1
        return -1


def _scalar(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
