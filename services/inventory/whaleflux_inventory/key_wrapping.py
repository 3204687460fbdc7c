"""What wraps the keys of secrets: a file of keys, or a command that asks a key management service."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from whaleflux import telemetry
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.telemetry import Event
from whaleflux.trust import key_file
from whaleflux_inventory.core import sealing
from whaleflux_inventory.settings import Settings

_log = telemetry.get_logger("whaleflux.inventory")
_KMS_S = 10.0  # for one question to the command
_KMS_AT_ONCE = 8
_MAX_ANSWER_BYTES = 64 << 10
_MAX_KEY_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A wrapped data key, and which key it was wrapped by."""

    key_id: str
    data: bytes


class KeyWrapper(Protocol):
    """Keys outside of the store. `context` names the secret's version; what was wrapped for one opens for no other.

    Raises Unavailable where trying again helps, FailedPrecondition (SECRETS_KEY_MISSING) where the key is not there,
    sealing.Unsealable where it is no data of the key.
    """

    async def wrap(self, data_key: bytes, context: bytes) -> Wrapped: ...

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes: ...

    async def is_newest(self, key_id: str) -> bool:
        """Whether `wrap` would use this key now; False where nobody can tell."""
        ...


class NoKeys:
    """An inventory that was told of none keeps no secrets."""

    async def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        raise _none()

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        raise _none()

    async def is_newest(self, key_id: str) -> bool:
        raise _none()


class FileKeys:
    """Keys from a file or a folder, read again when it changes. Raises InvalidArgument when made of a bad one.

    One that is not there yet is waited for: everything but secrets works without it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ring = key_file.KeyRing({})
        self._stamp: tuple[tuple[str, int, int], ...] = ()
        if path.exists():
            self._ring, self._stamp = key_file.load(path), key_file.stamp(path)
        else:
            _log.error(Event.SECRETS_KEY_MISSING, path=str(path))

    async def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        ring = self._newest_ring()
        if not ring.keys:
            raise _none(f"there is no file {self._path}")
        data = sealing.wrap(data_key, ring.keys[ring.newest], os.urandom(sealing.NONCE_BYTES), context)
        return Wrapped(ring.newest, data)

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        key = self._newest_ring().keys.get(wrapped.key_id)
        if key is None:
            raise FailedPrecondition(
                f"the key {wrapped.key_id} that wraps this secret is not in the file of keys; put it back, or store the secret anew",
                reason=ErrorReason.SECRETS_KEY_MISSING,
                metadata={"key_id": wrapped.key_id},
            )
        return sealing.unwrap(wrapped.data, key, context)

    async def is_newest(self, key_id: str) -> bool:
        ring = self._newest_ring()
        return bool(ring.keys) and ring.newest == key_id

    def has(self, key_id: str) -> bool:
        """Whether the key is one of the file's."""
        return key_id in self._newest_ring().keys

    def _newest_ring(self) -> key_file.KeyRing:
        """A file that is being replaced, or was damaged, leaves the keys that were read last."""
        with contextlib.suppress(OSError, InvalidArgument):
            if (now := key_file.stamp(self._path)) != self._stamp:
                self._ring, self._stamp = key_file.load(self._path), now
        return self._ring


class FileBehindKms:
    """The command wraps; the file's keys open what they wrapped before, until it is rewrapped."""

    def __init__(self, file: FileKeys, kms: KmsCommand) -> None:
        self._file, self._kms = file, kms

    async def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        return await self._kms.wrap(data_key, context)

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        return await (self._file if self._file.has(wrapped.key_id) else self._kms).unwrap(wrapped, context)

    async def is_newest(self, key_id: str) -> bool:
        return False


