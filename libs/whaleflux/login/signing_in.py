"""Logging in, renewing and leaving, and the files that a login is kept in: a key that never leaves this machine, readable by its owner alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from whaleflux.context import Context
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError, Unauthenticated
from whaleflux.login import credential
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import sync
from whaleflux.rpc.tls_files import Tls, TlsFiles, write_private
from whaleflux.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from whaleflux.login.first_contact import FrontDoor

CALL_S = 15.0
RENEW_S = 3.0  # for which a command that has a good certificate waits for the next one
SKEW_S = 300.0  # by which this clock may be late
RENEW_LEFT = 1 / 3  # of a certificate's life, as `pki.RENEW_BELOW`
AGAIN_S = 60.0  # after a renewal that failed while the certificate is good
FILE = "context.json"


def log_in(
    door: FrontDoor, folder: Path, request: identity_pb2.LoginRequest, inference_url: str = ""
) -> tuple[Context, identity_pb2.LoginResponse]:
    """A login by what `request` shows, kept in `folder`. Raises Unauthenticated for what admits nobody."""
    from whaleflux.rpc.pki import new_key_and_request

    key, csr = new_key_and_request()
    request.certificate_request_pem = csr.decode()
    with door.channel() as channel:
        answer = identity_pb2_grpc.IdentityServiceStub(channel).Login(request, timeout=CALL_S)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(
        folder
    ):  # commands of one script log in side by side: no key of the one beside the certificate of the other
        return _kept(folder, door.server, door.name, key, answer, inference_url), answer


def shown(text: str) -> identity_pb2.LoginRequest | None:
    """The request for a code or a token; None for what is neither."""
    parsed = credential.parse(text)
    if parsed is None:
        return None
    if parsed.kind == credential.CODE:
        return identity_pb2.LoginRequest(code=text.strip())
    return identity_pb2.LoginRequest(token=text.strip())


def renewed(context: Context, now_s: float | None = None) -> Context:
    """The context, its certificate renewed when a third of its life is left; of no login: as it is.

    Who cannot renew goes on while the certificate is good. Raises Unauthenticated (SESSION_ENDED) once the login is over.
    """
    now_s = time.time() if now_s is None else now_s
    if not context.renew_after or now_s < float(context.renew_after):
        return context
    folder = Path(context.key).parent
    try:
        with _locked(folder):
            return _renewed(folder, now_s)
    except OSError as error:
        if now_s < float(context.expires or 0) - SKEW_S:
            return context  # its calls tell, if it was ended
        raise InvalidArgument(
            FieldViolation(
                "context",
                f"the login in {folder} cannot be renewed there: {error.strerror}; log in again: whaleflux login",
            )
        ) from None


def _renewed(folder: Path, now_s: float) -> Context:
    current = Context.load(folder / FILE)  # somebody else may have renewed it in this moment
    if now_s < float(current.renew_after or 0):
        return current
    over = now_s >= float(current.expires or 0) - SKEW_S
    try:
        return _return(current, folder) if over else _renewal(current, folder)
    except StatusError as error:
        if over and isinstance(error, Unauthenticated):
            raise _ended(current) from None
        if over or isinstance(error, Unauthenticated):
            raise
        later = replace(current, renew_after=str(int(min(now_s + AGAIN_S, float(current.expires)))))
        _write(folder, later)
        return later


def _return(context: Context, folder: Path) -> Context:
    """A machine that slept longer than its certificate lived shows it once more, without a handshake that would refuse it, and its key."""
    from whaleflux.rpc.pki import request_for

    files = TlsFiles(key=Path(context.key), chain=Path(context.cert), roots=Path(context.ca))
    tls = files.load()
    request = identity_pb2.LoginRequest(
        certificate_pem=tls.chain.decode(), certificate_request_pem=request_for(tls.key).decode()
    )
    with sync.connect(context.server, Tls(b"", b"", tls.roots), server=context.server_name) as channel:
        answer = identity_pb2_grpc.IdentityServiceStub(channel).Login(request, timeout=CALL_S)
    return _kept(folder, context.server, context.server_name, tls.key, answer, context.inference_url)


def _renewal(context: Context, folder: Path) -> Context:
    from whaleflux.rpc.pki import new_key_and_request

    key, csr = new_key_and_request()
    with _channel(context) as channel:
        request = identity_pb2.RenewLoginRequest(certificate_request_pem=csr.decode())
        answer = identity_pb2_grpc.IdentityServiceStub(channel).RenewLogin(request, timeout=RENEW_S)
    return _kept(folder, context.server, context.server_name, key, answer, context.inference_url)


def log_out(context: Context, *, everywhere: bool = False) -> None:
    """Ends the login at the fleet, or all of this person's; the files are `forget`'s business."""
    with _channel(context) as channel:
        identity_pb2_grpc.IdentityServiceStub(channel).Logout(
            identity_pb2.LogoutRequest(everywhere=everywhere), timeout=CALL_S
        )


def is_login(context: Context) -> bool:
    """Whether `log_in` made it."""
    return bool(context.renew_after)


def forget(context: Context) -> None:
    """Removes key and certificate of a login."""
    if is_login(context):
        shutil.rmtree(Path(context.key).parent)


def _kept(
    folder: Path, server: str, name: str, key: bytes, answer: identity_pb2.LoginResponse, inference_url: str
) -> Context:
    files = TlsFiles.under(folder, "client")
    files.save(Tls(key, answer.certificate_pem.encode(), answer.authority_pem.encode()))
    now_s, expires_s = time.time(), answer.certificate_expire_time.seconds
    context = Context(
        server=server,
        ca=str(files.roots),
        cert=str(files.chain),
        key=str(files.key),
        inference_url=inference_url,
        server_name=name,
        renew_after=str(int(expires_s - (expires_s - now_s) * RENEW_LEFT)),
        expires=str(expires_s),
    )
    _write(folder, context)
    return context


def _write(folder: Path, context: Context) -> None:
    write_private(folder / FILE, (json.dumps(asdict(context), indent=2) + "\n").encode())


def _channel(context: Context) -> sync.SyncChannel:
    files = TlsFiles(key=Path(context.key), chain=Path(context.cert), roots=Path(context.ca))
    return sync.connect(context.server, files, server=context.server_name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One program of this user renews at a time."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ended(context: Context) -> Unauthenticated:
    return Unauthenticated(
        f"the login at {context.server} has ended; log in again: whaleflux login --server {context.server}",
        reason=ErrorReason.SESSION_ENDED,
    )
