"""What a job or a queue may ask for. Every refusal names the field, its limit and the way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache

from whaleflux.errors import FieldViolation, Invalid
from whaleflux.fleet.model import Level
from whaleflux.names import ID_PATTERN
from whaleflux_scheduler.core.model import Queue, Rule, Spec

MAX_GPUS = 100_000
MAX_NODES = 100_000
MAX_SPEC_BYTES = 256 * 1024
SMALL_BYTES = 4096  # what was found in larger specs is not remembered
MAX_ARGUMENTS = 1_000
MAX_TEXT_CHARS = 4_096
MAX_COMMAND_BYTES = 64 * 1024
MAX_ENVIRONMENT = 500
MAX_LIST = 100
MAX_MODELS = 32
MAX_PRIORITY = 1_000
MAX_RESTARTS = 1_000_000
MAX_DURATION_S = 366 * 24 * 3600.0
MAX_MEMORY_BYTES = 1 << 50  # a pebibyte
MAX_CPU_MILLICORES = 10_000_000
MAX_MONEY_USD = 1e9

# The contract between torchrun and a script, and our own: a job that set these would break its own gang.
RESERVED_ENVIRONMENT = frozenset(
    [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
    ]
)
RESERVED_PREFIXES = ("TORCHELASTIC_", "WHALEFLUX_")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,62}")

Violations = Iterator[FieldViolation]


def check_spec(spec: Spec, size_bytes: int, now: datetime, at: str = "job.spec") -> None:
    """Raises Invalid with every violation found. `size_bytes` is the spec's encoded size."""
    if size_bytes > MAX_SPEC_BYTES:
        too_large = f"{size_bytes} bytes; at most {MAX_SPEC_BYTES}: put files into the image or a dataset"
        raise Invalid(FieldViolation(at, too_large))
    found = list((_known if size_bytes <= SMALL_BYTES else _violations)(spec, at))
    if spec.deadline is not None and spec.deadline <= now:
        late = f"{spec.deadline.isoformat()} is over; use an instant after {now.isoformat()} or leave it out"
        found.append(FieldViolation(f"{at}.deadline_time", late))
    if found:
        raise Invalid(found)


def _violations(spec: Spec, at: str) -> tuple[FieldViolation, ...]:
    checks: tuple[Callable[[Spec, str], Violations], ...] = (_work, _gpus, _placement, _data, _environment, _numbers)
    return tuple(violation for check in checks for violation in check(spec, at))


_known = lru_cache(maxsize=1024)(_violations)  # the same job is submitted again and again


def check_queue(queue: Queue) -> None:
    """Raises Invalid for a weight or limit that makes no sense."""
    found = [
        *_number("queue.weight", queue.weight, 0.0, 1e6),
        *_number("queue.max_gpus", queue.max_gpus, 0, 100_000_000),
    ]
    if found:
        raise Invalid(found)


def _work(spec: Spec, at: str) -> Violations:
    if not spec.command and not spec.image:
        yield FieldViolation(f"{at}.command", "is empty; give a command line, or an image that has its own")
    if spec.command and not spec.command[0].strip():
        yield FieldViolation(f"{at}.command[0]", "is blank; give the program to run")
    if len(spec.command) > MAX_ARGUMENTS:
        yield FieldViolation(f"{at}.command", f"{len(spec.command)} arguments; at most {MAX_ARGUMENTS}")
    if (size := sum(len(part.encode()) for part in spec.command)) > MAX_COMMAND_BYTES:
        yield FieldViolation(f"{at}.command", f"{size} bytes; at most {MAX_COMMAND_BYTES}: use a script file")
    if any("\0" in part for part in spec.command):
        yield FieldViolation(f"{at}.command", "contains a NUL character; remove it")
    for field, text in (("image", spec.image), ("working_directory", spec.working_directory)):
        yield from _text(f"{at}.{field}", text)
    yield from _text(f"{at}.checkpoint.location", spec.checkpoint_location)


def _gpus(spec: Spec, at: str) -> Violations:
    yield from _number(f"{at}.gpus", spec.gpus, 1, MAX_GPUS)
    yield from _number(f"{at}.nodes.min", spec.min_nodes, 0, MAX_NODES)
    yield from _number(f"{at}.nodes.max", spec.max_nodes, 0, MAX_NODES)
    if spec.gpus >= 1 and spec.min_nodes > spec.gpus:
        text = f"{spec.min_nodes} nodes need as many GPUs; use at most {spec.gpus} or ask for more gpus"
        yield FieldViolation(f"{at}.nodes.min", text)
    if 0 < spec.max_nodes < spec.min_nodes:
        yield FieldViolation(f"{at}.nodes.max", f"{spec.max_nodes} is below nodes.min ({spec.min_nodes})")
    yield from _list(f"{at}.gpu.any_of", spec.any_of, _MODEL, "a catalogue name such as H200 or A100-80GB", MAX_MODELS)
    yield from _number(f"{at}.gpu.min_memory_bytes", spec.min_memory_bytes, 0, MAX_MEMORY_BYTES)
    yield from _number(f"{at}.gpu.min_compute_capability", spec.min_compute_capability, 0, 999)


