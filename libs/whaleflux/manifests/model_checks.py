"""What the fields of a model say of one another: one core for files (`validate`, `serve`) and for the router. Pure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from whaleflux import hostport
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests import shell_text
from whaleflux.manifests.job_fields import ATTRIBUTES
from whaleflux.manifests.model_fields import (
    MAX_CANARY_PERCENT,
    MAX_GPUS_PER_REPLICA,
    MAX_REQUESTS_PER_S,
    MAX_TOKENS,
    READY_WITHIN_S,
    WATCH_S,
    QueueName,
    Weights,
)
from whaleflux.manifests.secret_values import set_otherwise
from whaleflux.manifests.site_values import MAX_REPLICAS, Sites
from whaleflux.manifests.text_values import Command
from whaleflux.manifests.training_values import TrainedModel
from whaleflux.quantities import shown_number

if TYPE_CHECKING:
    from whaleflux.v1 import router_pb2

MAX_COMMAND_CHARS = 65_536
PORT_MARKS = ("{port}", "$PORT", "${PORT")
WEIGHTS_MARK = "{weights}"
GPUS_MARK = re.compile(r"(?<!\$)\{gpus\}")


def violations(model: router_pb2.Model) -> list[FieldViolation]:
    """Everything that cannot be served, by paths of the contract's Model ("engine.command"), with the fix."""
    engine, command = model.engine, list(model.engine.command)
    least, most, window = model.replicas.min, model.replicas.max, model.context_window_tokens
    ways = sum((bool(command) or bool(engine.image), bool(engine.addresses)))
    deaf = bool(command) and not any(mark in word for word in command for mark in PORT_MARKS)
    found = [
        FieldViolation(path, fix)
        for path, wrong, fix in (
            ("engine", ways != 1, "needs a command or image that is run here, or addresses of servers that run elsewhere, not both"),
            ("engine.command", sum(map(len, command)) > MAX_COMMAND_CHARS, f"is longer than {MAX_COMMAND_CHARS} characters"),
            ("engine.command", deaf, "does not say where it listens: each replica is given a port; write --port {port}, or $PORT in a script"),
            ("engine.gpus", not 0 <= engine.gpus <= MAX_GPUS_PER_REPLICA, f"is {engine.gpus}; use 0 (for 1) to {MAX_GPUS_PER_REPLICA}"),
            ("engine.addresses", len(engine.addresses) > MAX_REPLICAS, f"are {len(engine.addresses)}; use at most {MAX_REPLICAS}"),
            *((f"engine.addresses[{number}]", bool(wrong), wrong) for number, wrong in enumerate(map(_wrong_address, engine.addresses))),
            ("replicas.min", not 0 <= least <= MAX_REPLICAS, f"is {least}; use 0 to {MAX_REPLICAS}"),
            ("replicas.max", not (most == 0 or least <= most <= MAX_REPLICAS), f"is {most}; use 0 (same as min) or {least} to {MAX_REPLICAS}"),
            ("context_window_tokens", not 0 <= window <= MAX_TOKENS, f"is {window}; use 0 (unknown) to {MAX_TOKENS}"),
        )
        if wrong
    ]  # fmt: skip
    of_engine = (*Command().violations("engine.command", command), *_secrets(model))
    return [*found, *of_engine, *QueueName().violations("queue", model.queue), *_deployment(model), *_sizing(model)]


def add_arguments(engine: router_pb2.Engine) -> list[FieldViolation]:
    """Puts the words of `args` behind a script that is one program; what cannot be done is said."""
    begin = len(shell_text.BASH) + 1
    script, words = shell_text.script_of(engine.command[:begin]), list(engine.command[begin:])
    if script is None or not words:
        return []
    if not shell_text.is_one_program(script):
        return [FieldViolation("engine.args", "can follow a single command only; write them into `run`")]
    del engine.command[:]
    engine.command.extend(shell_text.as_command(f"{script} {shlex.join(words)}"))
    return []


