"""One HTTP request to an OpenID provider: JSON back, within a time and a size, and never led to another address."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whaleflux import hostport
from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux.reasons import ErrorReason

WITHIN_S = 5.0
MOST_BYTES = 256 << 10
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and the JSON object that came with it; {} for any other body."""

    status: int
    content: Mapping[str, Any]


def check_url(field: str, url: str) -> str:
    """The URL itself: https, or http on this machine. Raises InvalidArgument naming `field`."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # a wrong one raises
    except ValueError:
        host, parts = "", urllib.parse.SplitResult("", "", "", "", "")
    secure = parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    if not host or not secure or parts.username is not None or not url.isprintable() or len(url) > 2048:
        raise InvalidArgument(
            FieldViolation(field, f"{url[:200]!r} is no https:// URL (http:// is for this machine alone)")
        )
    return url


def request(
    url: str,
    *,
    form: Mapping[str, str] | None = None,
    within_s: float = WITHIN_S,
    roots_pem: str = "",
) -> Answer:
    """GET, or POST of a form. Any status is an answer; Unavailable when none comes in time, or one that is too large or elsewhere.

    `roots_pem`: the authority that vouches for the server; "": those that this machine believes.
    """
    check_url("url", url)
    deadline = time.monotonic() + within_s
    body = urllib.parse.urlencode(form).encode() if form is not None else None
    asked = urllib.request.Request(url, body, {"Accept": "application/json"})  # noqa: S310 - the scheme was checked
    try:
        with _opener(roots_pem).open(asked, timeout=within_s) as response:
            return _read(response.status, response, deadline, url)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                raise _unavailable(url, f"leads elsewhere ({error.code})") from None
            return _read(error.code, error, deadline, url)
    except (OSError, ValueError) as error:
        raise _unavailable(url, str(getattr(error, "reason", error))) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(roots_pem: str) -> urllib.request.OpenerDirector:
    trust = ssl.create_default_context(cadata=roots_pem or None)
    return urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=trust))


def _read(status: int, response: Any, deadline: float, url: str) -> Answer:
    found = bytearray()
    while chunk := response.read1(16 << 10):
        found += chunk
        if len(found) > MOST_BYTES:
            raise _unavailable(url, f"answers with more than {MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _unavailable(url, "answers too slowly")
    try:
        content = json.loads(found)
    except ValueError:
        content = {}
    return Answer(status, content if isinstance(content, dict) else {})


def _unavailable(url: str, why: str) -> Unavailable:
    host = hostport_of(url)
    return Unavailable(f"the OpenID provider at {host} {_as_words(why)}", reason=ErrorReason.PROVIDER_UNREACHABLE)


def hostport_of(url: str) -> str:
    """host[:port] of a URL, without a path that may be secret."""
    parts = urllib.parse.urlsplit(url)
    return hostport.join(parts.hostname or "", parts.port) if parts.port else (parts.hostname or "")


def _as_words(why: str) -> str:
    return why if why.startswith(("answers", "leads")) else f"does not answer: {why}"
