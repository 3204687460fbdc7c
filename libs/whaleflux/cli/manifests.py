"""job.yaml and model.yaml: what users write, checked field by field, as messages of the contract.

Every mistake is found at once and named with its field, its line and what would be right; unknown fields are mistakes.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from whaleflux import names
from whaleflux.cli import quantities
from whaleflux.errors import FieldViolation, Invalid

if TYPE_CHECKING:
    from whaleflux.v1 import router_pb2, scheduler_pb2

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_LIST = 1000
_LEVELS = {"site": 1, "zone": 2, "spine": 3, "leaf": 4, "node": 5, "nvlink": 6}


@dataclass(frozen=True, slots=True)
class JobManifest:
    """A job file: queue, id ("" lets the scheduler make one) and spec."""

    queue: str
    job_id: str
    spec: scheduler_pb2.JobSpec


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A model file."""

    model_id: str
    model: router_pb2.Model


class _Line(dict[Any, Any]):
    """A mapping that knows the line of each of its keys."""

    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    """Plain data only; no aliases (a few bytes of them can stand for gigabytes); lines kept; duplicate keys refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = True) -> _Line:
        content = _Line()
        content.lines = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            # `on:` is a boolean in YAML 1.1, and people mean the word.
            key = {True: "on", False: "off"}.get(key, key) if isinstance(key, bool) else str(key)
            if key in content:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands here twice", problem_mark=key_node.start_mark)
            content[key] = self.construct_object(value_node, deep=True)
            content.lines[key] = key_node.start_mark.line + 1
        return content


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


class _Reader:
    """Takes fields out of a mapping, noting what is wrong, and at the end what is left over."""

    def __init__(self, content: object, path: str, wrong: list[FieldViolation]) -> None:
        self._path, self._wrong = path, wrong
        self._known: list[str] = []
        self._content: Mapping[str, Any] = content if isinstance(content, dict) else {}
        self._lines: dict[str, int] = getattr(content, "lines", {})
        if not isinstance(content, dict):
            self._note("", f"must be fields and values, not {_kind(content)}")

    def take(self, key: str, parse: Callable[[Any], Any], default: Any) -> Any:
        """The parsed value of `key`; `default` when it is absent or wrong (which is noted)."""
        self._known.append(key)
        value = self._content.get(key)
        if value is None:
            return default
        try:
            return parse(value)
        except ValueError as error:
            self._note(key, str(error))
        except Invalid as refused:
            self._note(key, "; ".join(v.description for v in refused.violations))
        return default

    def require(self, key: str, hint: str) -> None:
        """Notes a missing field."""
        if self._content.get(key) is None:
            self._note(key, f"is missing; {hint}")

    def inner(self, key: str) -> _Reader:
        """The fields below `key`; an empty mapping when it is absent."""
        self._known.append(key)
        value = self._content.get(key)
        return _Reader({} if value is None else value, self._name(key), self._wrong)

    def raw(self, key: str) -> Any:
        self._known.append(key)
        return self._content.get(key)

    def done(self) -> None:
        """Notes every field that nobody took."""
        for key in self._content:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else "known are: " + ", ".join(sorted(self._known))
                self._note(key, f"is not a field; {hint}")

    def _name(self, key: str) -> str:
        shown = key if len(key) <= 80 else key[:77] + "..."
        return f"{self._path}.{shown}".strip(".")

    def _note(self, key: str, what: str) -> None:
        line = self._lines.get(key)
        self._wrong.append(FieldViolation(self._name(key) or "file", what + (f" (line {line})" if line else "")))


def job_from_yaml(text: str, base: Path) -> JobManifest:
    """A job file; relative folders in it are below `base`. Raises Invalid naming every mistake."""
    from whaleflux.v1 import scheduler_pb2

    wrong: list[FieldViolation] = []
    file = _Reader(_load(text), "", wrong)
    spec = scheduler_pb2.JobSpec()
    job_id = file.take("name", lambda v: names.check_id("name", _text(v)), "")
    queue = file.take("queue", lambda v: names.check_id("queue", _text(v)), "default")
    spec.command.extend(file.take("run", _command, []))
    spec.image = file.take("image", _text, "")
    if not spec.image:
        file.require("run", "give the command line that starts one rank, for example: python train.py")
    spec.gpus = file.take("gpus", _whole(1, 100_000), 0)
    file.require("gpus", "say how many GPUs the job needs, one rank each")
    _nodes(file.inner("nodes"), spec)
    _gpu(file.raw("gpu"), spec, wrong)
    _place(file.inner("place"), spec)
    spec.datasets.extend(f"datasets/{d}" for d in file.take("data", _datasets, []))
    spec.require_local_data = file.take("require_local_data", _flag, False)
    spec.environment.update(file.take("environment", _variables, {}))
    spec.priority = file.take("priority", _whole(0, 1000), 0)
    _retry(file.inner("retry"), spec)
    _checkpoint(file.inner("checkpoint"), spec)
    _partition(file.take("on_partition", _text, ""), spec, wrong)
    if (deadline := file.take("deadline", quantities.instant, None)) is not None:
        spec.deadline_time.FromDatetime(deadline)
    spec.budget_usd = file.take("budget", quantities.dollars, 0.0)
    spec.kind = file.take("kind", _one_of({"training": 1, "service": 2}), 1)
    spec.working_directory = file.take("directory", lambda v: str((base / _text(v)).resolve()), "")
    spec.cpu_millicores_per_rank = file.take("cpus_per_rank", lambda v: round(1000 * _positive(v)), 0)
    spec.memory_bytes_per_rank = file.take("memory_per_rank", quantities.size_bytes, 0)
    if (grace := file.take("stop_grace", quantities.seconds, None)) is not None:
        spec.stop_grace.FromMilliseconds(round(1000 * grace))
    spec.sites.extend(file.take("sites", _texts, []))
    file.done()
    _refuse(wrong)
    return JobManifest(queue, job_id, spec)


def model_from_yaml(text: str, base: Path) -> ModelManifest:
    """A model file; relative folders in it are below `base`. Raises Invalid naming every mistake."""
    from whaleflux.v1 import router_pb2

    wrong: list[FieldViolation] = []
    file = _Reader(_load(text), "", wrong)
    model = router_pb2.Model()
    model_id = file.take("model", lambda v: names.check_id("model", _text(v).lower().replace(".", "-")), "")
    file.require("model", "give the name that clients ask for")
    engine = file.inner("engine")
    model.engine.kind = engine.take("kind", _one_of({k: k for k in ("openai", "vllm", "sglang")}), "openai")
    model.engine.command.extend(engine.take("run", _command, []))
    model.engine.command.extend(engine.take("args", _texts, []))
    model.engine.image = engine.take("image", _text, "")
    model.engine.addresses.extend(engine.take("url", _addresses, []))
    model.engine.gpus = engine.take("gpus", _whole(1, 64), 1)
    model.engine.environment.update(engine.take("environment", _variables, {}))
    model.engine.health_path = engine.take("health", _text, "")
    model.engine.working_directory = engine.take("directory", lambda v: str((base / _text(v)).resolve()), "")
    engine.done()
    replicas = file.inner("replicas")
    model.replicas.min = replicas.take("min", _whole(0, 1000), 1)
    model.replicas.max = replicas.take("max", _whole(1, 1000), 0)
    model.engine.gpu_models.extend(replicas.take("on", _texts, []))
    replicas.done()
    objective = file.inner("slo")
    for key, field in (("first_token", model.objective.first_token), ("per_token", model.objective.per_token)):
        if (limit := objective.take(key, quantities.seconds, None)) is not None:
            field.FromMilliseconds(round(1000 * limit))
    objective.done()
    model.context_window_tokens = file.take("context", _whole(0, 10**9), 0)
    for rule in file.take("classes", _list, []):
        one = _Reader(rule, "classes", wrong)
        tokens, on = one.take("up_to_tokens", _whole(1, 10**9), 0), one.take("on", _texts, [])
        one.done()
        model.classes.append(router_pb2.RequestClass(max_prompt_tokens=tokens, gpu_models=on))
    file.done()
    _refuse(wrong)
    return ModelManifest(model_id, model)


def is_model(text: str) -> bool:
    """Whether a file declares a model rather than a job; raises Invalid where it is no YAML."""
    content = _load(text)
    return isinstance(content, dict) and "model" in content


def _load(text: str) -> object:
    if len(text) > MAX_FILE_BYTES:
        raise Invalid(FieldViolation("file", f"has {len(text)} characters, at most {MAX_FILE_BYTES}"))
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise Invalid(FieldViolation("file", f"is not YAML: {' '.join(str(error).split())[:500]}")) from None
    except (ValueError, RecursionError, OverflowError) as error:  # odd dates and numbers
        raise Invalid(FieldViolation("file", f"cannot be read: {str(error)[:200]}")) from None


def _refuse(wrong: list[FieldViolation]) -> None:
    if wrong:
        raise Invalid(wrong[:50])


def _nodes(reader: _Reader, spec: scheduler_pb2.JobSpec) -> None:
    spec.nodes.min = reader.take("min", _whole(1, 100_000), 0)
    spec.nodes.max = reader.take("max", _whole(1, 100_000), 0)
    reader.done()


def _gpu(value: object, spec: scheduler_pb2.JobSpec, wrong: list[FieldViolation]) -> None:
    """A name, a list of names, or properties."""
    if value is None:
        return
    if not isinstance(value, dict):
        content = _Line(any=[value] if isinstance(value, str) else value)
        content.lines = {}
        value = content
    reader = _Reader(value, "gpu", wrong)
    spec.gpu.any_of.extend(reader.take("any", _texts, []))
    spec.gpu.min_memory_bytes = reader.take("memory", quantities.size_bytes, 0)
    spec.gpu.min_compute_capability = reader.take("compute_capability", lambda v: round(10 * _positive(v)), 0)
    reader.done()


def _place(reader: _Reader, spec: scheduler_pb2.JobSpec) -> None:
    """{tensor: nvlink} or {tensor: {level: nvlink, size: 8, preferred: true}}."""
    for group in list(reader._content):
        value = reader.raw(group)
        if not isinstance(value, dict):
            level = reader.take(group, _one_of(_LEVELS), 0)
            spec.placement.add(group=group[:63], level=level)
            continue
        rule = reader.inner(group)
        level = rule.take("level", _one_of(_LEVELS), 0)
        rule.require("level", "use one of: " + ", ".join(_LEVELS))
        size, preferred = rule.take("size", _whole(1, 100_000), 0), rule.take("preferred", _flag, False)
        spec.placement.add(group=group[:63], level=level, size=size, preferred=preferred)
        rule.done()


def _retry(reader: _Reader, spec: scheduler_pb2.JobSpec) -> None:
    if (restarts := reader.take("max_restarts", _whole(0, 10_000), None)) is not None:
        spec.retry.max_restarts = restarts
    if (backoff := reader.take("backoff", quantities.seconds, None)) is not None:
        spec.retry.backoff.FromMilliseconds(round(1000 * backoff))
    reader.done()


def _checkpoint(reader: _Reader, spec: scheduler_pb2.JobSpec) -> None:
    every = reader.take("every", lambda v: 0 if v == "auto" else _whole(1, 10**9)(v), 0)
    spec.checkpoint.every_steps = every
    spec.checkpoint.keep = reader.take("keep", _whole(1, 1000), 0)
    spec.checkpoint.location = reader.take("location", _text, "")
    reader.done()


def _partition(value: str, spec: scheduler_pb2.JobSpec, wrong: list[FieldViolation]) -> None:
    """Either `wait 10m` or `never reroute`."""
    if not value:
        return
    if value.strip() == "never reroute":
        spec.on_partition.never_reroute = True
        return
    try:
        if not value.strip().startswith("wait "):
            raise ValueError
        spec.on_partition.wait.FromMilliseconds(round(1000 * quantities.seconds(value.strip()[5:])))
    except ValueError:
        wrong.append(FieldViolation("on_partition", "must be 'wait 10 min' (any time) or 'never reroute'"))


def _kind(value: object) -> str:
    kinds = {str: "text", list: "a list", dict: "fields", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be text, not {_kind(value)}")
    text = str(value)
    if not text or len(text) > 65_536 or "\0" in text or not text.isprintable():
        raise ValueError("must be printable text of 1 to 65536 characters on one line")
    return text


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list, not {_kind(value)}")
    if len(value) > _MAX_LIST:
        raise ValueError(f"has {len(value)} items, at most {_MAX_LIST}")
    return value


def _texts(value: object) -> list[str]:
    return [_text(item) for item in _list([value] if isinstance(value, str) else value)]


def _command(value: object) -> list[str]:
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}; check its quotes") from None
    return _texts(value)


def _whole(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"must be a whole number, {least} to {most}")
        return value

    return parse


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 10**6:
        raise ValueError("must be a number above 0 and below 1000000")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _one_of(choices: Mapping[str, Any]) -> Callable[[object], Any]:
    def parse(value: object) -> Any:
        if isinstance(value, str) and value.lower() in choices:
            return choices[value.lower()]
        raise ValueError("must be one of: " + ", ".join(choices))

    return parse


def _variables(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_LIST:
        raise ValueError(f"must be at most {_MAX_LIST} variables with their values")
    return {_text(name): "" if content == "" else _text(content) for name, content in value.items()}


def _datasets(value: object) -> list[str]:
    return [names.check_id("data", item.removeprefix("dataset:")) for item in _texts(value)]


def _addresses(value: object) -> list[str]:
    """host:port, or a URL of which only those count."""
    found = []
    for item in _texts(value):
        address = item.removeprefix("http://").rstrip("/").removesuffix("/v1")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in address:
            raise ValueError("must be http://host:port of servers that run already")
        found.append(address)
    return found
