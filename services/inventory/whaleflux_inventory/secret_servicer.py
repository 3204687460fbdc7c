"""SecretService: secrets go in once, and come out only towards tasks. Nothing here logs, shows or returns a value but OpenSecrets."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import (
    Aborted,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store.api import ConditionFailed, Entry, Store
from whaleflux.trust import audit, ownership
from whaleflux.v1 import secrets_pb2 as pb
from whaleflux.v1 import secrets_pb2_grpc as rpc
from whaleflux_inventory import secret_rules as rules
from whaleflux_inventory.key_wrapping import KeyWrapper
from whaleflux_inventory.secret_records import SecretRecords, shared, shown, taken
from whaleflux_inventory.secret_sealing import Sealing

Context = Any  # grpc.aio's, which no rpc here needs
ATTEMPTS = 16  # of a change that others keep winning
_MASKED = ("team", "queues")


class Directory(Protocol):
    """Who is known to the fleet now (`trust.view`)."""

    def groups_of(self, name: str) -> frozenset[str]:
        """Ids of the fleet's groups that a person is in."""
        ...

    def is_group(self, group: str) -> bool:
        """Whether it is a group of the fleet, and not of an identity provider."""
        ...

    def is_disabled(self, name: str) -> bool: ...


class SecretServicer(rpc.SecretServiceServicer):
    """See the module."""

    def __init__(self, store: Store, clock: Clock, keys: KeyWrapper, directory: Directory) -> None:
        self._records, self._sealing, self._clock = SecretRecords(store), Sealing(keys), clock
        self._directory = directory

    # people

    async def CreateSecret(self, request: pb.CreateSecretRequest, context: Context) -> pb.Secret:
        ownership.note_asked()
        name, asker = names.secret(names.check_id("secret_id", request.secret_id)), auth.principal()
        _require_scope(asker, request.secret.queues)
        _raise([*_wrong_value(request.value, needed=True), *_wrong_sharing(request.secret, asker, _MASKED)])
        made = _request_key(request.request_id)
        if (before := await self._made_before(name, made, request)) is not None:
            return before
        secret = pb.Secret(
            name=name,
            owner=asker.subject,
            team=request.secret.team,
            queues=sorted(request.secret.queues),
            uid=names.ulid(),
        )
        secret.create_time.FromDatetime(self._clock.now())
        secret.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        self._add_version(secret, request.value)
        key, sealed = await self._sealing.seal(secret, 1, request.value)
        secret.versions[0].key_id = key.key_id
        record = pb.SecretRecord(secret=secret, keys=[key], request_key=made, version_request_key=made)
        return shown(secret, 0) if request.validate_only else await self._records.create(record, sealed)

    async def UpdateSecret(self, request: pb.UpdateSecretRequest, context: Context) -> pb.Secret:
        paths_of(request.update_mask.paths, _MASKED, needed=False)
        _raise(
            [
                *_wrong_value(request.value, needed=False),
                *_wrong_sharing(request.secret, auth.principal(), request.update_mask.paths),
            ]
        )
        if not request.value and not request.update_mask.paths:
            raise InvalidArgument(FieldViolation("value", "is empty, and update_mask too: there is nothing to change"))
        for _ in range(ATTEMPTS):
            entry, record = await self._seen(request.secret.name)
            check_etag(request.secret.etag, entry)
            _require_use(record.secret, request)
            if await self._is_repeated(record, request):
                return shown(record.secret, entry.revision)
            changed, sealed, gone = await self._changed(record, request)
            if request.validate_only:
                return shown(changed.secret, entry.revision)
            try:
                return await self._records.replace(entry, changed, sealed, gone)
            except ConditionFailed:
                continue
        raise Aborted(f"{request.secret.name} keeps changing; try again", retry_after_s=0.5)

    async def GetSecret(self, request: pb.GetSecretRequest, context: Context) -> pb.Secret:
        entry, record = await self._seen(request.name)
        return shown(record.secret, entry.revision)

    async def ListSecrets(self, request: pb.ListSecretsRequest, context: Context) -> pb.ListSecretsResponse:
        ownership.note_asked()
        asker = auth.principal()
        page = await self._records.page(
            page_size(request.page_size), request.page_token, lambda one: rules.may_see(asker, shared(one))
        )
        hidden = () if not asker.is_operator else page.unreadable  # whose they are, nobody can say
        return pb.ListSecretsResponse(secrets=page.items, next_page_token=page.next_page_token, unreadable=hidden)

    async def DeleteSecret(self, request: pb.DeleteSecretRequest, context: Context) -> Empty:
        try:
            entry, record = await self._seen(request.name)
        except FailedPrecondition:  # an operator's: nobody else is told
            await self._records.delete_unreadable(request.name)
            return Empty()
        check_etag(request.etag, entry)
        _require_scope(auth.principal(), record.secret.queues)
        await self._records.delete(entry, record.secret)
        return Empty()

    # tasks

    async def OpenSecrets(self, request: pb.OpenSecretsRequest, context: Context) -> pb.OpenSecretsResponse:
        ownership.note_asked()
        if not request.validate_only and auth.caller().role != roles.SCHEDULER:
            raise PermissionDenied("values are for the scheduler alone, which gives them to the agents of tasks")
        if not 0 < len(request.choices) <= rules.MAX_CHOICES:
            raise InvalidArgument(
                FieldViolation("choices", f"are {len(request.choices)}; use 1 to {rules.MAX_CHOICES}")
            )
        found = [await self._chosen(request, choice) for choice in request.choices]
        problems = [pb.SecretProblem(index=i, message=one) for i, one in enumerate(found) if isinstance(one, str)]
        if problems or request.validate_only:
            return pb.OpenSecretsResponse(problems=problems)
        chosen = [one for one in found if not isinstance(one, str)]
        given = ", ".join(f"{record.secret.name} version {version}" for record, version in chosen)
        audit.note(before=f"for {request.subject}", after=given[:1000])
        return pb.OpenSecretsResponse(opened=[await self._opened(record, version) for record, version in chosen])

    async def RewrapSecrets(
        self, request: pb.RewrapSecretsRequest, context: Context
    ) -> AsyncIterator[pb.RewrapSecretsResponse]:
        listed = await self._records.names()
        progress = pb.RewrapSecretsResponse(total=len(listed))
        yield progress
        for name in listed:
            try:
                key_id = await self._rewrapped(name)
            except FailedPrecondition:
                progress.failed.append(name)
            else:
                progress.rewrapped += bool(key_id)
                progress.key_id = key_id or progress.key_id
            progress.done += 1
            yield progress

    async def problem(self, name: str) -> str:
        """Why the caller may not let a dataset use a secret, which jobs of all queues may read then; "" when that may be."""
        found = await self._records.find(name)
        known = shared(found[1].secret) if found else None
        return rules.why_not(auth.principal(), known, name, "") or (
            ""
            if found and found[1].secret.versions[-1].text
            else f"secret {names.last(name)!r} is no text, which a header could hold"
        )

    async def credentials(self, name: str, owner: str) -> Mapping[str, str]:
        """The parts of a provider's keys, for a lease by an offer that `owner` (role/name) declared; "": to look at and end what was rented.

        Raises FailedPrecondition where its owner may not use the secret any more, ValueError where it is none of several parts.
        """
        if owner and self._directory.is_disabled(names.last(owner)):
            raise FailedPrecondition(f"{owner}, who declared the offer, is disabled")
        found = await self._records.find(name)
        if found is None:
            raise FailedPrecondition(f"{name} is gone")
        asker = rules.of_subject(owner, self._directory.groups_of(names.last(owner))) if owner else None
        if asker and (problem := rules.why_not(asker, shared(found[1].secret), name, "")):
            raise FailedPrecondition(problem)
        opened = await self._opened(found[1], found[1].secret.versions[-1].version)
        return rules.credentials_of(opened.value)

    def _asker(self, request: pb.OpenSecretsRequest) -> auth.Principal:
        """The fleet's groups are those of now; what an identity provider said at login, only the job remembers."""
        said = {names.last(group) for group in request.groups}
        groups = {group for group in said if not self._directory.is_group(group)}
        return rules.of_subject(request.subject, self._directory.groups_of(names.last(request.subject)) | groups)

    async def _chosen(
        self, request: pb.OpenSecretsRequest, choice: pb.SecretChoice
    ) -> tuple[pb.SecretRecord, int] | str:
        """Record and version; or what is wrong, in words."""
        names.split(choice.name, "secrets", field="choices.name")
        if self._directory.is_disabled(names.last(request.subject)):
            return f"{request.subject} is disabled: nothing is given to new attempts of their jobs; an operator enables them again"
        found = await self._records.find(choice.name)
        known = shared(found[1].secret) if found else None
        if problem := rules.why_not(self._asker(request), known, choice.name, request.queue):
            return problem
        assert found is not None
        secret = found[1].secret
        kept = [one.version for one in secret.versions]
        if not (version := rules.version_of(kept, choice.version)):
            return f"secret {names.last(choice.name)!r} has no version {choice.version}; kept are {kept[0]} to {kept[-1]}; leave it out for the newest"
        if choice.as_text and not next(one for one in secret.versions if one.version == version).text:
            return f"secret {names.last(choice.name)!r} is no text that a variable can hold; take it as a file: {{name: {names.last(choice.name)}, file: NAME}}"
        return found[1], version

    async def _opened(self, record: pb.SecretRecord, version: int) -> pb.OpenedSecret:
        key = _key_of(record, version)
        value = await self._sealing.open(record.secret, key, await self._records.value(record.secret.name, version))
        return pb.OpenedSecret(name=record.secret.name, version=version, value=value)

    async def _rewrapped(self, name: str) -> str:
        """The id of the key that wraps it now; "" where nothing had to be done, or it is gone."""
        for _ in range(ATTEMPTS):
            found = await self._records.find(name)
            if found is None or await self._all_newest(found[1]):
                return ""
            entry, record = found
            await self._rewrap(record, record.secret)
            try:
                await self._records.replace(entry, record)
            except ConditionFailed:
                continue
            return record.keys[-1].key_id
        raise Aborted(f"{name} keeps changing; try again", retry_after_s=0.5)

    async def _all_newest(self, record: pb.SecretRecord) -> bool:
        return all([await self._sealing.is_newest(key.key_id) for key in record.keys])

    async def _rewrap(self, record: pb.SecretRecord, shown_as: pb.Secret) -> None:
        """Wraps all keys of a record anew, for the secret as it is `shown_as`."""
        wrapped = [await self._sealing.rewrap(record.secret, key, shown_as) for key in record.keys]
        del record.keys[:]
        record.keys.extend(wrapped)
        for one in record.secret.versions:
            one.key_id = _key_of(record, one.version).key_id

    # changes

    async def _seen(self, name: str) -> tuple[Entry, pb.SecretRecord]:
        """A secret that the caller may see. Raises NotFound for any other."""
        names.split(name, "secrets")
        ownership.note_asked()
        asker = auth.principal()
        try:
            found = await self._records.find(name)
        except FailedPrecondition:
            if asker.is_operator:
                raise
            found = None  # whose it is, nobody can say
        if found is None or not rules.may_see(asker, shared(found[1].secret)):
            raise NotFound("secret", name, "see: whaleflux secrets ls")
        return found

    async def _made_before(self, name: str, made: str, request: pb.CreateSecretRequest) -> pb.Secret | None:
        """What an earlier delivery of the same request stored; None where the name is free. Raises AlreadyExists."""
        try:
            found = await self._records.find(name)
        except FailedPrecondition:  # it is there, whatever it is
            raise taken(name) from None
        if found is None:
            return None
        entry, record = found
        sharing = record.secret.team, list(record.secret.queues)
        if made and record.request_key == made and sharing == (request.secret.team, sorted(request.secret.queues)):
            opened = await self._opened(record, record.secret.versions[0].version)
            if hmac.compare_digest(opened.value, request.value):
                return shown(record.secret, entry.revision)
        raise taken(name)

    async def _is_repeated(self, record: pb.SecretRecord, request: pb.UpdateSecretRequest) -> bool:
        made = _request_key(request.request_id) if request.value else ""
        if not made or record.version_request_key != made:
            return False
        newest = await self._opened(record, record.secret.versions[-1].version)
        return hmac.compare_digest(newest.value, request.value)

    async def _changed(
        self, before: pb.SecretRecord, request: pb.UpdateSecretRequest
    ) -> tuple[pb.SecretRecord, pb.SealedValue | None, list[int]]:
        """The record as it is to be, the value of its new version if there is one, and versions that go for it."""
        record = pb.SecretRecord()
        record.CopyFrom(before)
        target = pb.Secret()
        target.CopyFrom(before.secret)
        for path in request.update_mask.paths:
            if path == "team":
                target.team = request.secret.team
            else:
                target.queues[:] = sorted(request.secret.queues)
        if request.update_mask.paths:
            await self._rewrap(record, target)
            target.versions.clear()
            target.versions.extend(record.secret.versions)
        record.secret.CopyFrom(target)
        record.secret.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), _said(request)))
        audit.note(after=_said(request))
        if not request.value:
            return record, None, []
        record.version_request_key = _request_key(request.request_id)
        sealed = await self._rotated(record, request.value)
        return record, sealed, _drop_oldest(record)

    async def _rotated(self, record: pb.SecretRecord, value: bytes) -> pb.SealedValue:
        version = self._add_version(record.secret, value)
        key, sealed = await self._sealing.seal(record.secret, version.version, value)
        version.key_id = key.key_id
        record.keys.append(key)
        return sealed

    def _add_version(self, secret: pb.Secret, value: bytes) -> pb.SecretVersion:
        last = secret.versions[-1].version if secret.versions else 0
        made = secret.versions.add(
            version=last + 1, creator=changes.actor(), size_bytes=len(value), text=rules.is_text(value)
        )
        made.create_time.FromDatetime(self._clock.now())
        return made