def _placement(spec: Spec, at: str) -> Violations:
    if len(spec.placement) > 16:
        yield FieldViolation(f"{at}.placement", f"{len(spec.placement)} rules; at most 16")
    for i, rule in enumerate(spec.placement[:16]):
        yield from _rule(rule, spec, f"{at}.placement[{i}]")


def _rule(rule: Rule, spec: Spec, at: str) -> Violations:
    yield from _text(f"{at}.group", rule.group, 63)
    if not Level.SITE <= rule.level <= Level.ISLAND:
        yield FieldViolation(f"{at}.level", "is not set; use SITE, ZONE, SPINE, LEAF, NODE or NVLINK")
    yield from _number(f"{at}.size", rule.size, 0, MAX_GPUS)
    if rule.size > 0 and spec.gpus > 0 and spec.gpus % rule.size:
        text = f"{rule.size} does not divide the {spec.gpus} GPUs; use a divisor, or 0 for all ranks"
        yield FieldViolation(f"{at}.size", text)


def _data(spec: Spec, at: str) -> Violations:
    named = re.compile(rf"(datasets/)?{ID_PATTERN.pattern}")
    yield from _list(f"{at}.datasets", spec.datasets, named, "the name of a dataset, such as datasets/c4-en")
    yield from _list(f"{at}.sites", spec.sites, re.compile(rf"(sites/)?{ID_PATTERN.pattern}"), "the id of a site")
    if spec.require_local_data and not spec.datasets:
        yield FieldViolation(f"{at}.require_local_data", "needs datasets; name them or leave it out")


def _environment(spec: Spec, at: str) -> Violations:
    if len(spec.environment) > MAX_ENVIRONMENT:
        yield FieldViolation(f"{at}.environment", f"{len(spec.environment)} variables; at most {MAX_ENVIRONMENT}")
    for name, value in spec.environment[:MAX_ENVIRONMENT]:
        field = f"{at}.environment[{_shown(name)}]"
        if not _VARIABLE.fullmatch(name):
            yield FieldViolation(field, "is not a variable name; use letters, digits and _, at most 256")
        elif name in RESERVED_ENVIRONMENT or name.startswith(RESERVED_PREFIXES):
            yield FieldViolation(field, "is set for each rank by the agent; choose another name")
        if "\0" in value or len(value) > 32_768:
            yield FieldViolation(field, f"{len(value)} characters; at most 32768 and no NUL")


def _numbers(spec: Spec, at: str) -> Violations:
    yield from _number(f"{at}.priority", spec.priority, 0, MAX_PRIORITY)
    yield from _number(f"{at}.retry.max_restarts", spec.max_restarts or 0, 0, MAX_RESTARTS)
    yield from _number(f"{at}.retry.backoff", spec.backoff_s or 0.0, 0.0, 300.0, "s")
    yield from _number(f"{at}.checkpoint.every_steps", spec.checkpoint_every_steps, 0, 1_000_000_000)
    yield from _number(f"{at}.checkpoint.keep", spec.checkpoint_keep, 0, 1_000)
    yield from _number(f"{at}.on_partition.wait", spec.partition_wait_s or 0.0, 0.0, MAX_DURATION_S, "s")
    yield from _number(f"{at}.budget_usd", spec.budget_usd, 0.0, MAX_MONEY_USD)
    yield from _number(f"{at}.cpu_millicores_per_rank", spec.cpu_millicores_per_rank, 0, MAX_CPU_MILLICORES)
    yield from _number(f"{at}.memory_bytes_per_rank", spec.memory_bytes_per_rank, 0, MAX_MEMORY_BYTES)
    yield from _number(f"{at}.stop_grace", spec.stop_grace_s or 0.0, 0.0, 3600.0, "s")


def _number(field: str, value: float, least: float, most: float, unit: str = "") -> Violations:
    if not math.isfinite(value) or not least <= value <= most:
        yield FieldViolation(field, f"{value:g} is out of range; use {least:.15g} to {most:.15g}{unit and ' ' + unit}")


def _text(field: str, text: str, limit: int = MAX_TEXT_CHARS) -> Violations:
    if len(text) > limit:
        yield FieldViolation(field, f"{len(text)} characters; at most {limit}")
    elif not text.isprintable():
        yield FieldViolation(field, "contains characters that cannot be printed; remove them")


def _list(
    field: str, items: tuple[str, ...], pattern: re.Pattern[str], wanted: str, limit: int = MAX_LIST
) -> Violations:
    if len(items) > limit:
        yield FieldViolation(field, f"{len(items)} entries; at most {limit}")
    for i, item in enumerate(items[:limit]):
        if not pattern.fullmatch(item):
            yield FieldViolation(f"{field}[{i}]", f"{_shown(item)!r} is not {wanted}")
    if len(set(items)) < len(items):
        yield FieldViolation(field, "names something twice; name it once")


def _shown(text: str) -> str:
    return text if len(text) <= 64 else text[:61] + "..."
