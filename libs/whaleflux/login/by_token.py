"""Programs without files: WHALEFLUX_TOKEN and WHALEFLUX_SERVER are enough for the command line and the SDK.

The certificate is kept in a folder of the user's cache, so that many short commands log in once; where there is none, in one that goes with
the process.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from whaleflux.context import Context
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.login import credential, signing_in

TOKEN, SERVER, CA = "WHALEFLUX_TOKEN", "WHALEFLUX_SERVER", "WHALEFLUX_CA"
INFERENCE_URL = "WHALEFLUX_INFERENCE_URL"
_temporary: dict[str, Path] = {}  # by digest, of this process


def context(environ: Mapping[str, str] | None = None) -> Context:
    """The context that the variables make, logged in where that is due. Raises InvalidArgument for what is missing."""
    variables = os.environ if environ is None else environ
    server, text = _given(variables)
    folder = _folder(variables, server, text)
    if (there := _kept(folder)) is not None:
        return there
    request = signing_in.shown(text)
    assert request is not None
    from whaleflux.login import first_contact

    authority = _authority(text, variables.get(CA, ""))
    door = first_contact.believe(server, authority)
    made, _ = signing_in.log_in(door, folder, request, variables.get(INFERENCE_URL, ""))
    return made


def kept(environ: Mapping[str, str] | None = None) -> Context | None:
    """The login of these variables from before, while it need not be renewed. Asks nobody."""
    variables = os.environ if environ is None else environ
    return _kept(_folder(variables, *_given(variables)))


def _given(variables: Mapping[str, str]) -> tuple[str, str]:
    """The server and the token."""
    server, text = variables.get(SERVER, "").strip(), variables.get(TOKEN, "").strip()
    parsed = credential.parse(text)
    if not server or parsed is None or parsed.kind != credential.TOKEN:
        raise InvalidArgument(
            FieldViolation(
                TOKEN, f"needs a token as whaleflux tokens create shows it, and {SERVER}=host:port beside it"
            )
        )
    return server, text


def _kept(folder: Path) -> Context | None:
    """The login from before, unless it is due; a token logs in anew as easily as it renews."""
    try:
        known = Context.load(folder / signing_in.FILE)
        due = time.time() >= float(known.renew_after)
    except (StatusError, ValueError):
        return None
    return None if due else known


def _authority(text: str, file: str) -> str:
    """The fingerprint in the token; where a CA file is named, its own."""
    parsed = credential.parse(text)
    assert parsed is not None
    if not file:
        return parsed.authority
    try:
        return credential.fingerprint(Path(file).read_bytes())
    except OSError as error:
        raise InvalidArgument(FieldViolation(CA, f"cannot read {file}: {error.strerror}")) from None
    except ValueError:
        raise InvalidArgument(FieldViolation(CA, f"{file} is no PEM certificate")) from None


def _folder(variables: Mapping[str, str], server: str, text: str) -> Path:
    """Of this user alone (0700), by token and server."""
    digest = hashlib.sha256(f"{server}\0{text}".encode()).hexdigest()[:32]
    base = variables.get("XDG_CACHE_HOME") or (f"{home}/.cache" if (home := variables.get("HOME")) else "")
    if base and digest not in _temporary:
        folder = Path(base) / "whaleflux" / "tokens" / digest
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            seen = folder.stat()
            if seen.st_uid == os.getuid() and not seen.st_mode & 0o077 and os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass  # a home that cannot be written to
    if digest not in _temporary:
        _temporary[digest] = Path(tempfile.mkdtemp(prefix="whaleflux-"))
        atexit.register(shutil.rmtree, _temporary[digest], ignore_errors=True)
    return _temporary[digest]