def _require_scope(who: auth.Principal, queues: Iterable[str]) -> None:
    if not rules.may_act_on(who, list(queues)):
        scope = ", ".join(sorted(who.queues or ()))
        raise PermissionDenied(
            f"this token is for {scope} alone: it may touch only secrets that are for that too",
            reason=ErrorReason.NOT_OWNER,
        )


def _require_use(secret: pb.Secret, wanted: pb.UpdateSecretRequest) -> None:
    """Owner and team change a secret; whom it is shared with, its owner alone says; a token opens it to no further queues."""
    asker, paths = auth.principal(), wanted.update_mask.paths
    _require_scope(asker, secret.queues)
    if "queues" in paths:
        _require_scope(asker, wanted.secret.queues)
    if not rules.may_use(asker, shared(secret)):
        raise PermissionDenied(
            f"{secret.name} belongs to {secret.owner}; operators may see and delete it, and nothing else",
            reason=ErrorReason.NOT_OWNER,
            metadata={"name": secret.name, "owner": secret.owner},
        )
    if "team" in paths and not ownership.is_owner(asker, secret.owner):
        raise PermissionDenied(
            f"whom {secret.name} is shared with, only its owner {secret.owner} says", reason=ErrorReason.NOT_OWNER
        )


def _wrong_value(value: bytes, *, needed: bool) -> list[FieldViolation]:
    if needed and not value:
        return [FieldViolation("value", "is empty; give 1 byte to 64 KiB")]
    if len(value) > rules.MAX_VALUE_BYTES:
        return [
            FieldViolation(
                "value",
                f"has {len(value)} bytes, at most {rules.MAX_VALUE_BYTES}; put larger data on storage, and its key here",
            )
        ]
    return []


