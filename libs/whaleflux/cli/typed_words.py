"""What was typed for a field of the contract: errors name the option or argument of the command that was called.

Options are found by the field's own name (`--gpu-type` for `reservation.gpu_type`, `--nodes` for `reservation.nodes[3]`), by `_OTHERWISE`
where they are called otherwise, and the argument for whatever names the resource itself (`name`, `queue_id`).
`tests/unit/test_cli_typed_words.py` holds every request that commands send against the options of those commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

_OTHERWISE: dict[str, tuple[str, ...]] = {
    "add_members": ("--member", "NAME"),
    "alert_percents": ("--alert",),
    "billing_account": ("--account",),
    "credentials": ("--secret",),
    "display_name": ("--display-name", "--for", "NAME"),
    "end_time": ("--end", "--until", "--at"),
    "group_by": ("--by",),
    "gpu_class": ("--gpu",),
    "guaranteed_gpus": ("--guaranteed",),
    "include_decided": ("--decided",),
    "kind": ("--service-account",),
    "lending_limit_gpus": ("--lend",),
    "data_quota_bytes": ("--data-quota",),
    "manifest": ("--hash",),
    "micros": ("--usd",),
    "micros_per_gpu_hour": ("--usd-per-gpu-hour",),
    "micros_per_month": ("--usd",),
    "max_output_tokens": ("--max-tokens",),
    "awaits_oidc": ("--oidc",),
    "reason": ("--message",),
    "remove_members": ("--remove-member",),
    "resource": ("--for",),
    "size_bytes": ("--size",),
    "start_time": ("--start", "--from", "--since"),
    "offers": ("OFFER",),
    "ttl": ("--ttl", "--for"),
    "ttl_s": ("--ttl", "--days", "--hours", "--for"),
    "cost_cap_usd": ("--cap",),
    "uri": ("--source",),
    "value": ("--from-file",),
    "window_hours": ("--hours",),
}
_INDEX = re.compile(r"\[\d+\]")
_KINDS = frozenset(
    ("job", "queue", "node", "reservation", "secret", "dataset", "model", "user", "group", "token", "site", "etag")
)  # as `names` calls what a name lacks


def called(program: Any, words: Sequence[str]) -> tuple[list[str], Any]:
    """The command that a command line means, by its words, and itself; as far as they are words of commands."""
    named, command, skip = list[str](), program, False
    for word in words:
        inner = getattr(command, "commands", None)
        if skip or not inner:
            skip = False
            continue
        if word.startswith("-"):
            skip = "=" not in word and _takes_value(command, word)
            continue
        if word not in inner:
            break
        named.append(word)
        command = inner[word]
    return named, command


def word_for(field: str, command: Any) -> str:
    """How the command calls what the contract calls `field`; the field as it is where it has no word for it."""
    if field.startswith("-") or ": " in field:
        return field
    path = _INDEX.sub("", field).split(".")
    options = {option for param in command.params for option in param.opts if option.startswith("--")}
    arguments = {param.name: argument_word(param) for param in command.params if param.param_type_name == "argument"}
    for name in reversed(path[-2:]):
        for word in _words(name):
            if word in options or word in arguments.values():
                return word
        if name in arguments:
            return arguments[name]
    if arguments and _names_it(path):
        return next(iter(arguments.values()))
    return field


def argument_word(param: Any) -> str:
    """An argument as the help calls it."""
    return str(param.metavar or param.name).strip("{}[].").upper()


def _words(name: str) -> Iterator[str]:
    yield from _OTHERWISE.get(name, ())
    option = f"--{name.replace('_', '-')}"
    yield from (option, option.removesuffix("s"), option + "s")


def _names_it(path: Sequence[str]) -> bool:
    """Whether the field is the name of what the command is about."""
    return path[-1] == "name" or (len(path) == 1 and (path[0].endswith("_id") or path[0] in _KINDS))


def _takes_value(command: Any, word: str) -> bool:
    return any(word in param.opts and not getattr(param, "is_flag", False) for param in command.params)