def _deployment(model: router_pb2.Model) -> Iterator[FieldViolation]:
    """Weights, sites, and how a changed engine takes over."""
    engine, policy = model.engine, model.rollout_policy
    yield from Weights().violations("engine.weights", engine.weights)
    yield from Sites().violations("sites", Sites().reading("sites")(model))
    if engine.addresses:
        for path, there in (("engine.weights", engine.weights), ("sites", model.sites)):
            if there:
                yield FieldViolation(path, "servers that run elsewhere have their own; leave it out, or give a command")
    elif not engine.weights and any(WEIGHTS_MARK in word for word in engine.command):
        yield FieldViolation("engine.weights", f"is missing, and the command has {WEIGHTS_MARK}; name a dataset")
    if not 0 <= engine.kv_memory_bytes <= 1 << 50:
        yield FieldViolation("engine.kv_memory_bytes", f"is {engine.kv_memory_bytes}; use 0 (for 2 GB) to {1 << 50}")
    if (count := sum(replicas_of(model).values())) > MAX_REPLICAS:
        yield FieldViolation("sites", f"ask for {count} replicas in all; at most {MAX_REPLICAS}")
    for i, site in enumerate(model.sites):
        if site.args and add_arguments(with_site(engine, site)):
            yield FieldViolation(f"sites[{i}].args", "can follow a single command only; write them into `run`")
    if not 0 <= policy.canary_percent <= MAX_CANARY_PERCENT:
        yield FieldViolation(
            "rollout_policy.canary_percent",
            f"is {policy.canary_percent}; use 0 (for 10) or 1 to {MAX_CANARY_PERCENT}",
        )
    for name, (least, most) in (("watch", WATCH_S), ("ready_within", READY_WITHIN_S)):
        if policy.HasField(name) and not least <= getattr(policy, name).ToNanoseconds() / 1e9 <= most:
            yield FieldViolation(f"rollout_policy.{name}", f"use {least:g} to {most:g} s, or leave it out")


def _sizing(model: router_pb2.Model) -> Iterator[FieldViolation]:
    """What decides on the GPUs of its replicas."""
    engine, asked = model.engine, model.objective
    numbers = (
        ("prompt_tokens", asked.prompt_tokens, MAX_TOKENS),
        ("answer_tokens", asked.answer_tokens, MAX_TOKENS),
        ("requests_per_s", asked.requests_per_s, MAX_REQUESTS_PER_S),
    )
    for name, value, most in numbers:
        if not 0 <= value <= most or not math.isfinite(value):
            yield FieldViolation(f"objective.{name}", f"is {shown_number(value)}; use 0 (not said) to {most:,}")
    if not engine.shape:
        said = (*((f"objective.{name}", value) for name, value, _ in numbers), ("engine.fp8", engine.fp8))
        for name in (name for name, value in said if value):
            yield FieldViolation(
                name, "decides on the GPUs of a model that names its `shape`; name it, or leave this out"
            )
        return
    yield from TrainedModel().violations("engine.shape", engine.shape)
    if engine.addresses:
        yield FieldViolation(
            "engine.shape", "servers that run elsewhere have their own GPUs; leave it out, or give a command"
        )
    elif not engine.gpus and not any(GPUS_MARK.search(word) for word in engine.command):
        fix = "does not say over how many GPUs the engine divides the model: write --tensor-parallel-size {gpus}, or say `engine.gpus`"
        yield FieldViolation("engine.command", fix)
    for name in ("first_token", "per_token"):
        if asked.HasField(name) and not 0 < getattr(asked, name).ToNanoseconds() / 1e9 <= 3600:
            yield FieldViolation(f"objective.{name}", "use more than 0 and at most 3600 s, or leave it out")


def replicas_of(model: router_pb2.Model) -> dict[str, int]:
    """How many run at each site, in the model's order; "" where it names none, or where they run elsewhere."""
    if model.engine.addresses:
        return {"": len(model.engine.addresses)}
    if not model.sites:
        return {"": model.replicas.min}
    return {site.site: site.replicas or model.replicas.min for site in model.sites}


def with_site(engine: router_pb2.Engine, site: router_pb2.ModelSite) -> router_pb2.Engine:
    """The engine as it is at a site; words of the command are not joined yet (`add_arguments`)."""
    made = type(engine)()
    made.CopyFrom(engine)
    made.command.extend(site.args)
    made.environment.update(site.environment)
    if site.gpu_models:
        made.gpu_models[:] = site.gpu_models
    return made


def _secrets(model: router_pb2.Model) -> Iterator[FieldViolation]:
    field = ATTRIBUTES["secrets"].value
    uses = field.reading("secrets")(model.engine)
    yield from field.violations("engine.secrets", uses)
    everywhere = {*model.engine.environment, *(name for site in model.sites for name in site.environment)}
    for i, words in set_otherwise(uses, everywhere):
        yield FieldViolation(f"engine.secrets[{i}].variable", words)


def _wrong_address(text: str) -> str:
    """What is wrong with it; "" when it can be dialled."""
    try:
        hostport.parse(text)
    except InvalidArgument as wrong:
        return wrong.violations[0].description
    return ""
