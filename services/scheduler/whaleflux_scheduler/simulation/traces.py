"""Public traces as workloads: Philly's job list, and openb's nodes and pods. Files may be packed with gzip."""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TextIO, cast

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.simulation.estimates import Estimate, estimated, exact
from whaleflux_scheduler.simulation.workload import Submission

MAX_ROWS = 2_000_000
PHILLY = ("timestamp", "duration", "num_gpus", "gpu_time", "cluster")
OPENB_PODS = (
    "name",
    "cpu_milli",
    "memory_mib",
    "num_gpu",
    "gpu_milli",
    "gpu_spec",
    "qos",
    "pod_phase",
    "creation_time",
)


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows of a trace as jobs, in the order of submission; `left_out`: larger than the fleet, or without a run time."""

    rows: tuple[Row, ...]
    left_out: int = 0

    @property
    def gpu_s(self) -> float:
        """GPU-seconds of all of them."""
        return sum(row.gpus * row.run_s for row in self.rows)

    @property
    def span_s(self) -> float:
        """From the first submission to the last."""
        return self.rows[-1].at_s - self.rows[0].at_s if self.rows else 0.0

    def at_load(self, load: float, gpus: int) -> Trace:
        """The same jobs closer together or farther apart: they ask for `load` of that many GPUs while they come."""
        wanted_s = self.gpu_s / (gpus * load)
        stretch = wanted_s / self.span_s if self.span_s else 1.0
        return replace(self, rows=tuple(replace(row, at_s=row.at_s * stretch) for row in self.rows))

    def submissions(self, estimate: Estimate = exact, seed: int = 1) -> Iterator[Submission]:
        """The jobs, with what their users said of their run time."""
        drawn = random.Random(seed)
        for number, row in enumerate(self.rows):
            spec = estimated(_spec(row.gpus), estimate(row.run_s, drawn))
            yield Submission(names.job(row.queue, f"j{number:06}"), spec, row.at_s, row.run_s)


@dataclass(frozen=True, slots=True)
class Row:
    """One job of a trace; `at_s` counts from the first."""

    at_s: float
    run_s: float
    gpus: int
    queue: str


@lru_cache(maxsize=1024)
def _spec(gpus: int) -> Spec:
    return Spec(command=("true",), gpus=gpus)


def read(path: Path, most_gpus: int, *, first: int = MAX_ROWS) -> Trace:
    """The first rows of a trace, by the header that it has. Raises InvalidArgument for one that is not known."""
    try:
        with _opened(path) as lines:
            reader = csv.DictReader(lines)
            header = tuple(reader.fieldnames or ())
            kind = next((kind for kind in _READERS if set(kind) <= set(header)), None)
            if kind is None:
                raise InvalidArgument(FieldViolation("--trace", _unknown(path, header)))
            return _trace(_READERS[kind](reader), most_gpus, first)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgument(FieldViolation("--trace", f"cannot read {path}: {error}")) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(FieldViolation("--trace", f"{path} has a row that cannot be read: {error}")) from None


def _unknown(path: Path, header: tuple[str, ...]) -> str:
    known = "; ".join(",".join(kind) for kind in _READERS)
    return f"{path} begins with {','.join(header)[:200]!r}, which is no trace that is known; its first line must name: {known}"


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")


def _trace(found: Iterator[Row], most_gpus: int, first: int) -> Trace:
    rows: list[Row] = []
    left_out = 0
    for row in found:
        if len(rows) >= MAX_ROWS:
            raise InvalidArgument(FieldViolation("--trace", f"has more than {MAX_ROWS} jobs; cut it"))
        fits = 0 < row.gpus <= most_gpus and 0 < row.run_s < math.inf
        left_out += not fits
        if fits:
            rows.append(row)
    rows.sort(key=lambda row: row.at_s)
    begin_s = rows[0].at_s if rows else 0.0
    return Trace(tuple(replace(row, at_s=row.at_s - begin_s) for row in rows[:first]), left_out)


def _philly(reader: Iterable[dict[str, str]]) -> Iterator[Row]:
    """Virtual clusters are queues."""
    begin = datetime(2017, 1, 1)
    for row in reader:
        at = datetime.fromisoformat(row["timestamp"])
        yield Row((at - begin).total_seconds(), float(row["duration"]), int(row["num_gpus"]), f"vc-{row['cluster']}")


def _openb(reader: Iterable[dict[str, str]]) -> Iterator[Row]:
    """Pods with GPUs; parts of a GPU count as one. Pods without an end are left out."""
    for row in reader:
        gpus, made, gone = int(row["num_gpu"]), float(row["creation_time"]), row.get("deletion_time") or "nan"
        run_s = float(gone) - made
        yield Row(made, 0.0 if math.isnan(run_s) else run_s, gpus, f"qos-{row['qos'].lower()}")


_READERS: dict[tuple[str, ...], Callable[[Iterable[dict[str, str]]], Iterator[Row]]] = {
    PHILLY: _philly,
    OPENB_PODS: _openb,
}


def fleet_gpus(nodes: Iterable[Node]) -> int:
    """GPUs in all."""
    return sum(len(node.gpus) for node in nodes)
