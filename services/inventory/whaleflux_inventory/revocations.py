"""Who is not admitted any more, as every service watches it (`whaleflux.trust.view`)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.clock import CLOCK_SKEW
from whaleflux.rpc import roles
from whaleflux.rpc.pki import LEAF_LIFETIME
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put, Store, Write
from whaleflux.store.reading import read_all
from whaleflux.v1 import trust_pb2

_OUTLIVED = LEAF_LIFETIME + 2 * CLOCK_SKEW  # every certificate that this fleet gave until now has ended by then


def of_node(node: str, why: str, now: datetime, *, own_certificates: bool) -> Write:
    """All certificates of a node, whoever gave them; for good where they come from elsewhere (`own_certificates` False)."""
    site, node_id = names.split(node, "sites", "nodes")
    return _put(f"{roles.AGENT}/{site}/{node_id}", why, now, None if not own_certificates else _OUTLIVED)


def of_admission(admission: str, why: str, now: datetime) -> list[Write]:
    """All certificates of one admission; none where it has none."""
    return [_put(admission, why, now, _OUTLIVED)] if admission else []


async def sweep(store: Store, now: datetime) -> None:
    """Forgets some of those whose certificates have all ended."""
    read = read_all(
        (await store.list(keys.REVOKED)).entries, lambda entry: trust_pb2.Revocation.FromString(entry.value)
    )
    over = [
        entry
        for entry, record in read.values
        if record.HasField("expire_time") and record.expire_time.ToDatetime(tzinfo=UTC) < now
    ]
    if over:
        await store.commit(*(Delete(entry.key) for entry in over[:100]))


def _put(subject: str, why: str, now: datetime, lasts: timedelta | None) -> Put:
    record = trust_pb2.Revocation(subject=subject, reason=why)
    record.revoke_time.FromDatetime(now)
    if lasts is not None:
        record.expire_time.FromDatetime(now + lasts)
    return Put(keys.REVOKED + subject, record.SerializeToString(deterministic=True))
