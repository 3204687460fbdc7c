"""Resource names (AIP-122): build them, take them apart, and say what is wrong with a bad one.

    sites/{site}/nodes/{node}    queues/{queue}/jobs/{job}    queues/{queue}/jobs/{job}/checkpoints/{checkpoint}
    models/{model}/replicas/{replica}    datasets/{dataset}    incidents/{incident}    secrets/{secret}
    reservations/{reservation}    offers/{offer}    leases/{lease}    rayClusters/{ray_cluster}

No other module puts names together or takes them apart by itself (a test looks).

Ids are 1-63 characters of a-z, 0-9 and hyphen, starting with a letter or digit (DNS labels, so that they are also
valid host names, NATS subject tokens and Kubernetes names).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache

from whaleflux.errors import FieldViolation, InvalidArgument

DEFAULT_QUEUE = "queues/default"  # always exists; the queue of jobs that name none
ID_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
JOB_REFERENCE = re.compile(
    rf"queues/{ID_PATTERN.pattern}/jobs/{ID_PATTERN.pattern}|({ID_PATTERN.pattern}/)?{ID_PATTERN.pattern}"
)
JOB_IN_TEXT = (
    re.compile(  # the name of a job, or of one of its checkpoints, in a sentence; its queue is the group `queue`
        rf"queues/(?P<queue>{ID_PATTERN.pattern})/jobs/{ID_PATTERN.pattern}(/checkpoints/[a-z0-9-]+)?"
    )
)
RESERVATION_IN_TEXT = re.compile(rf"reservations/{ID_PATTERN.pattern}")  # the same of a reservation
_RAY_JOB = re.compile(r"[a-z0-9-]+-(head|reader|worker)\d+-[0-9a-hjkmnp-tv-z]{8}")
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_LAST_MILLIS = 253_402_300_799_000  # of the year 9999
_ULID = re.compile("[0-7][0-9a-hjkmnp-tv-z]{25}")
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]


def check_id(field: str, value: str) -> str:
    """Returns `value` when it is a valid id, else refuses naming `field`."""
    if ID_PATTERN.fullmatch(value):
        return value
    shown = value if len(value) <= 64 else f"{value[:61]}... ({len(value)} characters)"
    raise InvalidArgument(
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
        raise InvalidArgument(FieldViolation(field, f"{shown!r} does not have the form {wanted}"))
    return tuple(check_id(field, part) for part in parts[1::2])


def site(site_id: str) -> str:
    """sites/{site}."""
    return join(("sites", site_id))


def node(site_id: str, node_id: str) -> str:
    """sites/{site}/nodes/{node}."""
    return join(("sites", site_id), ("nodes", node_id))


def stored_nodes(site_id: str, node_ids: Iterable[str]) -> Iterator[str]:
    """`node` of each; of many ids of a record, which were checked before they were stored."""
    parent = site(site_id)
    return (f"{parent}/nodes/{node_id}" for node_id in node_ids)


@lru_cache(maxsize=4096)  # each submission asks a few times
def queue(queue_id: str) -> str:
    """queues/{queue}."""
    return join(("queues", queue_id))


def reservation(reservation_id: str) -> str:
    """reservations/{reservation}."""
    return join(("reservations", reservation_id))


def ray_cluster(cluster_id: str) -> str:
    """rayClusters/{ray_cluster}."""
    return join(("rayClusters", cluster_id))


def ray_job_id(cluster_id: str, role: str, number: int, uid: str) -> str:
    """The id of a part of a Ray cluster: its number and the end of the cluster's uid make that it never comes again."""
    return f"{cluster_id}-{role}{number}-{uid[-8:]}"


def job(queue_id: str, job_id: str) -> str:
    """queues/{queue}/jobs/{job}."""
    return f"{queue(queue_id)}/jobs/{check_id('job', job_id)}"


def job_of_reference(reference: str, queue_id: str) -> str:
    """The full name of what people call a job: {job} (in `queue_id`), {queue}/{job}, or the full name."""
    if reference.startswith("queues/"):
        return reference
    other, _, job_id = reference.rpartition("/")
    return job(other or queue_id, job_id)


def is_member(name: str) -> bool:
    """Whether `name` says for whom something is: users/{user} or groups/{group}."""
    collection, _, item = name.partition("/")
    return collection in ("users", "groups") and ID_PATTERN.fullmatch(item) is not None


def checkpoint_id(step: int, epoch: int, serial: int) -> str:
    """s{step}-e{epoch}-n{serial}: known to whoever saves without asking, never used twice; ids of one job sort by step."""
    return f"s{step:012d}-e{epoch}-n{serial:06d}"


CHECKPOINT_ID = re.compile(r"s\d{12}-e\d+-n\d{6}")


def checkpoint(job_name: str, step: int, epoch: int, serial: int) -> str:
    """{job}/checkpoints/{checkpoint}."""
    return f"{job_name}/checkpoints/{checkpoint_id(step, epoch, serial)}"


def model(model_id: str) -> str:
    """models/{model}."""
    return join(("models", model_id))


def replica(model_id: str, replica_id: str) -> str:
    """models/{model}/replicas/{replica}."""
    return join(("models", model_id), ("replicas", replica_id))


def user(user_id: str) -> str:
    """users/{user}."""
    return join(("users", user_id))


def group(group_id: str) -> str:
    """groups/{group}."""
    return join(("groups", group_id))


def token(token_id: str) -> str:
    """tokens/{token}: what a program logs in by."""
    return join(("tokens", token_id))


def secret(secret_id: str) -> str:
    """secrets/{secret}; the id may have the collection before it already."""
    return join(("secrets", secret_id.removeprefix("secrets/")))


def dataset(dataset_id: str) -> str:
    """datasets/{dataset}; the id may have the collection before it already."""
    return join(("datasets", dataset_id.removeprefix("datasets/")))


def offer(offer_id: str) -> str:
    """offers/{offer}; the id may have the collection before it already."""
    return join(("offers", offer_id.removeprefix("offers/")))


def lease(lease_id: str) -> str:
    """leases/{lease}; the id may have the collection before it already."""
    return join(("leases", lease_id.removeprefix("leases/")))


def incident(incident_id: str) -> str:
    """incidents/{incident}."""
    return join(("incidents", incident_id))


def collections(name: str) -> tuple[str, ...]:
    """The collections of any name, good or not: ("queues", "jobs") of a job's."""
    return tuple(name.split("/")[::2])


@lru_cache(maxsize=16_384)
def top(name: str) -> str:
    """The first id of a good name: the site of a node, the queue of a job, the model of a replica."""
    return name.split("/", 2)[1]


def last(name: str) -> str:
    """The last id of a good name."""
    return name.rpartition("/")[2]


def ulid(now_s: float | None = None) -> str:
    """A ULID in lower case: 26 characters, sortable by time, valid as an id (github.com/ulid/spec)."""
    millis = int((time.time() if now_s is None else now_s) * 1000)
    number = (millis << 80) | int.from_bytes(os.urandom(10))
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])


def ulid_time(value: str) -> datetime:
    """When a ULID was made, UTC."""
    millis = 0
    for character in value[:10]:
        millis = millis * 32 + _CROCKFORD.index(character)
    return datetime.fromtimestamp(min(millis, _LAST_MILLIS) / 1000, UTC)


def is_made(job_id: str) -> bool:
    """Whether a job's id has a form that only the scheduler makes, of which none comes again."""
    return is_ulid(job_id) or _RAY_JOB.fullmatch(job_id) is not None


def is_ulid(value: str) -> bool:
    """Whether `value` has the form that `ulid` makes."""
    return _ULID.fullmatch(value) is not None
