"""dstack's configurations (https://dstack.ai/docs/reference/dstack.yml/) as a job or model file. Pure."""

from __future__ import annotations

import re
from typing import Any

from whaleflux.manifests.importing.draft import GO_ON, Draft, positive, shaped
from whaleflux.manifests.importing.variables import PER_NODE, must_be_given, prologue, with_meeting_point

_NOTES = {
    "python": "nodes and images bring their own Python; use `setup` or an image for this version",
    "nvcc": "nodes and images bring their own CUDA",
    "ports": "nothing is opened; `whaleflux port-forward` reaches a port of a running job",
    "ide": "open it over `whaleflux shell` or `port-forward`",
    "inactivity_duration": "a job is not watched for use; time_limit ends it",
    "spot_policy": "GPUs are those of the fleet's nodes; nothing is rented",
    "retry": "a lost node moves the job to others by itself; retry.max_restarts says how often a failure of the work is retried",
    "utilization_policy": "a job is not ended for idle GPUs",
    "privileged": "containers are not privileged",
    "registry_auth": "the container engine of each node has its own credentials",
    "shell": "scripts are run by bash",
    "user": "containers run as their image says",
    "home_dir": "containers are as their image says",
    "entrypoint": "a script takes the place of the image's entry point",
    "stop_criteria": "a job ends with its first failing node, or when all have ended",
    "startup_order": "all nodes start together",
    "volumes": "is not mounted: use storage that nodes mount",
    "files": "is not copied: put it into the workdir",
    "repos": "is not cloned: do it in `setup`, or submit from a checkout with workdir: .",
    "tags": "jobs have no labels",
    "single_branch": "has no equivalent",
    "init": "",
}
_WHERE = (
    "backends",
    "regions",
    "availability_zones",
    "instance_types",
    "fleets",
    "reservation",
    "max_price",
    "creation_policy",
    "idle_duration",
)
_REFUSED = {"schedule": "runs are not repeated by a calendar", "docker": "there is no Docker inside of a job"}
_KNOWN = {"type", "name", "nodes", "image", "commands", "env", "resources", "max_duration", "stop_duration", "priority", "working_dir",
          "port", "model", "replicas", "https", "auth", "scaling", "rate_limits", "probes", "gateway", "strip_prefix"}  # fmt: skip


def read(content: dict[str, Any]) -> Draft:
    """The draft of a configuration."""
    kind = str(content.get("type"))
    draft = Draft(f"a dstack {kind}", "model" if kind == "service" else "job")
    if kind not in ("task", "dev-environment", "service"):
        draft.refuse("type", f"{kind!r} is no work: only task, dev-environment and service become files")
        return draft
    content = shaped(draft, content, ("resources",), ("commands", "init"))
    for name in (content.get("resources") or {}).keys() - {"gpu"}:
        draft.note(f"resources.{name}", "nodes are chosen by their GPUs")
    if kind != "service" and content.get("name"):
        draft.name(content["name"])
    for name, why in _REFUSED.items():
        if content.get(name):
            draft.refuse(name, why)
    for name in content:
        if name in _WHERE:
            draft.note(name, "is not kept: nodes are those that joined the fleet; `sites` chooses among them")
        elif _NOTES.get(name):
            draft.note(name, _NOTES[name])
        elif name not in (*_KNOWN, *_NOTES, *_REFUSED):
            draft.refuse(name, "is no field of a dstack configuration that is known here")
    _service(draft, content) if kind == "service" else _job(draft, content, kind)
    return draft


