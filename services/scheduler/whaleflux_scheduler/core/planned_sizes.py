"""The numbers of GPUs that a planned elastic job can go on with: those with a plan, in splits that its checkpoint can be read in. Pure.

A plan takes about 60 ms, so a job has a bounded number of sizes. What is submitted counts as planned already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

from whaleflux import names
from whaleflux.manifests.job_fields import Spec
from whaleflux.planning.offers import Offer
from whaleflux.planning.replan import Replan, replanned
from whaleflux.planning.wish import VARIABLE, Kept, Wish, plain_mesh, wish_in
from whaleflux_scheduler.core.elastic import SizedSpec, SizePlan, sizes
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.model import Attempt, AttemptSplit, Job

PLANNED_ANEW, SIZES = "planned anew for ", "it can go on with "  # how reasons begin that tell of a split
MOST_PLANS, MOST_TYPES = 24, 8  # of a job at once: up to two seconds
ANY_SPLIT, SAME_SPLIT, SAME_RANKS, UNKNOWN = "ANY_SPLIT", "SAME_SPLIT", "SAME_RANKS", "UNSPECIFIED"  # as the contract
OfferOf = Callable[[str], Offer | None]
"""Of a GPU type, as it counts for plans; None: nobody knows how fast it is."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The checkpoint that a job would go on from; `name` "": none was committed. `resharding`: who can read it."""

    name: str = ""
    epoch: int = 0
    ranks: int = 0
    resharding: str = UNKNOWN


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a plan may be: of any split, or of tensor, pipeline and context parallelism that `keep` says; `ranks`: of so many only, 0: any.

    `writer`: how the attempt was split that wrote the checkpoint.
    """

    keep: Kept | None
    why: str
    ranks: int = 0
    writer: AttemptSplit | None = None


def may_keep_its_own(job: Job) -> bool:
    """Whether its program may have saved what nobody recorded: it resumes by itself, or ran without a step of the SDK's `Checkpointer`."""
    ran = any(attempt.run_time is not None for attempt in job.attempts())
    return job.spec.elastic_resumes or (ran and job.step < 0)


def wish_of(spec: Spec) -> Wish | None:
    """Of a job that is planned anew for each number of GPUs: an elastic one that was planned when it was submitted, and whose ranks read the plan."""
    return wish_in(spec.environment) if spec.is_elastic and spec.train_model else None


def allowance(job: Job, wish: Wish, saved: Saved | None) -> Allowance:
    """`saved` None: nobody knows what its checkpoint is, or its program keeps its own."""
    if saved is None:
        last = next((one.split for one in reversed(tuple(job.attempts())) if one.split is not None), None)
        return _kept(wish, last, "it is not known who can read what it saved")
    if not saved.name:
        return Allowance(None, "nothing was saved yet") if wish.whole else _kept(wish, None, _SETTLED)
    writer, which = _writer(job, saved.epoch), names.last(saved.name)
    if saved.resharding == SAME_RANKS:
        return replace(
            _kept(wish, writer, f"only {saved.ranks} ranks can read its checkpoint {which}"), ranks=saved.ranks
        )
    if saved.resharding == SAME_SPLIT:
        return _kept(wish, writer, f"its checkpoint {which} is of the stages of a pipeline")
    if saved.resharding != ANY_SPLIT:
        return _kept(wish, writer, f"it is not known who can read its checkpoint {which}")
    if not wish.whole:
        return _kept(wish, writer, _SETTLED)
    return Allowance(None, f"any split can read its checkpoint {which}")


_SETTLED = "the job's file settles its split"


def _kept(wish: Wish, writer: AttemptSplit | None, why: str) -> Allowance:
    keep = writer.kept if writer is not None else wish.kept
    said = ", ".join(
        f"{kind} {size}" for kind, size in zip(("tensor", "pipeline", "context"), keep[:3], strict=True) if size > 1
    )
    return Allowance(keep, f"{why}, so {said} parallelism stays" if said else why, writer=writer)


def _writer(job: Job, epoch: int) -> AttemptSplit | None:
    return next((one.split for one in job.attempts() if one.epoch == epoch), None)


