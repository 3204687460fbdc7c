"""Jobs on their way from files into the fleet: read all, plan all, ask once, then send one after the other.

Nothing is changed before every job was found right, by its file and by the scheduler.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whaleflux import names
from whaleflux.cli import output, workdir
from whaleflux.cli.files import read
from whaleflux.cli.workdir import Parcel

if TYPE_CHECKING:
    from whaleflux.manifests.overrides import Override
    from whaleflux.manifests.yaml_files import JobManifest
    from whaleflux.v1 import scheduler_pb2


@dataclass(slots=True)
class Submission:
    """One job of a command."""

    file: str
    base: Path
    manifest: JobManifest
    request: scheduler_pb2.CreateJobRequest
    parcel: Parcel | None = None
    planned: Any = None
    replaced: Any = None  # the job whose place it takes
    kept: Any = None  # the unfinished job that is there already as this one would be: it stays
    cancelled: bool = False  # that job, by this command

    @property
    def name(self) -> str:
        """Its full name; "" where one is made."""
        return names.job(names.last(self.request.parent), self.request.job_id) if self.request.job_id else ""

    @property
    def title(self) -> str:
        """How it is called before it has a name."""
        return self.name or f"a job of {self.file}"


def overrides_of(sets: Sequence[str], name: str | None, gpus: int | None, env: Sequence[str]) -> list[Override]:
    """What the options change of each file, in the order: --set, --env, then --name and --gpus."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests.overrides import Override, from_env, from_set

    if name == "":
        raise InvalidArgument(FieldViolation("--name", "is empty; give a name, or leave the option out"))
    found = [*map(from_set, sets), *(from_env(one, os.environ) for one in env)]
    if name is not None:
        found.append(Override("--name", ("name",), name))
    if gpus is not None:
        found.append(Override("--gpus", ("gpus",), gpus))
    return found


