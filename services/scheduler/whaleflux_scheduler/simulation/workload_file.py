"""A workload file: jobs one by one, or drawn by a seed; how well their run times are known. See docs/guide/simulate.md."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.job_fields import Spec
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.reader import Fields, Reader, kind_of
from whaleflux.manifests.values import Choice
from whaleflux.manifests.yaml_files import jobs_from_yaml
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.simulation.cluster_file import a_list, a_whole, queues_of
from whaleflux_scheduler.simulation.estimates import ESTIMATES, Estimate, estimated, exact
from whaleflux_scheduler.simulation.workload import Submission

MAX_JOBS, MAX_GPUS = 2_000_000, 100_000
_HERE = Path()
Draw = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class Jobs:
    """What a workload file describes; `submissions` draws the same each time."""

    sources: tuple[Source, ...]
    queues: dict[str, Queue]
    seed: int = 1
    estimate: Estimate = exact

    def submissions(self) -> Iterator[Submission]:
        """In the order of submission."""
        streams = [source.submissions(f"{self.seed}/{at}") for at, source in enumerate(self.sources)]
        drawn = random.Random(f"{self.seed}/estimates")
        for job in heapq.merge(*streams, key=lambda job: job.at_s):
            yield replace(job, spec=estimated(job.spec, self.estimate(job.run_s, drawn)))


@dataclass(frozen=True, slots=True)
class Source:
    """Alike jobs: how many, when, of what size and length."""

    name: str
    queue: str
    spec: Spec
    count: int
    first_s: float
    gap: Draw
    gpus: Draw | None
    takes: Draw

    def submissions(self, seed: str) -> Iterator[Submission]:
        drawn, at_s = random.Random(seed), self.first_s
        specs: dict[int, Spec] = {self.spec.gpus: self.spec}
        for number in range(self.count):
            gpus = self.gpus(drawn) if self.gpus else self.spec.gpus
            spec = specs.get(gpus) or specs.setdefault(gpus, replace(self.spec, gpus=gpus))
            job = names.job(self.queue, self.name if self.count == 1 else f"{self.name}-{number}")
            yield Submission(job, spec, at_s, self.takes(drawn))
            at_s += self.gap(drawn)


def jobs_of(content: object, base: Path) -> Jobs:
    """The content of a workload file; job files that it names are below `base`. Raises InvalidArgument naming every mistake."""
    wrong: list[FieldViolation] = []
    file = Reader(content, "", wrong)
    file.require("jobs", "list jobs: [{name: a, gpus: 8, takes: 2 h}]")
    sources = [_source(one, base) for one in file.items("jobs", a_list(10_000, "kinds of jobs"))]
    seed = file.take("seed", a_whole(0, 2**31), 1)
    estimate = file.take("estimates", lambda value: Choice(ESTIMATES).parse(value, _HERE), exact)
    queues = queues_of(file)
    file.done()
    found = [source for source in sources if source is not None]
    if sum(source.count for source in found) > MAX_JOBS:
        file.note("jobs", f"makes {sum(s.count for s in found)} jobs; at most {MAX_JOBS} are simulated, lower `count`")
    if len({(source.queue, source.name) for source in found}) < len(found):
        file.note("jobs", "has two of one queue and name; give each `name` of its own")
    if wrong:
        raise InvalidArgument(wrong[:50])
    return Jobs(tuple(found), queues, seed, estimate)


def _source(reader: Reader, base: Path) -> Source | None:
    for field, hint in (
        ("name", "name them"),
        ("takes", "say how long each runs: 2 h, or {median: 10 min, sigma: 1.5}"),
    ):
        reader.require(field, hint)
    name = reader.take("name", lambda value: names.check_id("name", str(value)), "")
    queue = reader.take("queue", lambda value: names.check_id("queue", str(value)), "")
    file = reader.take("job", lambda value: _job_file(value, base), None)
    inline = _inline(reader, base)
    gpus = reader.take("gpus", _sizes, None)
    count = reader.take("count", a_whole(1, MAX_JOBS), 1)
    first_s = reader.take("at", quantities.seconds, 0.0)
    gap = reader.take("every", _gap, None)
    takes = reader.take("takes", _length, None)
    reader.done()
    if file is None and not reader.has("gpus") and "gpus" not in (reader.raw("spec") or {}):
        reader.note("gpus", "is missing; say how many GPUs each takes, or name a job file with `job`")
    if not name or takes is None or (file is None and inline is None):
        return None
    spec, its_queue = file or (inline, "default")
    assert spec is not None
    return Source(name, queue or its_queue, spec, count, first_s, gap or _always(0.0), gpus, takes)


def _inline(reader: Reader, base: Path) -> Spec | None:
    """The spec that fields of a job file below `spec`, and `priority`, make."""
    given = reader.raw("spec") or {}
    if not isinstance(given, dict):
        reader.note("spec", f"must be fields of a job file, not {kind_of(given)}")
        return None
    priority = reader.take("priority", a_whole(0, 1000), None)
    gpus = reader.raw("gpus")
    content = Fields({"run": "true", "gpus": gpus if isinstance(gpus, int) else 1, **given})
    if priority is not None:
        content["priority"] = priority
    content.lines, content.written = {}, {}
    try:
        return spec_from(content, base)
    except InvalidArgument as wrong:
        for violation in wrong.violations:
            reader.note("spec", f"{violation.field} {violation.description}")
    return None


def spec_from(content: Fields, base: Path) -> Spec:
    """The spec of a job file's fields. Raises InvalidArgument."""
    import json

    return spec_of(jobs_from_yaml(json.dumps(content), base)[0].spec)


