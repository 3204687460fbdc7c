"""Which HTTP paths there are on the inference API: the one table. What is not here reaches neither the policy nor an engine.

Beside each path stand who may ask for it and whose it is, as `rpc.roles` and `rpc.owners` say it of rpcs. The routes of the front door
are made from it, and the router's policy asks it again for the engine of the model: an engine's own switches under /v1 (loading of
adapters, metrics, profiling) are for whoever runs it, not for those who hold a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_SUCH_PATH = "no such path"  # name of the route that answers all others, as access logs tell it
NO_KEY, MALFORMED_KEY = "no key", "malformed key"  # of the routes that refuse by themselves who cannot have a key
Who = Literal["app", "anyone"]  # the holder of an API key; everybody
Whose = Literal[
    "fleet", "model", "leaves out"
]  # nothing to own; of the model that the body names; what the key may not see is left out

ANY_ENGINE = frozenset({"openai", "vllm", "sglang"})
_SCORING = frozenset({"openai", "vllm", "sglang"})
_VLLM, _OPENAI = frozenset({"vllm"}), frozenset({"openai", "sglang"})


@dataclass(frozen=True, slots=True)
class HttpPath:
    """One method and path. `engines`: kinds of engine that get it; none: the front door or the policy answers.

    `repeatable`: its answer depends on nothing that an engine keeps, so one that has begun may be sent once more, elsewhere.
    `below`: one more segment may follow, a name.
    """

    method: Literal["GET", "POST"]
    path: str
    who: Who = "app"
    whose: Whose = "model"
    engines: frozenset[str] = frozenset()
    repeatable: bool = True
    below: bool = False


def _engine(path: str, engines: frozenset[str] = ANY_ENGINE, *, repeatable: bool = True) -> HttpPath:
    return HttpPath("POST", f"/v1/{path}", engines=engines, repeatable=repeatable)


HTTP_PATHS: tuple[HttpPath, ...] = (
    HttpPath("GET", "/health", "anyone", "fleet"),
    HttpPath("GET", "/v1/models", whose="leaves out", below=True),
    _engine("chat/completions"),
    _engine("completions"),
    _engine("responses", repeatable=False),  # an engine keeps them, for `previous_response_id`
    _engine("embeddings"),
    _engine("messages"),  # of the Anthropic API
    _engine("messages/count_tokens"),
    _engine("rerank"),
    _engine("score", _SCORING),
    _engine("classify", _SCORING),
    _engine("pooling", _VLLM | {"openai"}),
    _engine("moderations", _OPENAI, repeatable=False),
    _engine("audio/transcriptions"),
    _engine("audio/translations"),
    _engine("audio/speech", repeatable=False),
    _engine("images/generations", repeatable=False),
    _engine("images/edits", repeatable=False),
    _engine("images/variations", repeatable=False),
)
TO_ENGINES: dict[str, HttpPath] = {path.path: path for path in HTTP_PATHS if path.engines}


def find(method: str, path: str) -> HttpPath | None:
    """The row of a request; None: there is no such path. `path` without its query."""
    for row in HTTP_PATHS:
        if row.method == method and (path == row.path or (row.below and _is_below(path, row.path))):
            return row
    return None


def engine_paths(kind: str) -> list[str]:
    """What an engine of this kind gets, for an error that says so."""
    return sorted(path for path, row in TO_ENGINES.items() if kind in row.engines)


def _is_below(path: str, parent: str) -> bool:
    return path.startswith(f"{parent}/") and "/" not in path.removeprefix(f"{parent}/").rstrip("/")
