"""SkyPilot's task YAML (https://docs.skypilot.co/en/latest/reference/yaml-spec.html) as a job file. Pure."""

from __future__ import annotations

import re
from typing import Any

from whaleflux.manifests.importing.draft import GO_ON, Draft, positive, shaped
from whaleflux.manifests.importing.variables import PER_NODE, must_be_given, prologue, with_meeting_point

_NOTES = {
    "ports": "nothing is opened; `whaleflux port-forward` reaches a port of a running job",
    "use_spot": "GPUs are those of the fleet's nodes; nothing is rented",
    "job_recovery": "a lost node moves the job to others by itself",
    "spot_recovery": "a lost node moves the job to others by itself",
    "cpus": "nodes are chosen by their GPUs; cpus_per_rank limits what ranks use",
    "memory": "nodes are chosen by their GPUs; memory_per_rank limits what ranks use",
    "autostop": "there is no machine to stop: GPUs are free when the job ends",
    "labels": "jobs have no labels",
}
_WHERE = ("infra", "cloud", "region", "zone", "instance_type", "disk_size", "disk_tier", "network_tier", "max_hourly_cost",
          "accelerator_args", "local_disk", "volumes")  # fmt: skip


def read(content: dict[str, Any]) -> Draft:
    """The draft of a file's content."""
    draft = Draft("a SkyPilot task")
    content = shaped(draft, content, ("resources", "envs", "secrets", "file_mounts"))
    if "service" in content:
        draft.refuse(
            "service", "a service of SkyPilot is a model here: write a model file, see docs/guide/model-file.md"
        )
    if content.get("name"):
        draft.name(content["name"])
    nodes = positive(draft, "num_nodes", content.get("num_nodes", 1))
    _resources(draft, content.get("resources") or {}, nodes)
    checks = _environment(draft, content)
    for name in ("setup", "run"):
        if text := str(content.get(name) or "").strip("\n"):
            _script(draft, name, text, checks, nodes)
    draft.put("launch", "once")
    draft.put("retry.max_restarts", _restarts(content))
    _workdir(draft, content.get("workdir"))
    for path, source in (content.get("file_mounts") or {}).items():
        shown = source.get("source", source.get("name", "storage")) if isinstance(source, dict) else source
        draft.note(
            f"file_mounts {path}",
            f"{shown} is not mounted: put it on storage that nodes mount, or declare a dataset (`data`)",
        )
    for name in ("volumes", "config", "experimental", "inputs", "outputs", "event_callback", "pool"):
        if content.get(name):
            draft.note(name, "has no equivalent")
    _rest(draft, content)
    return draft


def _rest(draft: Draft, content: dict[str, Any]) -> None:
    known = {"service", "name", "num_nodes", "resources", "envs", "secrets", "setup", "run", "workdir", "file_mounts", "volumes", "config",
             "experimental", "inputs", "outputs", "event_callback", "pool"}  # fmt: skip
    for name in content.keys() - known:
        draft.refuse(name, "is no field of a SkyPilot task that is known here")
    if not content.get("run") and "service" not in content:
        draft.refuse("run", "is missing: a job is what it runs")


def _script(draft: Draft, name: str, text: str, checks: str, nodes: int) -> None:
    body = with_meeting_point(draft, text)
    draft.put(name, f"{GO_ON}\n{checks if name == 'run' else ''}{prologue(draft, body, PER_NODE, nodes)}{body}")
    if re.search(r"\bconda activate\b", text) and "conda shell" not in text:
        draft.note(
            f"conda activate in {name}", 'bash is not interactive here: put `eval "$(conda shell.bash hook)"` before it'
        )


def _environment(draft: Draft, content: dict[str, Any]) -> str:
    """Puts variables with values; gives lines that ask for the others."""
    checks = ""
    for name, value in (content.get("envs") or {}).items():
        if value is None or value == "":
            checks += must_be_given(name)
            draft.note(
                f"envs {name}",
                f"has no value in the file: submit with --env {name}; without it the job ends at once and says so",
            )
        else:
            draft.fields.setdefault("environment", {})[name] = str(value)
    for name, value in (content.get("secrets") or {}).items():
        draft.secret(str(name), f"secrets {name}", kept=bool(value))
    return checks


def _restarts(content: dict[str, Any]) -> int:
    recovery = (content.get("resources") or {}).get("job_recovery")
    given = recovery.get("max_restarts_on_errors", 0) if isinstance(recovery, dict) else 0
    return given if isinstance(given, int) else 0


def _workdir(draft: Draft, workdir: object) -> None:
    if isinstance(workdir, dict):
        draft.note(
            "workdir",
            f"{workdir.get('url', 'a repository')} is not cloned: do it in setup, or check it out and write workdir: .",
        )
    elif workdir:
        draft.put("workdir", str(workdir))
    else:
        draft.put("workdir", "none")
        draft.note("workdir", "SkyPilot runs in the home directory of a machine of its own; here it is a fresh folder")


def _resources(draft: Draft, resources: dict[str, Any], nodes: int) -> None:
    resources = shaped(draft, resources, (), ("any_of", "ordered"))
    options = [one for one in resources.get("any_of") or resources.get("ordered") or [] if isinstance(one, dict)]
    if resources.get("ordered"):
        draft.note("resources.ordered", "the order is not kept: the scheduler takes what fits best")
    wanted = [_accelerators(one.get("accelerators")) for one in (resources, *options) if one.get("accelerators")]
    found = [pair for pairs in wanted for pair in pairs]
    counts = {count for _, count in found}
    if not found:
        draft.gpus(nodes, 0)
    elif len(counts) > 1:
        draft.refuse(
            "resources.accelerators",
            f"asks for another number of each type ({sorted(counts)}); ranks are as many whatever the type",
        )
    elif not (count := counts.pop()).isdigit():
        draft.refuse("resources.accelerators", f"{count} of a GPU: write gpu: {{memory: ...}} with gpus: 1")
    elif any(name.lower().startswith(("tpu", "trainium", "inferentia", "mi300")) for name, _ in found):
        draft.refuse("resources.accelerators", "names no GPU of NVIDIA; others are not run")
    else:
        draft.gpus(nodes, positive(draft, "resources.accelerators", count))
        draft.gpu_types([name for name, _ in found])
    _places(draft, resources, options)


def _places(draft: Draft, resources: dict[str, Any], options: list[dict[str, Any]]) -> None:
    image = str(resources.get("image_id") or "")
    if image.startswith("docker:"):
        draft.put("image", image.removeprefix("docker:"))
    elif image:
        draft.note("resources.image_id", f"{image} is a machine's image; nodes bring their own system")
    for one in (resources, *options):
        for name in one:
            if name in _WHERE:
                draft.note(
                    f"resources.{name}",
                    f"{one[name]} is not kept: nodes are those that joined the fleet; `sites` chooses among them",
                )
            elif name in _NOTES:
                draft.note(f"resources.{name}", _NOTES[name])
            elif name not in ("accelerators", "any_of", "ordered", "image_id"):
                draft.note(f"resources.{name}", "has no equivalent")


def _accelerators(value: Any) -> list[tuple[str, str]]:
    """(type, number as text) of "A100:8", {A100: 8} or ["A100:8", "H100:8"]."""
    if isinstance(value, dict):
        return [(str(name), _number(count)) for name, count in value.items()]
    items = value if isinstance(value, list) else [value]
    pairs = [str(item).partition(":") for item in items]
    return [(name.strip(), _number(count or 1)) for name, _, count in pairs]


def _number(value: object) -> str:
    text = str(value).strip()
    return text.removesuffix(".0")
