"""The records behind `core.node_identity`: read with what they need to stay so, written with whatever depends on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Put, Store, Unchanged, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import records
from whaleflux_inventory.core import node_identity
from whaleflux_inventory.core.node_identity import Claim, NodeIdentity

MAX_MACHINE_ID = 64
MAX_ADDRESS = 253


@dataclass(frozen=True, slots=True)
class Admission:
    """What a commit needs so that a caller has the name after it, and the admission that its certificate is to bear."""

    id: str
    writes: list[Write]
    when: list[Condition]


class NodeIdentities:
    """Which machine, by which key, has which name."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def joins(self, node: str, claim: Claim, by: str) -> Admission:
        """A caller with a token. Raises NODE_NAME_TAKEN."""
        now = self._clock.now()
        new = names.ulid(now.timestamp())
        return await self._admission(node, claim, lambda known: node_identity.join(node, known, claim, by, now, new))

    async def comes_back(self, node: str, claim: Claim, ended: datetime) -> Admission:
        """A caller with its ended certificate, and the key of it. Raises as `node_identity.come_back`."""
        now = self._clock.now()
        return await self._admission(node, claim, lambda known: node_identity.come_back(node, known, claim, ended, now))

    async def renews(self, node: str, claim: Claim) -> Admission:
        """A caller with a good certificate, and a key that it may hold from now on. Raises NODE_NAME_TAKEN."""
        now = self._clock.now()
        new = names.ulid(now.timestamp())
        return await self._admission(node, claim, lambda known: node_identity.renew(node, known, claim, now, new))

    async def check(self, node: str, claim: Claim, by: str) -> None:
        """Refuses every machine but the one that has the name; the first that asks for a free one gets it."""
        now = self._clock.now()
        for _ in range(records.ATTEMPTS):
            admission = await self._admission(
                node, claim, lambda known: node_identity.speak(node, known, claim, by, now)
            )
            if not admission.writes:
                return
            try:
                await self._store.commit(*admission.writes, when=admission.when)
            except ConditionFailed:  # another machine asked in this moment
                continue
            return
        raise records.contended(node)

    async def release(self, node: str, revoke: Callable[[str], list[Write]]) -> None:
        """The name waits for the next machine; what the one that had it was admitted by is revoked in the same transaction."""
        key = keys.of_name(keys.NODE_IDENTITIES, node)
        for _ in range(records.ATTEMPTS):
            entry = await self._store.get(key)
            known = _identity_of(entry)
            if entry is None or known is None or not known.held:
                return
            after = node_identity.released(known, self._clock.now())
            try:
                await self._store.commit(_put(key, node, after), *revoke(known.admission), when=[Unchanged(entry)])
            except ConditionFailed:
                continue
            return
        raise records.contended(node)

    async def _admission(
        self, node: str, claim: Claim, decide: Callable[[NodeIdentity | None], NodeIdentity | None]
    ) -> Admission:
        check_claim(claim)
        key = keys.of_name(keys.NODE_IDENTITIES, node)
        entry = await self._store.get(key)
        known = _identity_of(entry)
        wanted = decide(known)
        writes: list[Write] = [] if wanted is None or wanted == known else [_put(key, node, wanted)]
        has = wanted or known
        return Admission(has.admission if has else "", writes, [Absent(key) if entry is None else Unchanged(entry)])


def check_claim(claim: Claim) -> None:
    """At most 64 printable characters name a machine."""
    if len(claim.machine_id) > MAX_MACHINE_ID or not claim.machine_id.isprintable():
        raise InvalidArgument(FieldViolation("machine_id", f"use at most {MAX_MACHINE_ID} printable characters"))


def _identity_of(entry: Entry | None) -> NodeIdentity | None:
    if entry is None:
        return None
    record = pb.NodeIdentity.FromString(entry.value)
    return NodeIdentity(
        record.machine_id,
        record.bind_time.ToDatetime(tzinfo=UTC),
        record.bound_by,
        tuple(record.replaced_machine_ids),
        record.admission,
        tuple(record.key_sha256s),
        record.address,
        tuple(record.replaced_key_sha256s),
    )


def _put(key: str, node: str, identity: NodeIdentity) -> Put:
    record = pb.NodeIdentity(
        node=node,
        machine_id=identity.machine_id,
        bound_by=identity.bound_by,
        replaced_machine_ids=identity.replaced,
        admission=identity.admission,
        key_sha256s=identity.keys,
        address=identity.address[:MAX_ADDRESS],
        replaced_key_sha256s=identity.replaced_keys,
    )
    record.bind_time.FromDatetime(identity.bind_time)
    return Put(key, record.SerializeToString(deterministic=True))
