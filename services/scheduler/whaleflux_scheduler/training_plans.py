"""How a model would be trained on GPUs of the fleet, as it is asked for over the contract: checks, offers of the fleet, plans, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import MAX_PARALLEL
from whaleflux.manifests.site_values import MOST_SITES
from whaleflux.manifests.training_values import model_text
from whaleflux.planning.binding import lacks
from whaleflux.planning.calibration import MAX_BYTES, Calibrated, calibrated, ladder_from_text
from whaleflux.planning.emit.mesh import fsdp2
from whaleflux.planning.emit.planned import Planned
from whaleflux.planning.known_models import model_said
from whaleflux.planning.machine import Machine, lacks_precision
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.offers import Estimate, Goal, Objective, Offer, choose
from whaleflux.planning.space import MOST_GPUS, Asked
from whaleflux.planning.training import Training
from whaleflux.planning.wish import KEY, MOST_BATCH, MOST_SEQUENCE, Wish
from whaleflux.quantities import shown_number
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import training_offers
from whaleflux_scheduler.core.placement.api import GpuRequirement
from whaleflux_scheduler.core.placement.supply import conditions_of, node_fits
from whaleflux_scheduler.planning_turns import Turns

if TYPE_CHECKING:
    from whaleflux_scheduler.leader_session import Leading

MOST_MODEL_BYTES, MOST_BATCH_TOKENS = 16 << 10, 1e12
USUAL_BATCH_TOKENS, BATCH_SLACK, USUAL_SEQUENCE = 4_000_000, 0.05, 8192
_MOST_TYPES, _MOST_TOKENS, _MOST_USD, _MOST_DEADLINE_S = 64, 1e16, 1e13, 1e10
MOST_LABELS = 64
_PARTS = ("tensor", "pipeline", "context", "expert")  # of the split, as `Asked` has them
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned, for whichever GPUs."""

    shape: ModelShape
    asked: Asked
    goal: Goal
    how: Training

    @property
    def precision(self) -> str:
        return "fp8" if self.how.fp8 else "bf16"


class TrainingPlans:
    """Makes plans one at a time, in a thread: the search takes up to a second for each offer, at most two offers of eight types."""

    def __init__(self, measured: Mapping[str, Mapping[str, Calibrated]] | None = None) -> None:
        """`measured` by precision, then type (`calibrations`)."""
        self._measured, self._turns = dict(measured or {}), Turns("plans of other trainings are being made")

    async def planned(self, request: pb.PlanTrainingRequest, leading: Leading) -> pb.PlanTrainingResponse:
        """Of the fleet as it is now. Raises InvalidArgument naming field and limit, ResourceExhausted where others' plans take too long."""
        question = _asked(request)
        await leading.view.caught_up()
        nodes, network = await leading.planner.ask(lambda plan: (plan.free_nodes(), plan.network()))
        sites, need = _where(request)
        has = training_offers.had(one for one in nodes if _will_do(one.node, sites, need))
        _known_types(request.gpu_types, has)
        precision = question.precision
        able = [one for one in has if not lacks_precision(one.gpu, precision)]
        measured_of, least = self._measured.get(precision), request.min_gpus
        offers = training_offers.offers(able, request.gpus, request.gpu_types, network, measured_of, least)
        unable = _unable(request, has, precision)
        if not offers:
            return pb.PlanTrainingResponse(refused=_too_few(request, has, precision))
        there = {(one.gpu.name, one.site): one for one in has}
        answer = await self._turns.run(lambda: _answer(question, offers, there))
        answer.refused.extend(unable)
        measured = {one.gpu.name: one.measured for one in offers if one.measured is not None}
        more = training_offers.not_compared(able, request.gpus, request.gpu_types)
        answer.notes.extend(filter(None, (*(one.lacks() for one in measured.values()), more)))
        return answer


