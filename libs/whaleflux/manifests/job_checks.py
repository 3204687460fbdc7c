"""What the fields of a job say of one another: one core for files (`validate`, `submit`) and for the scheduler. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from whaleflux.errors import FieldViolation
from whaleflux.fleet.model import Level
from whaleflux.manifests.job_fields import ATTRIBUTES, MAX_GPUS, Spec
from whaleflux.manifests.launchers import find_launcher
from whaleflux.manifests.secret_values import set_otherwise
from whaleflux.manifests.values import Violations
from whaleflux.planning.wish import VARIABLE as MESH
from whaleflux.planning.wish import wish_in


def violations(spec: Spec) -> tuple[FieldViolation, ...]:
    """Everything that is wrong whatever the time, by paths of the contract's JobSpec ("nodes.min")."""
    found = [
        violation
        for name, field in ATTRIBUTES.items()
        for violation in field.value.violations(field.path, getattr(spec, name))
    ]
    return (*found, *(violation for check in CHECKS for violation in check(spec)), *_elastic_split(spec))


def before_plan(spec: Spec) -> tuple[FieldViolation, ...]:
    """The same of a file, whose number of GPUs is open, or a ceiling, where it names a model: what the plan settles is not asked."""
    if not spec.train_model or spec.ranks:
        return violations(spec)
    found = violations(replace(spec, gpus=_could_be_planned(spec)))
    meshed = any(name == MESH for name, _ in spec.environment)
    return found if meshed else tuple(one for one in found if one not in _elastic_split(spec))


