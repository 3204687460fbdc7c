"""What to do after an error: the next command. Every one named here exists (`tests/unit/test_cli_advice.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whaleflux.cli import typed_words
from whaleflux.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from whaleflux.reasons import ErrorReason

_PASSING = frozenset(
    {
        ErrorReason.NOT_LEADER,
        ErrorReason.DRAINING,
        ErrorReason.NODES_UNREACHABLE,
        ErrorReason.CACHE_BEHIND,
        ErrorReason.SESSION_LOST,
    }
)
_FILES = {
    "submit": "explain-field",
    "validate": "explain-field",
    "serve": "explain-field --model",
    "ray up": "explain-field --ray",
    "deploy": "explain-field --model",
}
LISTS = {
    "apikey": "keys list",
    "checkpoint": "checkpoints",
    "access_token": "tokens ls",
    "dataset": "datasets",
    "datasets": "datasets",
    "group": "group ls",
    "health": "nodes",
    "incident": "incidents -a",
    "job": "jobs -a",
    "join_token": "token list",
    "model": "models",
    "node": "nodes --retired",
    "output": "jobs -a",
    "queue": "queue ls",
    "ray_cluster": "ray ls",
    "replica": "replicas",
    "reservation": "reservation ls",
    "secret": "secrets ls",
    "site": "sites",
    "token": "token list",
    "user": "user ls",
}  # by the kind of a resource: what lists it
_BEHIND: dict[str, str] = {
    ErrorReason.BUS_UNAVAILABLE: "NATS",
    ErrorReason.STORE_UNAVAILABLE: "etcd",
}  # what a service waits for
FLEET_AWAY = "is the fleet running? see: whaleflux config; start one with: whaleflux up"
_SPEC, _MODEL = "job.spec.", "model."
_OF_THE_FILE = {"job_id": "name", "model_id": "model", "parent": "queue"}


def after(error: StatusError, called: Sequence[str]) -> str:
    """The advice for an error of the command that these words call (without the program's name)."""
    command = " ".join(called)
    if isinstance(error, InvalidArgument):
        return f"see: whaleflux {_help(error, command)}"
    if isinstance(error, NotFound | AlreadyExists):
        return f"see what exists with: whaleflux {LISTS.get(error.kind, 'status')}"
    if error.reason in _PASSING:
        return "the fleet is there; repeat the command"
    if error.reason == ErrorReason.NO_READY_REPLICA:
        return "see why with: whaleflux replicas -o wide"
    if error.reason == ErrorReason.RAY_UNREACHABLE:
        return "see whether its head runs, and its port is open from here; those of the fleet: whaleflux ray ls"
    if error.reason in _BEHIND and isinstance(error, Unavailable):
        return f"the fleet is there, its {_BEHIND[error.reason]} does not answer; repeat the command, or look into the log of {_BEHIND[error.reason]}"
    if isinstance(error, DeadlineExceeded) and "service" in error.metadata:
        return (
            f"the front door is there; look into the logs of {error.metadata['service']}, etcd and NATS (those of whaleflux up are in "
            "STATE/logs)"
        )
    if isinstance(error, Unavailable | DeadlineExceeded):
        return FLEET_AWAY
    if error.reason == ErrorReason.DISABLED:
        return "an operator undoes it with: whaleflux user enable NAME"
    if isinstance(error, Unauthenticated) and command == "login":
        return "see: whaleflux login --help"
    if isinstance(error, Unauthenticated):
        return "log in with: whaleflux login"
    if isinstance(error, PermissionDenied):
        return "see who you are there with: whaleflux whoami"
    if isinstance(error, Aborted | ResourceExhausted):
        return "repeat the command"
    return "see the state with: whaleflux status"


def _help(error: InvalidArgument, command: str) -> str:
    if error.violations and error.violations[-1].field == "context":
        return "config"
    of_file = bool(error.violations) and not error.violations[-1].field.startswith("-")
    return _FILES[command] if command in _FILES and of_file else f"{command} --help".strip()


def exit_code(error: StatusError) -> int:
    """2 wrong input, 3 fleet not reached, 1 refused or failed."""
    if isinstance(error, InvalidArgument):
        return 2
    away = isinstance(error, Unavailable | DeadlineExceeded) and error.reason != ErrorReason.NO_READY_REPLICA
    return 3 if away else 1


def field_as_typed(field: str, called: Sequence[str], command: Any) -> str:
    """The services name fields of the contract; who wrote a file knows them by its words, who typed options by these.

    Of several jobs in one file the field stands behind the job's name: "queues/default/jobs/a: job.spec.gpus".
    """
    if " ".join(called) not in _FILES:
        return typed_words.word_for(field, command)
    of, colon, path = field.rpartition(": ")
    return of + colon + _in_the_file(path)


def _in_the_file(field: str) -> str:
    from whaleflux.manifests.field import name_in_file
    from whaleflux.manifests.job_fields import ATTRIBUTES
    from whaleflux.manifests.model_fields import MODEL_FIELDS

    if field.startswith(_SPEC):
        return name_in_file(ATTRIBUTES.values(), field.removeprefix(_SPEC))
    if field.startswith(_MODEL):
        return name_in_file(MODEL_FIELDS, field.removeprefix(_MODEL))
    return _OF_THE_FILE.get(field, field)


def of_the_system(error: OSError) -> str:
    """What the operating system refused, in words."""
    what = error.strerror or type(error).__name__
    if error.filename:
        return f"{error.filename}: {what}; name another file or folder"
    return f"cannot write the output: {what}"