def read_all(
    files: Sequence[str], overrides: Sequence[Override], *, wait_for_capacity: bool = False
) -> list[Submission]:
    """The jobs of all files. Raises InvalidArgument with every mistake of every file."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests.dependency_order import in_order
    from whaleflux.manifests.yaml_files import jobs_from_yaml

    found: list[Submission] = []
    wrong: list[FieldViolation] = []
    for file in dict.fromkeys(files):
        try:
            text, base = read(file)
            found += [_of(m, file, base, wait_for_capacity) for m in jobs_from_yaml(text, base, overrides)]
        except InvalidArgument as mistakes:
            at = f"{file}: " if len(files) > 1 else ""
            wrong += [FieldViolation(at + v.field, v.description) for v in mistakes.violations]
    named = [one.name for one in found if one.name]
    wrong += [
        FieldViolation("name", f"{names.last(name)!r} is given to {named.count(name)} jobs; each needs its own")
        for name in dict.fromkeys(named)
        if named.count(name) > 1
    ]
    if wrong:
        raise InvalidArgument(wrong)
    return in_order(found, _called, _needs)


def _called(one: Submission) -> list[str]:
    """Its name, and that of its array."""
    queue, array = names.last(one.request.parent), one.request.job.spec.array.name
    return [name for name in (one.name, names.job(queue, array) if array else "") if name]


def _needs(one: Submission) -> list[str]:
    """The jobs that it depends on."""
    queue = names.last(one.request.parent)
    return [names.job_of_reference(asked.job, queue) for asked in one.request.job.spec.depends_on]


def _of(manifest: JobManifest, file: str, base: Path, wait_for_capacity: bool) -> Submission:
    from whaleflux.v1 import scheduler_pb2

    request = scheduler_pb2.CreateJobRequest(
        parent=names.queue(manifest.queue),
        job_id=manifest.job_id,
        job=scheduler_pb2.Job(spec=manifest.spec),
        request_id=names.ulid(),
        wait_for_capacity=wait_for_capacity,
    )
    return Submission(file, base, manifest, request)


def refuse_taken(client: Any, jobs: Sequence[Submission], *, dry_run: bool) -> None:
    """Before anybody reads a plan: raises AlreadyExists where names are taken; a dry run says so and goes on.

    Members of arrays that are there already are no mistake: the same command again submits the rest.
    """
    from whaleflux.errors import AlreadyExists

    named = [one.name for one in jobs if one.name and not one.request.job.spec.array.name]
    taken = [name for name in named if job_there(client, name) is not None]
    if not taken:
        return
    also = f"so do {', '.join(taken[1:4])}{' and more' * (len(taken) > 4)}; " if len(taken) > 1 else ""
    refused = AlreadyExists(
        "job", taken[0], f"{also}take its place with: whaleflux submit --replace, or choose another name with --name"
    )
    if not dry_run:
        raise refused
    output.note(refused.message)


def plan_all(client: Any, jobs: Sequence[Submission], *, replace: bool) -> None:
    """Packs folders, and asks the scheduler about every job. Raises StatusError, with the job's name where there are several.

    `replace`: also whether the caller may take the place of each job that is there. One that is there as it would be, and has not ended, is kept.
    """
    packed: dict[tuple[Path | None, bool], Parcel | None] = {}
    planned: dict[bytes, Any] = {}
    before: list[str] = []
    for one in jobs:
        folder = workdir.folder_of(one.manifest, one.file, one.base)
        if folder not in packed:
            packed[folder] = workdir.parcel_of(*folder)
        one.parcel = packed[folder]
        one.request.job.spec.code = one.parcel.packed.digest if one.parcel else ""
        if replace:
            one.replaced = job_there(client, one.name)
            one.request.replaces = one.replaced.etag if one.replaced is not None else ""
            if _is_as_asked(one.replaced, one.request.job.spec):
                one.kept, one.replaced, one.request.replaces = one.replaced, None, ""
        alike = _alike(one)
        if alike not in planned:
            one.request.validate_only = True
            one.request.submitted_before[:] = before
            planned[alike] = _told_apart(client, one, several=len(jobs) > 1)
            one.request.validate_only = False
            del one.request.submitted_before[:]
        one.planned = planned[alike]
        before += [one.name] if one.name else []


def _is_as_asked(there: Any, spec: Any) -> bool:
    """Whether a job that is there has not ended, is not about to, and is what the file and its folder ask for."""
    if there is None or there.HasField("end_time") or there.cancel_requested:
        return False
    return same_content(there, spec)


def same_content(there: Any, spec: Any) -> bool:
    """Whether a job that is there is what the file and its folder ask for."""
    stored = type(spec)()
    stored.CopyFrom(there.spec)
    stored.ClearField("secrets_groups")  # which the scheduler notes
    return bool(stored == spec)


def _alike(one: Submission) -> bytes:
    """The same for members of an array that differ only in what the scheduler does not look at: it is asked about one of them.

    Who takes the place of another is asked about by itself: it may be somebody else's.
    """
    array = one.request.job.spec.array
    if not array.name or one.replaced is not None:
        return one.request.request_id.encode()
    shape = type(one.request.job.spec)()
    shape.CopyFrom(one.request.job.spec)
    for field in ("command", "setup", "environment"):
        shape.ClearField(field)
    shape.array.index = 0
    return one.request.parent.encode() + shape.SerializeToString(deterministic=True)


def _told_apart(client: Any, one: Submission, *, several: bool) -> Any:
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        return client.scheduler.CreateJob(one.request, timeout=20)
    except InvalidArgument as wrong:
        if not several:
            raise
        named = tuple(FieldViolation(f"{one.title}: {v.field}", v.description) for v in wrong.violations)
        raise InvalidArgument(named) from None


def job_there(client: Any, name: str) -> Any:
    """The job of that name, or None."""
    from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
    from whaleflux.v1 import scheduler_pb2

    if not name:
        raise InvalidArgument(FieldViolation("--replace", "needs a job with a name: in its file, or with --name"))
    try:
        return client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=20)
    except NotFound:
        return None


def consent(jobs: Sequence[Submission], yes: bool) -> None:
    """Asks about each folder that nobody has named or agreed to yet; jobs whose folder stays here go without it."""
    asked: dict[int, bool] = {}
    for one in jobs:
        if one.parcel is None:
            continue
        key = id(one.parcel)
        if key not in asked:
            asked[key] = workdir.wanted(one.parcel, yes)
        if not asked[key]:
            one.parcel, one.request.job.spec.code = None, ""


def secrets_in_clear(specs: Iterable[Any]) -> str:
    """What to know about variables whose names say that they are secrets; "" where there are none."""
    from whaleflux.manifests.secret_values import advice, look_like_secrets

    found = dict.fromkeys(name for spec in specs for name in look_like_secrets(spec.environment.items()))
    return advice(list(found))


def plans(jobs: Sequence[Submission]) -> list[tuple[Submission, list[Submission]]]:
    """The jobs to show a plan for, each with those that it stands for."""
    found: dict[int, list[Submission]] = {}
    for one in jobs:
        found.setdefault(id(one.planned), []).append(one)
    return [(alike[0], alike) for alike in found.values()]


def title_of(alike: Sequence[Submission]) -> str:
    """What a plan is for."""
    array = alike[0].request.job.spec.array
    if not array.name or len(alike) == 1:
        return alike[0].title
    limit = f", at most {array.max_running} at a time" if array.max_running else ""
    return f"{len(alike)} jobs alike, {alike[0].name} to {names.last(alike[-1].name)}{limit}; each:"


def shown(jobs: Sequence[Submission]) -> list[Any]:
    """The plans for programs."""
    return [output.as_json(one.planned) | ({"workdir": one.parcel.as_json()} if one.parcel else {}) for one in jobs]


def replaces_line(one: Submission) -> list[str]:
    """For the plan: whose place it takes, and what that loses; or that it is there already."""
    if one.kept is not None:
        return [
            f"  replaces   nothing: {one.name} ({was(one.kept)}) is what the file and its folder ask for, and stays"
        ]
    old = one.replaced
    if old is None:
        return []
    ends = "its record goes" if old.HasField("end_time") else "it is cancelled first, and its GPUs are waited for"
    return [f"  replaces   {old.name} ({was(old)}): {ends}"]


def was(job: Any) -> str:
    """RUNNING at step 7."""
    return output.job_state(job) + (f" at step {job.step}" if job.step >= 0 else "")
