"""What the OpenAI API says about completions, as far as this engine speaks it: requests in, answers out. No network.

A parameter that would change the answer is honoured or refused by name, never ignored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_TOKENS, MAX_CHOICES, MAX_STOPS = 4096, 16, 4
DEFAULT_TOKENS, DEFAULT_TEMPERATURE = 64, 0.8
# What this engine cannot do, with the values that ask for nothing.
CANNOT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Refused(Exception):
    """A request that cannot be served: which parameter, and what would be right."""

    def __init__(self, param: str, message: str, status: int = 400) -> None:
        super().__init__(f"{param}: {message}" if param else message)
        self.param, self.status = param, status

    def body(self) -> dict[str, Any]:
        """As the API's clients expect it."""
        return {
            "error": {
                "message": str(self),
                "type": "invalid_request_error",
                "param": self.param or None,
                "code": None,
            }
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be served."""

    prompts: tuple[str, ...]
    chat: bool
    tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    n: int  # choices for each prompt
    stream: bool
    stream_usage: bool

    def choices(self) -> Iterator[tuple[int, str, int | None]]:
        """Index, prompt and seed of each choice; choices of one prompt differ."""
        for index in range(len(self.prompts) * self.n):
            seed = index % self.n if self.seed is None else self.seed + index % self.n
            yield index, self.prompts[index // self.n], seed


def asked(body: Any, *, chat: bool) -> Asked:
    """Raises Refused. `null` means that a parameter is not given."""
    if not isinstance(body, dict):
        raise Refused("", "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, harmless in CANNOT.items():
        if name in given and given[name] not in harmless:
            raise Refused(name, "this engine cannot do that; leave it out")
    n = _number(given, "n", 1, 1, MAX_CHOICES, whole=True)
    if "best_of" in given and given["best_of"] != n:
        raise Refused("best_of", f"must be n ({n:g}), or left out")
    prompts = (_conversation(given),) if chat else _prompts(given)
    if len(prompts) * n > MAX_CHOICES:
        raise Refused("n", f"{len(prompts)} prompts and n {n:g} make more than {MAX_CHOICES} choices")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused("stream_options", 'must be an object, like {"include_usage": true}')
    length = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    return Asked(
        prompts=prompts,
        chat=chat,
        tokens=int(_number(given, length, DEFAULT_TOKENS, 1, MAX_TOKENS, whole=True)),
        temperature=_number(given, "temperature", DEFAULT_TEMPERATURE, 0, 2),
        top_p=_number(given, "top_p", 1.0, 0, 1),
        seed=int(_number(given, "seed", 0, -(2**63), 2**63 - MAX_CHOICES, whole=True)) if "seed" in given else None,
        stops=_stops(given.get("stop", [])),
        n=int(n),
        stream=_flag(given, "stream"),
        stream_usage=_flag(options, "include_usage"),
    )


def _number(
    given: dict[str, Any], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(name, f"must be a {'whole ' if whole else ''}number")
    if not least <= value <= most:
        raise Refused(name, f"is {str(value)[:20]}, must be from {least:g} to {most:g}")
    if whole and value != int(value):
        raise Refused(name, "must be a whole number")
    return value


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name) or False
    if not isinstance(value, bool):
        raise Refused(name, "must be true or false")
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops) or len(stops) > MAX_STOPS:
        raise Refused("stop", f"must be a string, or at most {MAX_STOPS} of them, none empty")
    return tuple(stops)


def _prompts(given: dict[str, Any]) -> tuple[str, ...]:
    prompt = given.get("prompt", "")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise Refused("prompt", "must be a string or a list of strings")
    if not all(isinstance(one, str) for one in prompts):
        raise Refused("prompt", "must be text; this engine takes no token ids")
    return tuple(prompts)


def _conversation(given: dict[str, Any]) -> str:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages", "must be a list with at least one message")
    return "\n".join(_content(message, f"messages[{index}]") for index, message in enumerate(messages))


def _content(message: Any, where: str) -> str:
    if not isinstance(message, dict):
        raise Refused(where, "must be an object with role and content")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refused(f"{where}.content", "must be a string or a list of parts")
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Refused(where, 'must be a text part, like {"type": "text", "text": "..."}; this engine reads text only')
    return str(part["text"])


def until_stop(characters: Iterator[str], stops: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Text as it may be shown, and with the last piece why it ended: "stop" or "length".

    What may be the beginning of a stop string is held back: it is never shown when it was one.
    """
    held = ""
    for character in characters:
        held += character
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)], "stop"
            return
        keep = max((size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])), default=0)
        if shown := held[: len(held) - keep]:
            yield shown, None
        held = held[len(held) - keep :]
    yield held, "length"


def head(model: str, kind: str) -> dict[str, Any]:
    """What all pieces of an answer share."""
    return {"id": f"gen-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": model}


def usage(request: Asked, generated: int) -> dict[str, int]:
    """One character is one token."""
    prompt = sum(map(len, request.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def whole_choice(request: Asked, index: int, text: str, reason: str) -> dict[str, Any]:
    content = {"message": {"role": "assistant", "content": text}} if request.chat else {"text": text}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def streamed_choice(request: Asked, index: int, text: str, reason: str | None) -> dict[str, Any]:
    delta = {"content": text} if text or reason is None else {}
    content: dict[str, Any] = {"delta": delta} if request.chat else {"text": text}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}
