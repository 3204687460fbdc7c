"""What a job may ask for. Every error names the field, its limit and the way out.

What a job's fields may hold and say of one another stands in `whaleflux.manifests`, where files are checked by it, too.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests import job_checks
from whaleflux.manifests.job_fields import Spec

MAX_SPEC_BYTES = 256 * 1024
SMALL_BYTES = 4096  # what was found in larger specs is not remembered


def check_spec(spec: Spec, size_bytes: int, now: datetime, at: str = "job.spec") -> None:
    """Raises InvalidArgument with every violation found. `size_bytes` is the spec's encoded size."""
    if size_bytes > MAX_SPEC_BYTES:
        too_large = f"{size_bytes} bytes; at most {MAX_SPEC_BYTES}: put files into the image or a dataset"
        raise InvalidArgument(FieldViolation(at, too_large))
    known = _known if size_bytes <= SMALL_BYTES else job_checks.violations
    if found := (*known(spec), *job_checks.too_late(spec, now)):
        raise InvalidArgument([FieldViolation(f"{at}.{one.field}", one.description) for one in found])


_known = lru_cache(maxsize=1024)(job_checks.violations)  # the same job is submitted again and again
