"""From a value to what the store keeps of it, and back: fresh keys, wrapped outside of the store."""

from __future__ import annotations

import os

from whaleflux.errors import FailedPrecondition
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import secrets_pb2 as pb
from whaleflux_inventory.core import sealing
from whaleflux_inventory.core.sealing import Place, Unsealable
from whaleflux_inventory.key_wrapping import KeyWrapper, Wrapped


class Sealing:
    """Of single versions. Raises what `KeyWrapper` raises, but FailedPrecondition (SECRET_DAMAGED) for what does not open."""

    def __init__(self, keys: KeyWrapper) -> None:
        self._keys = keys

    async def seal(self, secret: pb.Secret, version: int, value: bytes) -> tuple[pb.WrappedKey, pb.SealedValue]:
        """What is kept of a new version."""
        place, data_key = place_of(secret, version), os.urandom(sealing.DATA_KEY_BYTES)
        sealed = sealing.seal(value, data_key, os.urandom(sealing.NONCE_BYTES), place)
        return await self._wrapped(secret, place, data_key), pb.SealedValue(sealed=sealed)

    async def open(self, secret: pb.Secret, key: pb.WrappedKey, sealed: pb.SealedValue) -> bytes:
        """The value of a version."""
        data_key = await self._data_key(secret, key)
        try:
            return sealing.unseal(sealed.sealed, data_key, place_of(secret, key.version))
        except Unsealable:
            raise _damaged(secret, key.version) from None

    async def rewrap(self, secret: pb.Secret, key: pb.WrappedKey, shown_as: pb.Secret | None = None) -> pb.WrappedKey:
        """The same key under the newest one; `shown_as`: with other team or queues."""
        data_key = await self._data_key(secret, key)
        return await self._wrapped(shown_as or secret, place_of(secret, key.version), data_key)

    async def is_newest(self, key_id: str) -> bool:
        """Whether a rewrap would change nothing."""
        return await self._keys.is_newest(key_id)

    async def _wrapped(self, secret: pb.Secret, place: Place, data_key: bytes) -> pb.WrappedKey:
        wrapped = await self._keys.wrap(data_key, _context(place))
        proof = sealing.policy_seal(data_key, place, secret.team, secret.queues)
        return pb.WrappedKey(version=place.version, key_id=wrapped.key_id, wrapped=wrapped.data, policy_seal=proof)

    async def _data_key(self, secret: pb.Secret, key: pb.WrappedKey) -> bytes:
        place = place_of(secret, key.version)
        try:
            data_key = await self._keys.unwrap(Wrapped(key.key_id, key.wrapped), _context(place))
            sealing.check_policy(key.policy_seal, data_key, place, secret.team, secret.queues)
        except Unsealable:
            raise _damaged(secret, key.version) from None
        return data_key


def place_of(secret: pb.Secret, version: int) -> Place:
    """Where a version of a secret belongs."""
    return Place(secret.name, secret.uid, version, secret.owner)


def _context(place: Place) -> bytes:
    """What a key management service may write down and compare."""
    return f"{place.name} {place.uid} {place.version}".encode()


def _damaged(secret: pb.Secret, version: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"version {version} of {secret.name} does not open: its record is not as it was stored; nothing is given out, "
        f"store the value anew with: whaleflux secrets rotate {secret.name.rpartition('/')[2]}",
        reason=ErrorReason.SECRET_DAMAGED,
        metadata={"name": secret.name, "version": str(version)},
    )
