"""Where the original of a dataset may be."""

from __future__ import annotations

from urllib.parse import urlsplit

BY_FSSPEC = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""Schemes that fsspec reads, and the package of Python that each needs on the node."""
WANTED = "is nothing that agents can read; use an absolute path, file://, http(s)://, s3://, gs:// or hf://"

PASSWORD_INSIDE = (
    "has a user or password in it, which every list of datasets would show; keep it as a secret (whaleflux secrets add NAME) and name "
    "that beside the URL without it: whaleflux datasets add ... --secret NAME, with --basic for user:password"
)


def has_credentials(uri: str) -> bool:
    """Whether a URL carries a user or a password (https://user:pw@host), which belongs in no record and no log."""
    try:
        return "@" in urlsplit(uri).netloc
    except ValueError:
        return False


def may_be_shown_credentials(uri: str) -> bool:
    """Whether a secret may go there: over TLS, or within the machine that asks."""
    try:
        url = urlsplit(uri)
    except ValueError:
        return False
    return url.scheme == "https" or (url.scheme == "http" and url.hostname in ("localhost", "127.0.0.1", "::1"))


def path_of(uri: str) -> str:
    """The absolute path that a URI names; "" for one that names none."""
    url = urlsplit(uri)
    return url.path if url.scheme in ("", "file") and not url.netloc and url.path.startswith("/") else ""


def readable_by_agents(uri: str) -> bool:
    """Whether agents know how to copy from there: an absolute path, or a URL with a host or a bucket."""
    try:
        url = urlsplit(uri)
    except ValueError:
        return False
    if url.scheme in ("http", "https", *BY_FSSPEC):
        return bool(url.netloc)
    return bool(path_of(uri))
