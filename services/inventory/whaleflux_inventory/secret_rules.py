"""Whose a secret is and where it may be used. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from whaleflux import names
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.trust.ownership import is_owner, is_team

MAX_VALUE_BYTES = 64 << 10
MAX_QUEUES = 64
VERSIONS_KEPT = 10
MAX_PER_OWNER = 500
MAX_IN_ALL = 20_000
MAX_CHOICES = 64


@dataclass(frozen=True, slots=True)
class Shared:
    """Who may use a secret. `owner`: "user/ann"; `team`: groups/{group} or ""; `queues`: queues/{queue}, none: all."""

    owner: str
    team: str = ""
    queues: tuple[str, ...] = ()


def of_subject(subject: str, groups: frozenset[str]) -> Principal:
    """On whose behalf a task asks: the submitter of its job, who makes no call now."""
    role, _, name = subject.partition("/")
    return Principal(Identity(role, name), groups)


def may_use(asker: Principal, shared: Shared) -> bool:
    """Owner and team. Operators may not: who looks after the fleet needs nobody's passwords."""
    return is_owner(asker, shared.owner) or is_team(asker, shared.team)


def may_see(asker: Principal, shared: Shared) -> bool:
    """That there is such a secret; operators see it, to tidy up."""
    return asker.is_operator or may_use(asker, shared)


def may_act_on(asker: Principal, queues: Sequence[str]) -> bool:
    """A token for some queues (CI) touches only secrets that are for these alone."""
    return asker.queues is None or (bool(queues) and {names.last(queue) for queue in queues} <= asker.queues)


def why_not(asker: Principal, shared: Shared | None, name: str, queue: str) -> str:
    """Why a job of who asks may not use it in a queue; "" when it may. What is another's is as if it did not exist."""
    if shared is None or not may_use(asker, shared):
        return (
            f"there is no secret {names.last(name)!r} that {asker.subject} may use; see: whaleflux secrets ls; "
            f"store it with: whaleflux secrets add {names.last(name)}"
        )
    if shared.queues and queue not in shared.queues:
        allowed = ", ".join(names.last(one) for one in shared.queues)
        where = f"not in {names.last(queue)!r}" if queue else "not outside of queues"
        return (
            f"secret {names.last(name)!r} may be used in queue {allowed}, {where}; submit there, or its owner allows it with: "
            f"whaleflux secrets set {names.last(name)} --queue {names.last(queue) if queue else 'all'}"
        )
    return ""


def version_of(kept: Sequence[int], asked: int) -> int:
    """The version that is meant, 0 when it is not kept. `asked` 0: the newest."""
    if not asked:
        return kept[-1] if kept else 0
    return asked if asked in kept else 0


def credentials_of(value: bytes) -> dict[str, str]:
    """The parts of a credential that has several, for adapters that speak with clouds. Raises ValueError, without a word of it.

    A JSON object of texts, or lines NAME=VALUE, as `aws configure export-credentials --format env-no-export` and the like print them.
    """
    try:
        text = value.decode()
        parts = json.loads(text) if text.lstrip().startswith("{") else dict(_pairs(text))
    except ValueError:
        parts = None
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError("is neither a JSON object of texts nor lines NAME=VALUE") from None
    return parts


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equal, value = line.strip().removeprefix("export ").partition("=")
        if name and not name.startswith(("#", "[")):
            if not equal:
                raise ValueError
            yield name.strip(), value.strip()


def is_text(value: bytes) -> bool:
    """Whether an environment variable can hold it."""
    if b"\0" in value:
        return False
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