def _job_file(value: object, base: Path) -> tuple[Spec, str]:
    path = base / str(value)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; name a job file beside this one") from None
    found = jobs_from_yaml(text, path.parent)[0]
    return spec_of(found.spec), found.queue


def _sizes(value: object) -> Draw:
    """A number of GPUs, or weights by number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_GPUS:
        return _always(int(value))
    if not isinstance(value, dict) or not value or len(value) > 100:
        raise ValueError("must be a number of GPUs, or weights by number: {1: 0.7, 8: 0.3}")
    sizes, weights = [], []
    for size, weight in value.items():
        written = str(size)
        whole = written.isascii() and written.isdecimal() and len(written) < 10 and int(written) <= MAX_GPUS
        if not whole or not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight <= 1e9:
            raise ValueError(f"{size}: {weight} must be a number of GPUs, 0 to {MAX_GPUS}, and a weight above 0")
        sizes.append(int(size))
        weights.append(float(weight))
    return lambda drawn: drawn.choices(sizes, weights)[0]


def _gap(value: object) -> Draw:
    """Seconds between two: the same, or drawn so that they come at random with that mean."""
    if isinstance(value, dict):
        if set(value) != {"random"}:
            raise ValueError("must be a time, or {random: time} for arrivals at random with that mean")
        mean_s = quantities.seconds(value["random"])
        return lambda drawn: drawn.expovariate(1 / mean_s) if mean_s else 0.0
    apart_s = quantities.seconds(value)
    return _always(apart_s)


def _always(value: float) -> Draw:
    return lambda _: value


def _length(value: object) -> Draw:
    """Seconds: given, log-normal, or uniform; at least one."""
    if not isinstance(value, dict):
        run_s = quantities.seconds(value)
        return _always(max(1.0, run_s))
    if set(value) == {"median", "sigma"}:
        mu, sigma = math.log(max(1.0, quantities.seconds(value["median"]))), _sigma(value["sigma"])
        return lambda drawn: max(1.0, round(drawn.lognormvariate(mu, sigma)))
    if set(value) == {"least", "most"}:
        least_s, most_s = quantities.seconds(value["least"]), quantities.seconds(value["most"])
        if most_s < least_s:
            raise ValueError("most is less than least; swap them")
        return lambda drawn: max(1.0, round(drawn.uniform(least_s, most_s)))
    raise ValueError("must be a time, {median: 10 min, sigma: 1.5} (log-normal), or {least: 1 min, most: 2 h}")


def _sigma(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 5:
        raise ValueError("sigma must be 0 to 5")
    return float(value)