def _could_be_planned(spec: Spec) -> int:
    """A number of GPUs that suits the split, sizes and groups that the file says: the most up to its own, else the least."""
    sizes = (
        spec.elastic_step,
        *(rule.size for rule in spec.placement),
        spec.model_parallel * max(1, spec.expert_parallel),
    )
    unit = math.lcm(*(max(1, size) for size in sizes))
    if spec.gpus:
        return spec.gpus - spec.gpus % unit or spec.gpus
    least = max(1, spec.elastic_min, spec.min_nodes)
    return -(-least // unit) * unit


def too_late(spec: Spec, now: datetime) -> tuple[FieldViolation, ...]:
    """What was right once."""
    if spec.deadline is None or spec.deadline > now:
        return ()
    late = (
        f"{spec.deadline.isoformat()} is over; use an instant after {now.isoformat(timespec='seconds')} or leave it out"
    )
    return (FieldViolation("deadline_time", late),)


def _work(spec: Spec) -> Violations:
    if not spec.command and not spec.image:
        yield FieldViolation(
            "command",
            "is empty; give what starts one rank, for example: python train.py, or an image that has its own command",
        )


def _code(spec: Spec) -> Violations:
    if spec.code and spec.working_directory:
        yield FieldViolation("code", "excludes directory: the ranks start in the one or in the other")


def _setup(spec: Spec) -> Violations:
    if spec.setup and spec.image and not (spec.launch_once and spec.command):
        yield FieldViolation(
            "setup",
            "what it installs would be lost: each rank gets a fresh container of the image; build it into the image, or write it into `run` "
            "(with launch: once a node has one container, in which it runs first)",
        )
    if spec.setup and (launcher := find_launcher(spec.setup)):
        yield FieldViolation(
            "setup", f"starts {launcher.name}, which would wait for the other nodes; start it in `run`"
        )


def _launch(spec: Spec) -> Violations:
    launcher = find_launcher(spec.command)
    if launcher is None:
        return
    if not spec.launch_once:
        ranks = f"{spec.world_size} ranks" if spec.world_size > 1 else "the rank"
        text = f"starts {launcher.name} in each of {ranks}, which starts processes of its own there; write launch: once, or remove {launcher.name}"
        yield FieldViolation("command", text)
    elif not launcher.meets and max(spec.world_size, spec.elastic_max) > 1 and spec.max_nodes != 1:
        text = (
            f"{launcher.name} starts processes on other nodes through ssh or Slurm, which agents do not offer; write nodes: "
            "{max: 1}, or use torchrun"
        )
        yield FieldViolation("command", text)


def _ranks(spec: Spec) -> Violations:
    """How many, on GPUs or without any."""
    if spec.train_model and not spec.gpus and spec.ranks:
        what = "is 0, and a model is trained on GPUs; leave gpus out to have it planned, or say how many"
        yield FieldViolation("gpus", what)
    elif not spec.world_size and spec.train_model:
        yield FieldViolation("gpus", "is not planned yet; PlanTraining says how many, as whaleflux submit asks it to")
    elif not spec.world_size:
        yield FieldViolation("gpus", "is 0; say how many GPUs the job needs, or how many ranks without any (ranks)")
    if spec.gpus > 0 and spec.ranks not in (0, spec.gpus):
        yield FieldViolation("ranks", f"each of the {spec.gpus} GPUs has one rank; leave it out, or ask for no GPUs")
    which = spec.any_of or spec.min_memory_bytes or spec.min_compute_capability or spec.wants_mig
    if not spec.gpus and (which or spec.share_memory_bytes):
        yield FieldViolation("gpu", "says which GPUs, and gpus is 0; leave it out or ask for GPUs")
    if not spec.gpus and spec.placement:
        yield FieldViolation("placement", "holds groups of GPUs together, and gpus is 0; leave it out")


def _reservation(spec: Spec) -> Violations:
    """What can be kept for it."""
    if spec.reservation and not spec.gpus:
        yield FieldViolation("reservation", "keeps GPUs, and gpus is 0; leave it out or ask for GPUs")
    if spec.reservation and spec.is_elastic:
        yield FieldViolation("reservation", "keeps a fixed number of GPUs; leave it out, or elastic")


def _elastic(spec: Spec) -> Violations:
    """Sizes that go together, and nothing that would break with another one."""
    if not spec.is_elastic:
        if spec.elastic_max or spec.elastic_step or spec.elastic_resumes or spec.elastic_speeds:
            yield FieldViolation("elastic.min", "is missing; say with how few GPUs it can run")
        return
    yield from _elastic_sizes(spec)
    if not (spec.checkpoint_every_steps or spec.checkpoint_location or spec.checkpoint_keep or spec.elastic_resumes):
        yield FieldViolation(
            "elastic.resumes",
            "is not set, and the job says nothing of checkpoints: each resize would begin it anew; write checkpoint: {every: N}, or "
            "elastic.resumes: true where its program goes on by itself",
        )
    if spec.is_service:
        yield FieldViolation("elastic.min", "is of training; a service is scaled by its replicas, leave elastic out")
    if any(choice.per_unit > 1 for choice in spec.gpu_choices):
        yield FieldViolation("elastic.min", "counts GPUs; leave out types of which several count as one, or elastic")
    if spec.wants_mig or spec.share_memory_bytes:
        yield FieldViolation("elastic.min", "is of whole GPUs; leave out gpu.mig and gpu.share, or elastic")


def _elastic_sizes(spec: Spec) -> Violations:
    step, most = spec.elastic_step or 1, spec.elastic_max or spec.gpus
    if spec.gpus < spec.elastic_min:
        yield FieldViolation("elastic.min", f"is {spec.elastic_min}, and gpus {spec.gpus}; use at most {spec.gpus}")
    if most < spec.gpus:
        yield FieldViolation("elastic.max", f"is {most}, and gpus {spec.gpus}; use at least {spec.gpus}")
    for field, size in (("elastic.min", spec.elastic_min), ("gpus", spec.gpus), ("elastic.max", most)):
        if size % step:
            yield FieldViolation(
                field, f"{size} is no multiple of elastic.step ({step}); use {size - size % step or step}"
            )
    for i, rule in enumerate(spec.placement):
        if rule.size > 0 and step % rule.size:
            text = f"{rule.size} does not divide elastic.step ({step}), so that not every size holds whole groups; use a divisor, or raise that"
            yield FieldViolation(f"placement[{i}].size", text)
    if spec.min_nodes > spec.elastic_min:
        text = f"{spec.min_nodes} nodes need as many GPUs; elastic.min is {spec.elastic_min}, use at most that, or raise it"
        yield FieldViolation("nodes.min", text)


def _nodes(spec: Spec) -> Violations:
    if 1 <= spec.world_size < spec.min_nodes:
        what = "GPUs" if spec.gpus else "ranks"
        text = (
            f"{spec.min_nodes} nodes need as many {what}; use at most {spec.world_size} or ask for more {what.lower()}"
        )
        yield FieldViolation("nodes.min", text)
    if 0 < spec.max_nodes < spec.min_nodes:
        yield FieldViolation("nodes.max", f"{spec.max_nodes} is below nodes.min ({spec.min_nodes})")


def _placement(spec: Spec) -> Violations:
    for i, rule in enumerate(spec.placement):
        if rule.size > 0 and spec.gpus > 0 and spec.gpus % rule.size:
            text = f"{rule.size} does not divide the {spec.gpus} GPUs; use a divisor, or 0 for all ranks"
            yield FieldViolation(f"placement[{i}].size", text)


def _training(spec: Spec) -> Violations:
    """What is said of a model."""
    said = spec.train_batch or spec.train_batch_tokens or spec.train_sequence or spec.train_adapters or spec.train_fp8
    if said and not spec.train_model:
        yield FieldViolation("training.model", "is empty, and batch, sequence, adapters or fp8 are said of it; give it")
    if spec.train_batch and spec.train_batch_tokens:
        yield FieldViolation("training.batch_tokens", "and batch both say the batch; say one")


def _parallel(spec: Spec) -> Violations:
    """How the program splits its model."""
    copy = spec.model_parallel
    if not copy:
        if spec.parallel_model:
            yield FieldViolation(
                "parallelism.model",
                "says how sizes are compared, and none is given; give parallel.tensor, or leave it out",
            )
        return
    if part := _not_parallel(spec):
        yield FieldViolation(
            "parallelism", f"lays ranks on whole GPUs, one process each, and {part}; leave one of them out"
        )
        return
    if spec.gpus % copy:
        text = f"tensor x context x pipeline is {copy}, which does not divide the {spec.gpus} GPUs; use sizes whose product does"
        yield FieldViolation("parallelism", text)
        return
    data = spec.gpus // copy * max(1, spec.context_parallel)
    if data % max(1, spec.expert_parallel):
        yield FieldViolation(
            "parallelism.expert",
            f"{spec.expert_parallel} does not divide context x data, which is {data}; use a divisor",
        )


def _elastic_split(spec: Spec) -> Violations:
    """Every size holds whole copies of the model."""
    copy, step = spec.model_parallel, spec.elastic_step or 1
    planned_anew = spec.train_model and wish_in(spec.environment) is not None  # for each size
    if copy and spec.is_elastic and step % copy and not planned_anew:
        text = f"{step} is no multiple of tensor x context x pipeline ({copy}), so that not every size holds whole models; use {copy}"
        yield FieldViolation("elastic.step", text)


def _not_parallel(spec: Spec) -> str:
    """What of the job cannot be laid out."""
    if not spec.gpus:
        return "gpus is 0"
    if spec.launch_once:
        return "launch is once: that program numbers its ranks itself"
    if spec.wants_mig or spec.share_memory_bytes:
        return "its ranks get parts of GPUs"
    return ""


def _types(spec: Spec) -> Violations:
    """What GPU types count as."""
    told = [choice.model for choice in spec.gpu_options]
    if len(set(told)) < len(told) or not set(told) <= set(spec.any_of):
        yield FieldViolation("gpu.options", "must name types of any_of, each once")
        return
    for i, choice in enumerate(spec.gpu_choices):
        at = f"gpu.any_of[{i}]"
        if not i and choice.per_unit > 1:
            text = f"is what `gpus` counts, so one {choice.model} is one GPU; name it without a number, or put another type first"
            yield FieldViolation(at, text)
        elif spec.gpus * choice.per_unit > MAX_GPUS:
            text = f"{choice.per_unit} for each of {spec.gpus} GPUs is more than {MAX_GPUS}; ask for fewer"
            yield FieldViolation(at, text)
    if told and spec.is_elastic and any(choice.per_unit > 1 for choice in spec.gpu_options):
        yield FieldViolation(
            "gpu.any_of", "types that count differently do not go with elastic; leave out the numbers, or elastic"
        )
    if told and (part := "gpu.mig" if spec.wants_mig else "gpu.share" if spec.share_memory_bytes else ""):
        yield FieldViolation("gpu.any_of", f"numbers and speeds are of whole GPUs; leave them out, or {part}")


def _parts(spec: Spec) -> Violations:
    """Parts of GPUs: one kind of them, and nothing that only whole GPUs have."""
    part = "gpu.mig" if spec.wants_mig else "gpu.share" if spec.share_memory_bytes else ""
    path = "gpu.mig_profile" if spec.wants_mig else "gpu.share_memory_bytes"
    if spec.wants_mig and spec.share_memory_bytes:
        text = "and gpu.share exclude each other: a rank gets a MIG instance, or a share of a whole GPU"
        yield FieldViolation(path, text)
    if spec.mig_profile and spec.mig_memory_bytes:
        yield FieldViolation(path, "and mig_memory_bytes exclude each other: name the profile, or a least size")
    if part and spec.min_memory_bytes:
        yield FieldViolation("gpu.min_memory_bytes", f"is of whole GPUs; {part} says the size, so leave it out")
    if spec.wants_mig and spec.launch_once and spec.gpus > 1:
        text = "does not go with launch: once: CUDA shows a process one MIG instance, and those it starts the same one"
        yield FieldViolation(path, text)
    for i, rule in enumerate(spec.placement) if part else ():
        if rule.level >= Level.ISLAND:
            text = f"parts of GPUs ({part}) do not reach one another over NVLink; use node or a wider level"
            yield FieldViolation(f"placement[{i}].level", text)
        elif spec.share_memory_bytes and rule.size not in (0, spec.gpus):
            text = "a share (gpu.share) has no runs of ranks; leave size out, then the level holds all of them"
            yield FieldViolation(f"placement[{i}].size", text)


def _data(spec: Spec) -> Violations:
    if spec.require_local_data and not spec.datasets:
        yield FieldViolation("require_local_data", "needs datasets; name them or leave it out")
    if spec.partial_data and not spec.datasets:
        yield FieldViolation("partial_data", "needs datasets; name them or leave it out")
    if spec.partial_data and spec.require_local_data:
        yield FieldViolation("partial_data", "reads a part at the source; leave it or require_local_data out")
    known = {name.removeprefix("datasets/") for name in spec.datasets}
    for i, name in enumerate(spec.datasets_by_rank):
        if name.removeprefix("datasets/") not in known:
            yield FieldViolation(f"datasets_by_rank[{i}]", f"is {name}, which data does not name; add it there")
    if spec.datasets_by_rank and spec.require_local_data:
        text = "is pulled in parts, and require_local_data wants nodes that hold all of it; leave one of them out"
        yield FieldViolation("datasets_by_rank", text)


def _secrets(spec: Spec) -> Violations:
    for i, words in set_otherwise(spec.secrets, (name for name, _ in spec.environment)):
        yield FieldViolation(f"secrets[{i}].variable", words)


CHECKS: tuple[Callable[[Spec], Violations], ...] = (
    _work,
    _code,
    _setup,
    _launch,
    _ranks,
    _elastic,
    _nodes,
    _placement,
    _training,
    _parallel,
    _types,
    _parts,
    _data,
    _secrets,
    _reservation,
)