def plans_of(spec: Spec, wish: Wish, allowed: Allowance, offer_of: OfferOf) -> tuple[SizePlan, ...]:
    """Of each size and GPU type that it may have, the smallest first; sizes that are no faster than a smaller one are left out.

    A size has plans on all types, so that a type that shares none with those before it is left out whole.
    """
    offers = [offer for model in spec.any_of or (wish.gpu,) if (offer := offer_of(model)) is not None][:MOST_TYPES]
    found, known = list[SizePlan](), set[int]()
    for offer in offers:
        plans = _of_type(spec, wish, allowed, offer, MOST_PLANS // len(offers))
        there = {one.gpus for one in plans}
        if shared := there & known if found else there:
            found, known = [*found, *plans], shared
    return tuple(one for one in found if one.gpus in known)


def _of_type(spec: Spec, wish: Wish, allowed: Allowance, offer: Offer, most: int) -> list[SizePlan]:
    found: list[SizePlan] = []
    model = offer.gpu.name
    for gpus in _candidates(spec, allowed, most):
        new = replanned(wish, gpus, offer, allowed.keep)
        known = _known(spec, wish, allowed, gpus, model)
        if (split := known or (split_of(new) if new else None)) is None:
            continue
        speed = new.tokens_per_s if new else 0.0
        if known is not None or not found or speed > found[-1].tokens_per_s:
            found.append(SizePlan(gpus, model, split, speed))
    return found


def _known(spec: Spec, wish: Wish, allowed: Allowance, gpus: int, model: str) -> AttemptSplit | None:
    """The plan that wrote the checkpoint, or the first one, where it is of as many GPUs and may be used."""
    writer, first = allowed.writer, submitted(spec, wish)
    if writer is not None and allowed.keep is not None and _ranks(writer) == gpus:
        return writer
    may = allowed.keep in (None, first.kept)
    return first if may and (gpus, model) == (_ranks(first), wish.gpu) else None


def _ranks(split: AttemptSplit) -> int:
    return split.tensor * split.pipeline * split.context * split.data


def _candidates(spec: Spec, allowed: Allowance, most: int) -> list[int]:
    """Sizes that may have a plan; of many those with the least, the most and as it was submitted, and others evenly between."""
    if allowed.ranks:
        return [allowed.ranks]
    copy = 1
    for size in allowed.keep[:3] if allowed.keep else ():
        copy *= size
    able = [gpus for gpus in sizes(spec) if gpus % copy == 0]
    if len(able) <= most:
        return able
    picked = {able[at * (len(able) - 1) // (most - 2)] for at in range(most - 1)}
    return sorted(picked | ({spec.gpus} & set(able)))


def split_of(new: Replan) -> AttemptSplit:
    split = new.split
    return AttemptSplit(
        split.tp, split.pp, split.cp, split.dp, split.micro_batch, split.words(), new.mesh,
        virtual_stages=split.vp, first_layers=split.first_layers, last_layers=split.last_layers,
    )  # fmt: skip


def submitted(spec: Spec, wish: Wish) -> AttemptSplit:
    """The first plan, as the job brought it."""
    mesh = plain_mesh(next(text for name, text in spec.environment if name == VARIABLE))
    axes = mesh.get("mesh", {})
    data = int(axes.get("dp_replicate", 1)) * int(axes.get("dp_shard", 1))
    named = (("tp", wish.tp), ("pp", wish.pp), ("cp", wish.cp), ("dp", data))
    words = ", ".join(f"{name} {size}" for name, size in named if size > 1) or "one GPU"
    return AttemptSplit(
        wish.tp, wish.pp, wish.cp, data, int(mesh.get("micro_batch", 1)), words, json.dumps(mesh),
        virtual_stages=wish.vp, first_layers=wish.first_layers, last_layers=wish.last_layers,
    )  # fmt: skip


def with_plans(spec: Spec, plans: Iterable[SizePlan], why: str, as_it_is: int) -> SizedSpec:
    """With these sizes, on the types that they are planned for; without any plan the one that it has or was planned for, `as_it_is`."""
    known, wish = tuple(plans), wish_of(spec)
    only = tuple(sorted({one.gpus for one in known})) or (as_it_is,)
    whole = {one.name: getattr(spec, one.name) for one in fields(Spec)}
    types = tuple(dict.fromkeys(one.model for one in known)) or spec.any_of
    return SizedSpec(
        **whole | {"any_of": types}, only_sizes=only, plans=known, why=why,
        first=submitted(spec, wish) if wish is not None else None, not_on=tuple(one for one in spec.any_of if one not in types),
    )  # fmt: skip


def with_split(assignment: GpuAssignment, job: Job) -> GpuAssignment:
    """With the plan of as many GPUs of that type, and why it is another one than before."""
    spec, gpus = job.spec, sum(len(uuids) for _, uuids in assignment.nodes)
    if not isinstance(spec, SizedSpec) or not assignment.gpus_by_model:
        return assignment
    plan = spec.plan_of(gpus, assignment.gpus_by_model[0][0])
    if plan is None:
        return assignment
    last = _last(job)
    before = last.split if last is not None else spec.first
    if before is None or replace(before, why="") == replace(plan.split, why=""):
        return replace(assignment, split=plan.split)
    number = f"{gpus} GPUs instead of {_ranks(before)}" if gpus != _ranks(before) else f"{gpus} x {plan.model}"
    why = f"{PLANNED_ANEW}{number}: {plan.split.words}; before: {before.words}; {spec.why}"
    return replace(assignment, split=replace(plan.split, why=why))


def _last(job: Job) -> Attempt | None:
    return next((one for one in reversed(tuple(job.attempts())) if one.split is not None), None)


def may_have(job: Job, gpus: int) -> bool:
    """Whether a place of so many GPUs, which it claimed before, is still one of its sizes."""
    return not isinstance(job.spec, SizedSpec) or gpus in job.spec.only_sizes


def why_sizes(spec: Spec) -> Iterator[str]:
    """For one that waits: which sizes it may have, where its checkpoint or its plans leave some out."""
    if isinstance(spec, SizedSpec) and spec.plans and len(spec.only_sizes) < len(sizes(_plain(spec))):
        listed = ", ".join(map(str, spec.only_sizes[:8])) + (", ..." if len(spec.only_sizes) > 8 else "")
        yield f"{SIZES}{listed} GPUs: {spec.why}; other sizes have no plan, or none that is faster"
    if isinstance(spec, SizedSpec) and spec.not_on:
        yield f"{SIZES}{', '.join(spec.any_of)} alone: on {', '.join(spec.not_on[:8])} it has no plan"


def _plain(spec: SizedSpec) -> Spec:
    return Spec(**{one.name: getattr(spec, one.name) for one in fields(Spec)})
