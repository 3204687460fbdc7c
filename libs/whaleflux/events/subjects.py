"""Subjects of events: `wf.v1.<site>.<kind>.<id>.<what>`.

`site` is where the event is *said*: `hub` for the control plane, else the site whose agents publish it on their own
leaf. No site may be named `hub`. `kind` and `id` name the resource (`node`, `onprem_n1` for sites/onprem/nodes/n1): the
ids of a resource with several are joined by `_`, which no id contains. `what` is what happened: `running`, `xid`.

Accounting has a root of its own, `wf.account.<queue>.<user>.<job>.<record>`, since it is kept longer (see `accounting`); so has the audit
trail, `wf.audit.<role>.<replica>.<start>.records`, and what GPUs did, `wf.usage.<site>.<node>.<start>.samples`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.names import check_id, split

ROOT = "wf.v1"
ACCOUNT_ROOT = "wf.account"
AUDIT_ROOT = "wf.audit"
USAGE_ROOT = "wf.usage"
HUB = "hub"
EVERYTHING = f"{ROOT}.>"
MAX_CHARACTERS = 255

_ROOTS = tuple(root.split(".") for root in (ROOT, ACCOUNT_ROOT, AUDIT_ROOT, USAGE_ROOT))
_TOKEN = re.compile(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Subject:
    """One event's subject, taken apart."""

    site: str
    kind: str
    ids: tuple[str, ...]
    what: str

    def __post_init__(self) -> None:
        check_id("subject.site", self.site)
        check_id("subject.kind", self.kind)
        check_id("subject.what", self.what)
        if not self.ids:
            raise InvalidArgument(FieldViolation("subject.id", "a resource has at least one id"))
        for part in self.ids:
            check_id("subject.id", part)

    def __str__(self) -> str:
        return ".".join((ROOT, self.site, self.kind, "_".join(self.ids), self.what))

    @classmethod
    def of(cls, name: str, what: str, *, site: str = HUB) -> Self:
        """The subject about a resource name: `of("sites/a/nodes/n1", "LINK_LOST")` is wf.v1.hub.node.a_n1.link-lost."""
        parts = name.split("/")
        if len(parts) % 2 or not parts[-2]:
            raise InvalidArgument(
                FieldViolation("name", f"{name[:100]!r} is not a resource name such as sites/a/nodes/n1")
            )
        kind = parts[-2].removesuffix("s").lower()
        return cls(site, kind, tuple(parts[1::2]), what.lower().replace("_", "-"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes a subject apart, refusing what `str` could not have made."""
        check(text)
        _, _, site, kind, joined, what = text.split(".")
        return cls(site, kind, tuple(joined.split("_")), what)


def pattern(*, site: str = "*", kind: str = "*", id: str = "*", what: str = "*") -> str:
    """A filter for `subscribe`; what is not given matches anything."""
    return check_filters([f"{ROOT}.{site}.{kind}.{id}.{what}"])[0]


def change_id(key: str, revision: int, value: bytes | None, history: int = 0) -> str:
    """The id of a state change: the same however often its owner's publisher restarts; `history` as in `EntryChange`.

    With a digest of the new value (None: deleted): a restored backup gives revisions again, and what is written under one then is
    not taken for a repetition of what was told before, also where nobody noticed the restoring.
    """
    digest = "" if value is None else f"-{zlib.crc32(value):08x}"
    return f"{key}@{revision}{digest}" + (f"~{history}" if history else "")


def observation_id(node: str, boot: str, sequence: int) -> str:
    """The id of an agent's observation. `node` is the full name: ids are compared across sites at the hub."""
    return f"{node}/{boot}/{sequence}"


def audit_subject(role: str, replica: str, start: str) -> str:
    """Where one process of a service publishes what it writes down."""
    return check(f"{AUDIT_ROOT}.{role}.{replica}.{start}.records")


def usage_subject(node: str, start: str) -> str:
    """Where what one start of an agent saw is published; `node` is sites/{site}/nodes/{node}."""
    site, own = split(node, "sites", "nodes")
    return check(f"{USAGE_ROOT}.{site}.{own}.{start}.samples")


def usage_id(node: str, boot: str, start: str, sequence: int) -> str:
    """The id of what an agent saw in one interval."""
    return f"{node}/{boot}/{start}/{sequence}"


def check(subject: str) -> str:
    """Returns `subject` when it is wf.v1.<site>.<kind>.<id>.<what>, or one of accounting, audit or usage, else refuses."""
    tokens = subject.split(".")
    if len(subject) > MAX_CHARACTERS or len(tokens) != 6 or tokens[:2] not in _ROOTS:
        raise _bad(subject)
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise _bad(subject)
    return subject


def check_filters(filters: Sequence[str]) -> tuple[str, ...]:
    """Returns the filters when each is valid and no two overlap (a server refuses that), else refuses."""
    if not 1 <= len(filters) <= 64:
        raise InvalidArgument(FieldViolation("subjects", f"{len(filters)} filters; use 1 to 64"))
    for one in filters:
        tokens = one.split(".")
        if len(one) > MAX_CHARACTERS or tokens[:2] not in _ROOTS or not 3 <= len(tokens) <= 6:
            raise _bad(one)
        if ">" in tokens[:-1] or (len(tokens) < 6 and tokens[-1] != ">"):
            raise _bad(one)
        if not all(token in {"*", ">"} or _TOKEN.fullmatch(token) for token in tokens):
            raise _bad(one)
    for i, one in enumerate(filters):
        for other in filters[i + 1 :]:
            if overlap(one, other):
                raise InvalidArgument(
                    FieldViolation("subjects", f"{one!r} and {other!r} overlap; leave one out or narrow it")
                )
    return tuple(filters)


def matches(filter: str, subject: str) -> bool:
    """Whether `filter` (with `*` for one token, `>` for one or more at the end) lets `subject` through."""
    wanted, tokens = filter.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(tokens) >= len(wanted) and all(w in {"*", t} for w, t in zip(wanted[:-1], tokens, strict=False))
    return len(tokens) == len(wanted) and all(w in {"*", t} for w, t in zip(wanted, tokens, strict=True))


def overlap(one: str, other: str) -> bool:
    """Whether some subject matches both filters."""
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if ">" in {a, b}:
            return True
        if "*" not in {a, b} and a != b:
            return False
    return one.count(".") == other.count(".")


def _bad(subject: str) -> InvalidArgument:
    shown = subject if len(subject) <= 100 else subject[:97] + "..."
    return InvalidArgument(
        FieldViolation(
            "subject",
            f"{shown!r} does not have the form {ROOT}.<site>.<kind>.<id>.<what> of a-z, 0-9, '-' ('_' between ids)",
        )
    )