def _wrong_sharing(secret: pb.Secret, asker: auth.Principal, paths: Iterable[str]) -> list[FieldViolation]:
    """Team and queues as they are given; of a team, whether the caller is in it."""
    wrong: list[FieldViolation] = []
    if "team" in paths and secret.team:
        try:
            (group,) = names.split(secret.team, "groups", field="team")
            if group not in asker.groups:
                wrong.append(
                    FieldViolation(
                        "team",
                        f"you are not in group {group!r}; share with one of yours, or ask an operator to put you into it",
                    )
                )
        except InvalidArgument as bad:
            wrong += bad.violations
    if "queues" in paths:
        if len(secret.queues) > rules.MAX_QUEUES or len(set(secret.queues)) < len(secret.queues):
            wrong.append(
                FieldViolation("queues", f"are {len(secret.queues)}; name at most {rules.MAX_QUEUES}, each once")
            )
        for queue in secret.queues[: rules.MAX_QUEUES]:
            try:
                names.split(queue, "queues", field="queues")
            except InvalidArgument as bad:
                wrong += bad.violations
    return wrong


def _raise(wrong: list[FieldViolation]) -> None:
    if wrong:
        raise InvalidArgument(wrong)


def _drop_oldest(record: pb.SecretRecord) -> list[int]:
    """Takes versions beyond those that are kept out of a record; returns their numbers."""
    gone = [one.version for one in record.secret.versions[: -rules.VERSIONS_KEPT]]
    del record.secret.versions[: len(gone)]
    kept = [key for key in record.keys if key.version not in gone]
    del record.keys[:]
    record.keys.extend(kept)
    return gone


def _key_of(record: pb.SecretRecord, version: int) -> pb.WrappedKey:
    return next((key for key in record.keys if key.version == version), pb.WrappedKey(version=version))


def _said(request: pb.UpdateSecretRequest) -> str:
    """What was asked for, for people: no value."""
    parts = ["a new version"] if request.value else []
    for path in request.update_mask.paths:
        now = request.secret.team if path == "team" else ", ".join(request.secret.queues)
        parts.append(f"{path}: {now or ('nobody' if path == 'team' else 'all')}")
    return "; ".join(parts)


def _request_key(request_id: str) -> str:
    """The same for each delivery of one request of one caller; "" for requests that cannot be told apart."""
    return hashlib.sha256(f"{changes.actor()}\0{request_id}".encode()).hexdigest() if request_id else ""
