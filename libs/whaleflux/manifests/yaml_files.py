"""job.yaml and model.yaml: what users write, checked field by field, as messages of the contract.

Every mistake is found at once and named with its field, its line and what would be right; unknown fields are mistakes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whaleflux import names
from whaleflux.clock import SystemClock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests import arrays, job_checks, model_checks
from whaleflux.manifests.field import name_in_file, read_into
from whaleflux.manifests.job_fields import ATTRIBUTES, NAME, QUEUE, WORKDIR
from whaleflux.manifests.model_fields import MODEL, MODEL_FIELDS
from whaleflux.manifests.overrides import Override, applied
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.yaml_text import load, load_all

if TYPE_CHECKING:
    from whaleflux.v1 import router_pb2, scheduler_pb2

_MOST_SHOWN = 50
MAX_JOBS = 100  # in one file


@dataclass(frozen=True, slots=True)
class JobManifest:
    """A job file: queue, id ("" lets the scheduler make one), spec, and the folder that goes with it.

    `workdir` is the folder's path, "" for none, and None where the file says nothing.
    """

    queue: str
    job_id: str
    spec: scheduler_pb2.JobSpec
    workdir: str | None = None


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A model file. `weights_source`: where the bytes are of which the dataset `model.engine.weights` is made; "" where there is one."""

    model_id: str
    model: router_pb2.Model
    weights_source: str = ""


def job_from_yaml(text: str, base: Path) -> JobManifest:
    """A job file, of an array the first member; relative folders are below `base`. Raises InvalidArgument naming every mistake."""
    return _jobs(load(text), base)[0]


def jobs_from_yaml(text: str, base: Path, overrides: Sequence[Override] = ()) -> list[JobManifest]:
    """The jobs of a file, which `---` divides, with what a command line changes of each. Raises InvalidArgument."""
    try:
        return _all_jobs(text, base, overrides)
    except InvalidArgument:
        from whaleflux.manifests.importing.formats import of_another_system

        if not (system := of_another_system(text)):
            raise
        advice = f"is no job file, but looks like one of {system}; make a job file of it with: whaleflux import FILE"
        raise InvalidArgument(FieldViolation("file", advice)) from None


def _all_jobs(text: str, base: Path, overrides: Sequence[Override]) -> list[JobManifest]:
    documents = load_all(text)
    if len(documents) > MAX_JOBS:
        raise InvalidArgument(FieldViolation("file", f"has {len(documents)} jobs; at most {MAX_JOBS}"))
    found: list[JobManifest] = []
    for number, document in enumerate(documents, 1):
        try:
            found += _jobs(applied(document, overrides), base)
        except InvalidArgument as wrong:
            if len(documents) == 1:
                raise
            named = (FieldViolation(f"job {number}: {v.field}", v.description) for v in wrong.violations)
            raise InvalidArgument(tuple(named)) from None
    return found


def _jobs(content: object, base: Path) -> list[JobManifest]:
    """One job, or the members of an array. Mistakes of the first member are told as the file's own."""
    found = arrays.members(content, base)
    _raise(list(arrays.unknown_marks(content)))
    if not found:
        return [_job(content, base)]
    assert isinstance(content, dict)
    array, jobs = str(content.get(NAME.file)), list[JobManifest]()
    for member in found:
        try:
            job = _job(arrays.content_of(content, member), base)
        except InvalidArgument as wrong:
            if member is found[0]:
                raise
            named = (FieldViolation(f"{array}-{member.index}: {v.field}", v.description) for v in wrong.violations)
            raise InvalidArgument(tuple(named)) from None
        job.spec.array.name, job.spec.array.index = array, member.index
        job.spec.array.size, job.spec.array.max_running = member.size, member.at_once
        jobs.append(job)
    return jobs


def _job(content: object, base: Path) -> JobManifest:
    from whaleflux.v1 import scheduler_pb2

    wrong: list[FieldViolation] = []
    if _declares_a_model(content):
        raise InvalidArgument(FieldViolation("file", "declares a model, not a job; use: whaleflux deploy FILE"))
    file, spec = Reader(content, "", wrong), scheduler_pb2.JobSpec()
    job_id = NAME.value.take(file, NAME.file, base, "")
    queue = QUEUE.value.take(file, QUEUE.file, base, QUEUE.default)
    workdir = WORKDIR.value.take(file, WORKDIR.file, base, None)
    read_into(spec, file, ATTRIBUTES.values(), base)
    if workdir and spec.working_directory:
        wrong.append(FieldViolation("workdir", "excludes directory: the ranks start in the one or in the other"))
    file.done()
    _raise(wrong or _against_the_contract(spec))
    return JobManifest(queue, job_id, spec, workdir)


def model_from_yaml(text: str, base: Path) -> ModelManifest:
    """A model file; relative folders in it are below `base`. Raises InvalidArgument naming every mistake."""
    from whaleflux.v1 import router_pb2

    wrong: list[FieldViolation] = []
    content = load(text)
    if isinstance(content, dict) and "model" not in content and {"run", "gpus"} <= content.keys():
        raise InvalidArgument(FieldViolation("file", "describes a job, not a model; use: whaleflux submit FILE"))
    file, model = Reader(content, "", wrong), router_pb2.Model()
    model_id = MODEL.value.take(file, MODEL.file, base, "")
    file.require(MODEL.file, MODEL.required)
    read_into(model, file, (field for field in MODEL_FIELDS if field is not MODEL), base)
    file.done()
    _raise(wrong)
    source = _weights_source(model_id, model)
    _raise(model_checks.add_arguments(model.engine) or _against_the_router(model))
    return ModelManifest(model_id, model, source)


def _weights_source(model_id: str, model: router_pb2.Model) -> str:
    """Where the weights are, if the file says that; the model then names the dataset that is made of it, one for each source."""
    source = model.engine.weights
    if not source or source.startswith("datasets/"):
        return ""
    model.engine.weights = names.dataset(
        f"{model_id[:50].rstrip('-')}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    )
    return source


def is_model(text: str) -> bool:
    """Whether a file declares a model rather than a job; raises InvalidArgument where it is no YAML."""
    content = next(iter(load_all(text)), None)
    return _declares_a_model(content)


def _declares_a_model(content: object) -> bool:
    """A job names one, too, and says what runs."""
    return isinstance(content, dict) and "model" in content and not {"run", "image"} & content.keys()


def _against_the_contract(spec: scheduler_pb2.JobSpec) -> list[FieldViolation]:
    """What the scheduler would refuse, named as in the file."""
    from whaleflux.manifests.job_spec import spec_of

    read = spec_of(spec)
    found = (*job_checks.before_plan(read), *job_checks.too_late(read, SystemClock().now()))
    return [FieldViolation(name_in_file(ATTRIBUTES.values(), one.field), one.description) for one in found]


def _against_the_router(model: router_pb2.Model) -> list[FieldViolation]:
    return [
        FieldViolation(name_in_file(MODEL_FIELDS, one.field), one.description) for one in model_checks.violations(model)
    ]


def _raise(wrong: list[FieldViolation]) -> None:
    if wrong:
        raise InvalidArgument(wrong[:_MOST_SHOWN])