def calibrations(folder: str) -> dict[str, dict[str, Calibrated]]:
    """By precision and type, of the files *.json that `whaleflux calibrate` wrote there; "": none. Raises InvalidArgument naming the file."""
    found: dict[str, dict[str, Calibrated]] = {one: {} for one in PRECISIONS}
    for path in sorted(Path(folder).glob("*.json")) if folder else ():
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                raise InvalidArgument(
                    FieldViolation("calibrations", f"is longer than {MAX_BYTES} bytes: is it another file?")
                )
            ladder = ladder_from_text(raw.decode("utf-8"))
        except (InvalidArgument, OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(FieldViolation("calibrations", f"{path}: {error}")) from None
        gpu = CATALOGUE.types.get(CATALOGUE.name_of(ladder.gpu, int(ladder.memory_bytes)))
        if gpu is None or gpu.speed is None:
            raise InvalidArgument(FieldViolation("calibrations", f"{path}: {ladder.gpu!r} is no type that plans know"))
        for precision in PRECISIONS:
            if not lacks_precision(gpu, precision):
                found[precision][gpu.name] = calibrated(Machine.of(gpu, precision), ladder)
    return found


# what is asked


def shape_of(text: str, field: str = "training.model") -> ModelShape:
    """A known name, or the fields of a model as JSON. Raises InvalidArgument with every mistake."""
    if not text:
        raise InvalidArgument(
            FieldViolation(field, "is empty; give a name (whaleflux fits --list) or the model's fields")
        )
    if len(text) > MOST_MODEL_BYTES:
        raise InvalidArgument(FieldViolation(field, f"has {len(text)} characters; at most {MOST_MODEL_BYTES}"))
    try:
        return model_said(text)
    except InvalidArgument as wrong:
        raise InvalidArgument(
            [
                FieldViolation(
                    field if one.field in ("", "model", "MODEL") else f"{field}.{one.field}", one.description
                )
                for one in wrong.violations
            ]
        ) from None


def _asked(request: pb.PlanTrainingRequest) -> Question:
    """Raises InvalidArgument with every mistake."""
    said = request.training
    shape = shape_of(said.model)
    checks = [
        ("training.batch", said.batch, MOST_BATCH), ("training.batch_tokens", said.batch_tokens, MOST_BATCH_TOKENS),
        ("training.sequence", said.sequence, MOST_SEQUENCE), ("gpus", request.gpus, MOST_GPUS), ("gpu_types", len(request.gpu_types), _MOST_TYPES),
        ("tokens", request.tokens, _MOST_TOKENS), ("budget_usd", request.budget_usd, _MOST_USD),
        ("min_gpus", request.min_gpus, request.gpus or MOST_GPUS), ("gpus_step", request.gpus_step, MOST_GPUS),
        ("sites", len(request.sites), MOST_SITES), ("nodes.labels", len(request.nodes.labels), MOST_LABELS),
        *((f"parallelism.{part}", getattr(request.parallelism, part), MAX_PARALLEL) for part in _PARTS),
    ]  # fmt: skip
    wrong = [
        FieldViolation(field, f"is {shown_number(value)}; it must be between 0 and {shown_number(most)}")
        for field, value, most in checks
        if not 0 <= value <= most or not math.isfinite(value)
    ]
    if said.batch and said.batch_tokens:
        wrong.append(FieldViolation("training.batch_tokens", "and training.batch both say the batch; say one"))
    deadline_s = request.deadline.ToNanoseconds() / 1e9
    if not 0 <= deadline_s <= _MOST_DEADLINE_S:
        wrong.append(FieldViolation("deadline", f"is {deadline_s:g} s from now; it must be 0 to {_MOST_DEADLINE_S:g}"))
    if (deadline_s or request.budget_usd) and not request.tokens:
        wrong.append(
            FieldViolation("tokens", "is missing: deadline and budget_usd need to know how many are to be trained on")
        )
    if wrong:
        raise InvalidArgument(wrong)
    sequence = said.sequence or min(shape.sequence, USUAL_SEQUENCE)
    batch, slack = said.batch, 0.0
    if not batch:
        if 0 < said.batch_tokens < sequence:
            what = f"is {said.batch_tokens:,}, less than one sequence of {sequence:,}; take {sequence:,} or more, or a shorter sequence"
            raise InvalidArgument(FieldViolation("training.batch_tokens", what))
        batch, slack = min(MOST_BATCH, max(1, round((said.batch_tokens or USUAL_BATCH_TOKENS) / sequence))), BATCH_SLACK
    objective = Objective.COST if request.cheapest else Objective.TIME
    how = Training(frozen=said.adapters, fp8=float(said.fp8))
    parts = [getattr(request.parallelism, part) for part in _PARTS]
    tp, pp, cp, ep = (max(one, 1) if any(parts) else 0 for one in parts)  # beside another, what is left out is 1
    return Question(
        shape,
        Asked(
            1,
            sequence,
            tp=tp,
            pp=pp,
            cp=cp,
            ep=ep,
            batch=batch,
            batch_slack=slack,
            least_gpus=request.min_gpus,
            gpus_step=request.gpus_step or 1,
        ),
        Goal(request.tokens, deadline_s, request.budget_usd, objective),
        how,
    )


def _where(request: pb.PlanTrainingRequest) -> tuple[frozenset[str], GpuRequirement]:
    """Ids of the sites that will do (none: all), and what each node has to have."""
    sites = frozenset(names.split(site, "sites", field="sites")[0] for site in request.sites)
    asked = request.nodes
    return sites, GpuRequirement(labels=tuple(asked.labels.items()), nvme=asked.nvme, no_spot=asked.no_spot)


def _will_do(node: Node, sites: frozenset[str], need: GpuRequirement) -> bool:
    return (not sites or node.site in sites) and node_fits(node, need)


def _known_types(types: Iterable[str], has: list[training_offers.Had]) -> None:
    there = {one.gpu.name for one in has}
    wrong = [name for name in types if name not in CATALOGUE.types]
    if wrong:
        raise InvalidArgument(
            FieldViolation(
                "gpu_types", f"{wrong[0][:60]!r} is no type of GPU; the fleet has {', '.join(sorted(there)) or 'none'}"
            )
        )


def _unable(request: pb.PlanTrainingRequest, has: list[training_offers.Had], precision: str) -> list[str]:
    """Types that would do but for the precision."""
    wanted = {one.gpu.name: one.gpu for one in has if not request.gpu_types or one.gpu.name in request.gpu_types}
    return [lacks_precision(gpu, precision) for gpu in wanted.values() if lacks_precision(gpu, precision)]


def _too_few(request: pb.PlanTrainingRequest, has: list[training_offers.Had], precision: str) -> list[str]:
    wanted = [one for one in has if not request.gpu_types or one.gpu.name in request.gpu_types]
    if not wanted:
        return [f"the fleet has no GPUs of these types{_limits(request)} that take work; see: whaleflux gpus"]
    return [
        lacks_precision(one.gpu, precision)
        or f"{one.gpu.name}: {one.site or 'the fleet'} has {one.all}, and at least {request.min_gpus} are asked for"
        for one in wanted
    ]


def _limits(request: pb.PlanTrainingRequest) -> str:
    """Where they have to be, for a sentence."""
    sites, need = _where(request)
    conditions = conditions_of(need)
    at = f" at {', '.join(sorted(sites)[:4])}" if sites else ""
    return at + (f" on nodes with {conditions}" if conditions else "")


# what is answered


def _answer(
    question: Question, offers: list[Offer], there: Mapping[tuple[str, str], training_offers.Had]
) -> pb.PlanTrainingResponse:
    shape, how = question.shape, question.how
    choice = choose(shape, offers, question.asked, question.goal, how, question.precision)
    every = _distinct((choice.chosen, *choice.others))
    planned = [one for one in every if one.plan is not None]
    return pb.PlanTrainingResponse(
        plans=[
            _message(shape, one, there[one.gpu, one.place], _mesh(shape, one, how, whole=not _settled(question.asked)))
            for one in planned
        ],
        refused=[_refused(one) for one in every if one.plan is None],
        words=choice.words,
    )


def _distinct(every: Sequence[Estimate]) -> list[Estimate]:
    """The first of those that are one plan on GPUs of one place: what is free, and all of it, may come to the same."""
    found: dict[object, Estimate] = {}
    for number, one in enumerate(every):
        found.setdefault(number if one.plan is None else (one.gpu, one.place, one.plan.split), one)
    return list(found.values())


def _refused(one: Estimate) -> str:
    nearest = one.found.nearest
    why = one.found.binding.words if nearest is None else lacks(nearest)
    return f"{one.gpus} x {one.gpu} {'in ' + one.place if one.place else 'over several sites'}: {why}"


def _settled(asked: Asked) -> bool:
    """Whether the job's file says anything of the split."""
    return bool(asked.tp or asked.pp or asked.cp)


def _mesh(shape: ModelShape, one: Estimate, how: Training, *, whole: bool) -> str:
    """As `whaleflux.sdk.device_mesh` reads it, with what it takes to plan for another number of ranks; "" where FSDP2 cannot say the plan."""
    assert one.plan is not None
    split = one.plan.split
    try:
        said = json.loads(fsdp2(Planned.of(shape, split.plans(), how)).text)
    except InvalidArgument:
        return ""
    wish = Wish(
        model_text(shape), one.gpu, split.global_batch, split.sequence, split.tp, split.pp, split.cp,
        vp=split.vp, first_layers=split.first_layers, last_layers=split.last_layers, adapters=bool(how.frozen), fp8=bool(how.fp8), whole=whole,
    )  # fmt: skip
    return json.dumps(said | {KEY: wish.said()})


def _message(shape: ModelShape, one: Estimate, there: training_offers.Had, mesh: str) -> pb.TrainingPlan:
    plan = one.plan
    assert plan is not None
    split = plan.split
    message = pb.TrainingPlan(
        gpu_type=one.gpu, gpus=split.gpus, free_gpus=min(there.free, split.gpus), offered_gpus=one.found.gpus, node_gpus=there.node_gpus,
        parallelism=pb.Parallelism(tensor=split.tp, context=split.cp, expert=split.ep, pipeline=split.pp),
        data=split.dp, virtual_stages=split.vp, micro_batch=split.micro_batch, batch=split.global_batch, sequence=split.sequence, zero=split.zero,
        replicas=split.replicas, recompute=split.recompute, recomputed=split.recomputed, sequence_parallel=split.sequence_parallel,
        recomputing_stages=split.recomputing, stage_layers=split.stage_layers(shape),
        step_seconds=plan.seconds, step_s=plan.step_s, tokens_per_s=plan.tokens_per_s, mfu=one.mfu or 0.0, memory_bytes=plan.parts_bytes,
        usable_bytes=plan.usable_bytes, usd_per_hour=(one.usd_per_gpu_hour or 0.0) * split.gpus, usd=one.usd or 0.0,
        words=split.words(), binding=one.found.binding.words, misses=one.misses, mesh=mesh, price_source=one.price_source,
        site=names.site(one.place) if one.place else "",
    )  # fmt: skip
    if one.finish_s is not None:
        message.finish.FromTimedelta(timedelta(seconds=min(one.finish_s, 1e10)))
    return message
