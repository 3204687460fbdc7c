"""How well the scheduler knows how long jobs run: what users say, which is not what they take."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from whaleflux.manifests.job_fields import Spec

Estimate = Callable[[float, random.Random], float | None]
_FIELD = "expected_s"


def exact(run_s: float, drawn: random.Random) -> float | None:
    """What it takes."""
    return run_s


def uniform(run_s: float, drawn: random.Random) -> float | None:
    """One to five times as long, as users of batch systems ask for."""
    return run_s * drawn.uniform(1.0, 5.0)


def lognormal(run_s: float, drawn: random.Random) -> float | None:
    """Off by a factor of e either way, half of them too short."""
    return run_s * drawn.lognormvariate(0.0, 1.0)


def wrong(run_s: float, drawn: random.Random) -> float | None:
    """Two to ten times too long, or too short."""
    factor: float = 10.0 ** drawn.uniform(math.log10(2.0), 1.0)
    return run_s * factor if drawn.random() < 0.5 else run_s / factor


def none(run_s: float, drawn: random.Random) -> float | None:
    """Nobody says anything."""
    return None


ESTIMATES: dict[str, Estimate] = {
    "exact": exact,
    "uniform": uniform,
    "lognormal": lognormal,
    "wrong": wrong,
    "none": none,
}
_KNOWN = _FIELD in {field.name for field in dataclasses.fields(Spec)}


def estimated(spec: Spec, run_s: float | None) -> Spec:
    """The spec of a job of which its user says that it takes so long; a spec that says it itself stays."""
    if not _KNOWN or run_s is None or getattr(spec, _FIELD):
        return spec
    said: dict[str, Any] = {_FIELD: run_s}
    return replace(spec, **said)
