"""One name, one machine, one key: who may speak as a node, and who took its name over.

The machine's id is what a caller says of itself; its key is what it proves. A name that somebody has goes to nobody else, whatever they say,
until an operator replaces the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.errors import FailedPrecondition, Unauthenticated
from whaleflux.reasons import ErrorReason

KEPT_REPLACED = 16
KEPT_KEYS = 3  # the newest, and those that a node may still have when answers that brought newer ones were lost
SHOWN_CHARS = 12  # of a machine's id, enough to tell machines apart
ASLEEP = timedelta(days=30)  # after the end of its certificate a node may come back by its key alone


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """What has a node's name. Without machine and keys the name waits for the machine that takes it over.

    `keys`: digests of its public keys, the newest first; none where certificates come from elsewhere. `admission`: ULID of its certificates.
    """

    machine_id: str
    bind_time: datetime
    bound_by: str
    replaced: Sequence[str] = ()
    admission: str = ""
    keys: Sequence[bytes] = ()
    address: str = ""
    replaced_keys: Sequence[bytes] = ()

    @property
    def held(self) -> bool:
        """Whether somebody has the name."""
        return bool(self.machine_id or self.keys)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a caller says of itself (machine, address) and has proven (key, or session: of the certificate that it called with)."""

    machine_id: str
    address: str = ""
    key: bytes = b""
    session: str = ""


def join(
    node: str, known: NodeIdentity | None, claim: Claim, by: str, now: datetime, admission: str
) -> NodeIdentity | None:
    """The identity to store when a caller with a token, and the key of `claim`, gets the name; None when nothing changes.

    `admission` counts when it is a new one. Raises FailedPrecondition (NODE_NAME_TAKEN) with both machines when another one has the
    name, or the same machine with another key: what a machine is called is no secret.
    """
    if known is None:
        return NodeIdentity(claim.machine_id, now, by, (), admission, (claim.key,), claim.address)
    if not known.held:
        if claim.machine_id in ("", *known.replaced) or claim.key in known.replaced_keys:
            raise taken(node, known, claim)
        return replace(
            known,
            machine_id=claim.machine_id,
            bind_time=now,
            bound_by=by,
            admission=admission,
            keys=(claim.key,),
            address=claim.address,
        )
    if not _is_machine(known, claim) or (known.keys and claim.key not in known.keys):
        raise taken(node, known, claim)
    return _if_changed(
        known,
        replace(
            with_key(known, claim.key),
            machine_id=claim.machine_id,
            admission=known.admission or admission,
        ),
    )


def speak(node: str, known: NodeIdentity | None, claim: Claim, by: str, now: datetime) -> NodeIdentity | None:
    """The identity to store when a caller with a certificate of the node speaks for it; None when nothing changes. Raises as `join`.

    Where certificates come from elsewhere the first machine that speaks has the name.
    """
    if known is None:
        bound = bool(claim.machine_id or claim.session)
        return NodeIdentity(claim.machine_id, now, by, (), claim.session, (), claim.address) if bound else None
    if known.admission and claim.session not in ("", known.admission):
        raise taken(node, known, claim)
    if not known.held:
        if claim.machine_id in ("", *known.replaced) or claim.session:
            raise taken(node, known, claim)
        return replace(known, machine_id=claim.machine_id, bind_time=now, bound_by=by, address=claim.address)
    if not _is_machine(known, claim):
        raise taken(node, known, claim)
    return _if_changed(known, replace(known, machine_id=claim.machine_id))


def renew(node: str, known: NodeIdentity | None, claim: Claim, now: datetime, admission: str) -> NodeIdentity:
    """The identity once a caller with a good certificate of the node may hold the key of `claim`. Raises as `join`.

    `admission` counts where it has none yet: its certificate is of an earlier version.
    """
    spoken = speak(node, known, claim, "renewal", now) or known
    spoken = spoken or NodeIdentity(claim.machine_id, now, "renewal", address=claim.address)
    return with_key(replace(spoken, admission=spoken.admission or claim.session or admission), claim.key)


def come_back(node: str, known: NodeIdentity | None, claim: Claim, ended: datetime, now: datetime) -> NodeIdentity:
    """The identity of a node whose certificate ended at `ended`, and whose key the caller has proven to hold. Raises as `join`.

    Raises Unauthenticated (CERTIFICATE_REFUSED) for a key that is not the node's any more, and for one that ended too long ago.
    """
    if known is not None and not (known.held and claim.session == known.admission and _is_machine(known, claim)):
        raise taken(node, known, claim)
    if known is None or claim.key not in known.keys:
        raise _not_back(f"its key is not one that {node} has now")
    if now > ended + ASLEEP + CLOCK_SKEW:
        raise _not_back(f"it ended {(now - ended).days} days ago, and {ASLEEP.days} are borne")
    return with_key(known, claim.key)


def with_key(known: NodeIdentity, key: bytes) -> NodeIdentity:
    """The identity once it may hold `key` too, as the newest."""
    return replace(known, keys=tuple(dict.fromkeys((key, *known.keys)))[:KEPT_KEYS])


def released(known: NodeIdentity, now: datetime) -> NodeIdentity:
    """The name waits for another machine; the one that had it is refused from now on, and so is its key."""
    if not known.held:
        return known
    machines = (*known.replaced, known.machine_id) if known.machine_id else known.replaced
    keys = (*known.replaced_keys, *known.keys[:1])
    return NodeIdentity(
        "", now, "operator", tuple(machines)[-KEPT_REPLACED:], replaced_keys=tuple(keys)[-KEPT_REPLACED:]
    )


def taken(node: str, known: NodeIdentity, claim: Claim) -> FailedPrecondition:
    """The refusal, with what is known of both and what can be done."""
    mine = f"machine {claim.machine_id[:SHOWN_CHARS] or 'unnamed'}{_at(claim.address)}"
    since = f"{known.bind_time:%Y-%m-%d %H:%M:%S} UTC"
    if known.held:
        holder = f"{node} belongs to machine {known.machine_id[:SHOWN_CHARS] or 'unnamed'}{_at(known.address)} since {since} (by {known.bound_by})"
        if known.machine_id == claim.machine_id:
            mine += ", with another key"
        fix = (
            f"give it another --node-id; or, if the other one is gone for good, run `whaleflux replace {node}` and join again "
            f"(whaleflux token create --site {names.top(node)} --node {names.last(node)})"
        )
    else:
        holder = f"{node} was given up by this machine at {since}, when an operator replaced it"
        fix = "join it under another --node-id"
    return FailedPrecondition(
        f"{holder}; this is {mine}: {fix}",
        reason=ErrorReason.NODE_NAME_TAKEN,
        metadata={
            "node": node,
            "holder": known.machine_id[:SHOWN_CHARS],
            "since": since,
            "machine": claim.machine_id[:SHOWN_CHARS],
        },
    )


def _is_machine(known: NodeIdentity, claim: Claim) -> bool:
    """Whether the caller says to be the machine that has the name; one that never said which it is may say it now."""
    return known.machine_id in ("", claim.machine_id)


def _if_changed(before: NodeIdentity, after: NodeIdentity) -> NodeIdentity | None:
    return None if after == before else after


def _at(address: str) -> str:
    return f" at {address[:64]}" if address else ""


def _not_back(why: str) -> Unauthenticated:
    return Unauthenticated(
        f"this certificate does not bring the node back: {why}; ask an operator for a join token (whaleflux token create --site SITE --node NODE)",
        reason=ErrorReason.CERTIFICATE_REFUSED,
    )
