"""From the contract's JobSpec to `Spec`: every field as the table of job fields says."""

from __future__ import annotations

from functools import lru_cache

from whaleflux.manifests.job_fields import ATTRIBUTES, Spec
from whaleflux.v1 import scheduler_pb2

SMALL_SPEC_BYTES = 4096  # larger ones are not remembered
_READINGS = tuple(field.value.reading(field.path) for field in ATTRIBUTES.values())


def spec_of(message: scheduler_pb2.JobSpec) -> Spec:
    """What a job asks for; unknown kinds count as TRAINING. Specs never change and are read with every state of their job."""
    data = message.SerializeToString()
    return _known_spec(data) if len(data) <= SMALL_SPEC_BYTES else _read_spec(message)


@lru_cache(maxsize=4096)
def _known_spec(data: bytes) -> Spec:
    return _read_spec(scheduler_pb2.JobSpec.FromString(data))


def _read_spec(message: scheduler_pb2.JobSpec) -> Spec:
    return Spec(*[read(message) for read in _READINGS])
