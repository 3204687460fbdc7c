"""What a process shows and believes, and where it keeps that. Without the authority: a client needs no X.509 library."""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument

_Stamp = tuple[tuple[int, int], ...]
_READS = 3  # of a pair that is being replaced while it is read


@dataclass(frozen=True, slots=True)
class Tls:
    """What one process shows (nothing, where key and chain are empty) and believes, all PEM."""

    key: bytes
    chain: bytes
    roots: bytes

    def __repr__(self) -> str:
        return "Tls(key=***)"  # a key must not reach a log by way of a traceback


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a process keeps its identity; rewritten in place when it is renewed."""

    key: Path
    chain: Path
    roots: Path

    @classmethod
    def under(cls, folder: Path, name: str) -> TlsFiles:
        return cls(folder / f"{name}.key", folder / f"{name}.crt", folder / "ca.crt")

    def load(self) -> Tls:
        """Reads the three files; `InvalidArgument` names the missing one, and a key that is not the certificate's."""
        for _ in range(_READS):
            tls = Tls(_read("tls_key", self.key), _read("tls_cert", self.chain), _read("tls_ca", self.roots))
            if self._belong_together(tls):  # also false for an instant while the pair is being renewed
                return tls
        raise InvalidArgument(FieldViolation("tls_key", f"{self.key} is not the key of {self.chain}"))

    def _belong_together(self, tls: Tls) -> bool:
        """Whether the files hold a key and its certificate, and still hold what was read."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.chain, self.key, password="")
            return tls.key == self.key.read_bytes() and tls.chain == self.chain.read_bytes()
        except (ssl.SSLError, OSError):
            return False

    def save(self, tls: Tls) -> None:
        """Writes all three, each atomically and readable by the owner alone."""
        write_private(self.roots, tls.roots)
        write_private(self.key, tls.key)
        write_private(self.chain, tls.chain)

    def stamp(self) -> _Stamp:
        """Changes whenever one of the files was replaced; raises OSError when one is gone."""
        return tuple((s.st_mtime_ns, s.st_ino) for s in (os.stat(p) for p in (self.key, self.chain, self.roots)))


class RenewedContext(ssl.SSLContext):
    """A context whose next handshake shows what is in the files by then; with files that cannot be read, what it had.

    Made by `client_context` and `server_context`.
    """

    _files: TlsFiles
    _stamp: _Stamp

    def wrap_bio(self, *arguments: Any, **more: Any) -> ssl.SSLObject:  # asyncio
        self._take_up()
        return super().wrap_bio(*arguments, **more)

    def wrap_socket(self, *arguments: Any, **more: Any) -> ssl.SSLSocket:
        self._take_up()
        return super().wrap_socket(*arguments, **more)

    def read(self, files: TlsFiles) -> None:
        """Takes key, certificate and roots from `files`, and again whenever they are renewed."""
        stamp = files.stamp()
        files.load()  # or it would be left with a certificate whose key it has not
        self.load_cert_chain(files.chain, files.key)
        self.load_verify_locations(files.roots)
        self._files, self._stamp = files, stamp

    def _take_up(self) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, InvalidArgument):
            if self._files.stamp() != self._stamp:
                self.read(self._files)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Shows `files` and checks the server's certificate and the host that is dialled. InvalidArgument names a missing file."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def server_context(files: TlsFiles, *, everybody: bool = False) -> ssl.SSLContext:
    """Shows `files` to those who show a certificate of the same authority; with `everybody` to those who show none too."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)
    context.verify_mode = ssl.CERT_OPTIONAL if everybody else ssl.CERT_REQUIRED
    return context


def _context(protocol: int, files: TlsFiles) -> RenewedContext:
    context = RenewedContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.read(files)
    except OSError:
        files.load()  # says which file
        raise
    return context


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(FieldViolation(field, f"cannot read {path}: {error.strerror}")) from None


def write_private(path: Path, content: bytes) -> None:
    """Replaces `path` atomically and durably; mode 0600 from its first instant."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp creates it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