def _job(draft: Draft, content: dict[str, Any], kind: str) -> None:
    nodes = positive(draft, "nodes", content.get("nodes", 1))
    gpus, types, memory = _gpu(draft, (content.get("resources") or {}).get("gpu"))
    draft.gpus(nodes, gpus)
    _gpu_fields(draft, types, memory, "gpu.memory")
    commands = [str(one) for one in content.get("commands") or content.get("init") or []]
    if kind == "dev-environment":
        commands.append("exec sleep infinity")
        draft.note(
            "dev-environment", "is a job that waits: enter it with `whaleflux shell`, end it with `whaleflux cancel`"
        )
    checks = _environment(draft, content.get("env"), "environment")
    body = with_meeting_point(draft, _joined(commands))
    if commands:
        draft.put("run", f"{GO_ON}\n{checks}{prologue(draft, body, PER_NODE, nodes)}{body}")
    elif not content.get("image"):
        draft.refuse("commands", "is missing: a job is what it runs")
    draft.put("launch", "once")
    draft.put("image", content.get("image"))
    _limits(draft, content)
    draft.put("workdir", ".")


def _limits(draft: Draft, content: dict[str, Any]) -> None:
    draft.put("retry.max_restarts", None if _retries_errors(content.get("retry")) else 0)
    for name, field in (("max_duration", "time_limit"), ("stop_duration", "stop_grace")):
        value = content.get(name)
        if value is not None and value not in ("off", False):
            draft.put(field, _time(draft, name, value))
    if isinstance(content.get("priority"), int):
        draft.put("priority", content["priority"])
    if content.get("working_dir"):
        draft.note("working_dir", f"commands begin in the job's folder: put `cd {content['working_dir']}` first")


def _retries_errors(retry: object) -> bool:
    return retry is True or (isinstance(retry, dict) and "error" in retry.get("on_events", ["error"]))


def _time(draft: Draft, name: str, value: object) -> str:
    if isinstance(value, int):
        return f"{value} s"
    found = re.fullmatch(r"(\d+)\s*(s|m|h|d|w)", str(value))
    if found is None:
        draft.refuse(name, f"{value!r} is no time such as 30m, 2h or 1d")
        return "1 s"
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]
    return f"{seconds} s"


def _joined(commands: list[str]) -> str:
    """Dstack joins commands by &&; those of several lines, with comments, or in the background stand in braces."""
    parts = [one.strip() for one in commands]
    return " &&\n".join(
        f"{{ {one}\n}}" if "\n" in one or "#" in one or one.endswith("&") else one for one in parts if one
    )


def _environment(draft: Draft, env: Any, field: str) -> str:
    if env is not None and not isinstance(env, dict | list):
        draft.refuse("env", "must be variables and values, or a list of them")
        return ""
    items = env.items() if isinstance(env, dict) else [_pair(one) for one in env or []]
    checks, place = "", field.split(".")
    for name, value in items:
        if value is None:
            checks += must_be_given(name)
            draft.note(
                f"env {name}",
                f"has no value in the file: submit with --env {name}; without it the job ends at once and says so",
            )
            continue
        if reference := _SECRET.fullmatch(str(value).strip()):
            secrets = ".".join([*place[:-1], "secrets"])
            draft.secret(str(name), f"env {name}", name=reference[1], field=secrets)
            continue
        group = draft.fields
        for key in place:
            group = group.setdefault(key, {})
        group[name] = str(value)
    return checks


_SECRET = re.compile(r"\$\{\{\s*secrets\.([A-Za-z0-9_-]+)\s*\}\}")  # https://dstack.ai/docs/concepts/secrets


def _pair(item: object) -> tuple[str, str | None]:
    name, equal, value = str(item).partition("=")
    return name, value if equal else None


def _gpu(draft: Draft, value: Any) -> tuple[int, list[str], str]:
    """Number per node, types, least memory of each ("" for any), of `80GB:4..`, `A100,H100:8`, 4, or {name, memory, count}."""
    if value is None:
        return 0, [], ""
    if isinstance(value, dict):
        names = value.get("name") or []
        parts = [
            ",".join(map(str, names)) if isinstance(names, list) else str(names),
            _with_unit(_range(draft, value, "memory")),
            _range(draft, value, "count") or "1",
        ]
        for name in value.keys() - {"name", "memory", "count", "vendor"}:
            draft.note(f"resources.gpu.{name}", f"{value[name]} is not kept")
    else:
        parts = str(value).split(":")
    count, types, memory = "1", list[str](), ""
    for part in filter(None, parts):
        if re.fullmatch(r"(\d+)?(\.\.)?(\d+)?", part):
            count = part
        elif re.search(r"\d\s*[GMT]B", part):
            memory = part
        elif part.lower() not in ("nvidia",):
            types += [name.strip() for name in part.split(",")]
    if any(
        name.lower() in ("amd", "google", "tenstorrent", "intel", "tpu", "mi300x")
        or name.lower().startswith(("mi", "v5", "tpu"))
        for name in types
    ):
        draft.refuse("resources.gpu", f"{', '.join(types)}: only GPUs of NVIDIA are run")
    return _least_count(draft, count), types, _least_memory(draft, memory)