class KmsCommand:
    """A program that wraps and unwraps: one JSON object on its stdin, one on its stdout, exit code 0.

        {"operation": "wrap", "plaintext": BASE64, "context": BASE64}                    -> {"key_id": ID, "ciphertext": BASE64}
        {"operation": "unwrap", "key_id": ID, "ciphertext": BASE64, "context": BASE64}   -> {"plaintext": BASE64}

    It has 10 s and no shell; settings of WhaleFlux are not in its environment. What it says on stderr is not kept: it might say what
    it was given.
    """

    def __init__(self, argv: Sequence[str], *, within_s: float = _KMS_S) -> None:
        self._argv, self._within_s = tuple(argv), within_s
        self._slots = asyncio.Semaphore(_KMS_AT_ONCE)

    @classmethod
    def of(cls, command: str) -> KmsCommand:
        """From a setting. Raises InvalidArgument for what is no command line."""
        try:
            argv = shlex.split(command)
        except ValueError as error:
            raise InvalidArgument(FieldViolation("secrets_kms_command", f"is no command line: {error}")) from None
        return cls(argv)

    async def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        answer = await self._ask({"operation": "wrap", "plaintext": _text(data_key), "context": _text(context)})
        key_id = answer.get("key_id")
        if not isinstance(key_id, str) or not key_id or len(key_id) > _MAX_KEY_ID_CHARS:
            raise _kms_failed("answered without a key_id")
        return Wrapped(key_id, _bytes(answer, "ciphertext"))

    async def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        question = {
            "operation": "unwrap",
            "key_id": wrapped.key_id,
            "ciphertext": _text(wrapped.data),
            "context": _text(context),
        }
        return _bytes(await self._ask(question), "plaintext")

    async def is_newest(self, key_id: str) -> bool:
        return False  # only wrapping tells

    async def _ask(self, question: dict[str, str]) -> dict[str, object]:
        async with self._slots:
            try:
                async with asyncio.timeout(self._within_s):
                    output = await _output(self._argv, json.dumps(question).encode())
            except TimeoutError:
                raise _kms_failed(f"did not answer within {self._within_s:g} s") from None
            except OSError as error:
                raise _kms_failed(f"cannot be started: {error.strerror}") from None
        try:
            answer = json.loads(output)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _kms_failed("answered with something else than one JSON object")
        return answer


async def _output(argv: Sequence[str], question: bytes) -> bytes:
    """What a command says; it is killed when this is cancelled, and when it says too much."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WHALEFLUX_")}
    pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    child = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=nowhere, env=environment)
    assert child.stdin is not None and child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it reads what it likes
            child.stdin.write(question)
            await child.stdin.drain()
        child.stdin.close()
        answer = bytearray()
        while chunk := await child.stdout.read(_MAX_ANSWER_BYTES):
            answer += chunk
            if len(answer) > _MAX_ANSWER_BYTES:
                raise _kms_failed(f"answered more than {_MAX_ANSWER_BYTES} bytes")
        if code := await child.wait():
            raise _kms_failed(f"ended with exit code {code}")
        return bytes(answer)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def wrapper_of(settings: Settings) -> KeyWrapper:
    """As the settings say. Raises InvalidArgument for a file of keys that cannot be used."""
    file = FileKeys(settings.secrets_key_file) if settings.secrets_key_file else None
    if not settings.secrets_kms_command:
        return file or NoKeys()
    kms = KmsCommand.of(settings.secrets_kms_command)
    return FileBehindKms(file, kms) if file else kms


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(answer: dict[str, object], name: str) -> bytes:
    try:
        return base64.b64decode(str(answer[name]).encode(), validate=True)
    except (KeyError, binascii.Error):
        raise _kms_failed(f"answered without {name} in base64") from None


def _kms_failed(how: str) -> Unavailable:
    return Unavailable(
        f"the command of secrets_kms_command {how}; run it by hand on inventory's machine to see why",
        reason=ErrorReason.KMS_UNAVAILABLE,
        retry_after_s=2.0,
    )


def _none(why: str = "its inventory has no key to seal them with") -> FailedPrecondition:
    return FailedPrecondition(
        f"this fleet keeps no secrets: {why}; an operator sets secrets_key_file "
        "(made with: python -m whaleflux.bootstrap secrets-key --file FILE) or secrets_kms_command",
        reason=ErrorReason.SECRETS_KEY_MISSING,
    )
