"""Resource names (AIP-122): build them, take them apart, and say what is wrong with a bad one.

    sites/{site}/nodes/{node}    queues/{queue}/jobs/{job}    queues/{queue}/jobs/{job}/checkpoints/{step}
    models/{model}/replicas/{replica}    datasets/{dataset}

Ids are 1-63 characters of a-z, 0-9 and hyphen, starting with a letter or digit (DNS labels, so that they are also
valid host names, NATS subject tokens and Kubernetes names).
"""

from __future__ import annotations

import os
import re
import time

from whaleflux.errors import FieldViolation, Invalid

ID_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]


def check_id(field: str, value: str) -> str:
    """Returns `value` when it is a valid id, else refuses naming `field`."""
    if ID_PATTERN.fullmatch(value):
        return value
    shown = value if len(value) <= 64 else f"{value[:61]}... ({len(value)} characters)"
    raise Invalid(
        FieldViolation(
            field, f"{shown!r} is not an id: use 1-63 of a-z, 0-9 and '-', starting and ending with a letter or digit"
        )
    )


def join(*pairs: tuple[str, str]) -> str:
    """`join(("sites", "a"), ("nodes", "n1"))` is "sites/a/nodes/n1"; each id is checked."""
    return "/".join(f"{collection}/{check_id(collection.rstrip('s'), item)}" for collection, item in pairs)


def split(name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
    """The ids in `name`, which must consist of exactly these collections in this order."""
    parts = name.split("/")
    if len(parts) != 2 * len(collections) or tuple(parts[::2]) != collections:
        wanted = "/".join(f"{c}/{{{c.rstrip('s')}}}" for c in collections)
        shown = name if len(name) <= 100 else name[:97] + "..."
        raise Invalid(FieldViolation(field, f"{shown!r} does not have the form {wanted}"))
    return tuple(check_id(field, part) for part in parts[1::2])


def node(site: str, node_id: str) -> str:
    """sites/{site}/nodes/{node}."""
    return join(("sites", site), ("nodes", node_id))


def job(queue: str, job_id: str) -> str:
    """queues/{queue}/jobs/{job}."""
    return join(("queues", queue), ("jobs", job_id))


def ulid(now_s: float | None = None) -> str:
    """A ULID in lower case: 26 characters, sortable by time, valid as an id (github.com/ulid/spec)."""
    millis = int((time.time() if now_s is None else now_s) * 1000)
    number = (millis << 80) | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])