def _range(draft: Draft, gpu: dict[str, Any], name: str) -> str:
    """4, `4..8`, or {min: 4, max: 8} as `4..8`; "" where it is not said."""
    value = gpu.get(name)
    if isinstance(value, dict):
        if value.keys() - {"min", "max"} or not value:
            draft.refuse(f"resources.gpu.{name}", "must be a number, a range, or min and max")
            return ""
        return f"{value.get('min') or ''}..{value.get('max') or ''}"
    return "" if value is None else str(value)


def _with_unit(text: str) -> str:
    """A memory; numbers alone are GB."""
    return re.sub(r"(?<![\d.])(\d+(?:\.\d+)?)(?=$|\.\.)", r"\1GB", text)


def _least_count(draft: Draft, text: str) -> int:
    if ".." in text:
        draft.note("resources.gpu", f"{text} GPUs: a job has as many ranks as it asks for, here the least")
    return positive(draft, "resources.gpu", text.partition("..")[0] or 1)


def _least_memory(draft: Draft, text: str) -> str:
    least, dots, most = text.partition("..")
    if dots and most:
        draft.note("resources.gpu", f"at most {most} of memory is not kept")
    return least


def _gpu_fields(draft: Draft, types: list[str], memory: str, field: str) -> None:
    draft.gpu_types(types)
    if memory:
        draft.put(field, ">= " + re.sub(r"\s*([GMT]B)", r" \1", memory))


def _service(draft: Draft, content: dict[str, Any]) -> None:
    model = content.get("model")
    name = content.get("name") or (model.get("name") if isinstance(model, dict) else model)
    draft.name(name or "model", "model")
    gpus, types, memory = _gpu(draft, (content.get("resources") or {}).get("gpu"))
    if memory:
        draft.note("resources.gpu", f"{memory} of memory is not kept: replicas.on names types")
    port = str(content.get("port", "")).rpartition(":")[2]
    body = _joined([str(one) for one in content.get("commands") or []])
    if not re.search(rf"\b{port}\b", body) or not port:
        draft.refuse(
            "port", f"the commands do not name the port {port}: each replica is given one, say where with {{port}}"
        )
    checks = _environment(draft, content.get("env"), "engine.environment")
    listening = re.sub(rf"\b{port}\b", "{port}", body)
    draft.note("port", f"{port} is replaced by {{port}}: each replica is given one")
    draft.put("engine.run", f"{GO_ON}\n{checks}{prologue(draft, body, PER_NODE, 1)}{listening}")
    draft.put("engine.image", content.get("image"))
    if not gpus:
        draft.refuse("resources.gpu", "is missing: a replica has at least one GPU")
    draft.put("engine.gpus", max(1, gpus))
    least, dots, most = str(content.get("replicas", 1)).partition("..")
    draft.put("replicas.min", positive(draft, "replicas", least) if least != "0" else 0)
    draft.put("replicas.max", positive(draft, "replicas", most) if dots else None)
    engine_types = Draft("")
    engine_types.gpu_types(types)
    draft.notes += engine_types.notes
    draft.put("replicas.on", engine_types.fields.get("gpu", {}).get("any"))
    for extra in ("https", "auth", "scaling", "rate_limits", "probes", "gateway", "strip_prefix"):
        if extra in content:
            draft.note(extra, "has no equivalent; the front door and API keys stand before all models")
