"""Which system a file is of, and the file that it becomes here: the one entry to all formats. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.importing import accelerate, dstack, sbatch, skypilot, torchrun
from whaleflux.manifests.importing.draft import Draft
from whaleflux.manifests.yaml_text import load

FORMATS = ("sbatch", "skypilot", "dstack", "accelerate", "torchrun")


@dataclass(frozen=True, slots=True)
class Imported:
    """A job or model file (`kind`), and what has no equivalent in it: (what, why)."""

    kind: str
    text: str
    notes: tuple[tuple[str, str], ...]


def imported(text: str, file: str = "-", *, source: str = "", command: str = "") -> Imported:
    """The file that `text` becomes. `source` is one of FORMATS, "" to find out; `command` is what accelerate runs.

    Raises InvalidArgument with everything that would mean something else here.
    """
    kind = source or format_of(text)
    if kind == "sbatch":
        draft = sbatch.read(text, "" if file == "-" else file)
    elif kind == "torchrun":
        draft = torchrun.read(text)
    else:
        draft = _from_yaml(kind, _mapping(text), file, command)
    return Imported(draft.kind, draft.text(), tuple(draft.notes))


def _from_yaml(kind: str, content: dict[str, Any], file: str, command: str) -> Draft:
    if kind == "accelerate":
        return accelerate.read(content, file, command)
    return dstack.read(content) if kind == "dstack" else skypilot.read(content)


def format_of(text: str) -> str:
    """Of which system a file is. Raises InvalidArgument where nothing says so."""
    if re.search(r"(?m)^#SBATCH\s", text):
        return "sbatch"
    if text.startswith("#!") or re.match(r"\s*(?:torchrun|python3? -m torch\.distributed)\b", text):
        return "torchrun"
    content = _mapping(text)
    if "distributed_type" in content or "compute_environment" in content:
        return "accelerate"
    if str(content.get("type")) in ("task", "dev-environment", "service", "fleet", "volume", "gateway"):
        return "dstack"
    if content.keys() & {"resources", "num_nodes", "file_mounts", "envs", "setup"} and "gpus" not in content:
        return "skypilot"
    raise InvalidArgument(
        FieldViolation("file", f"is of no system that is known here; say which with --from ({', '.join(FORMATS)})")
    )


def of_another_system(text: str) -> str:
    """Which system's file somebody gave for a job file; "" where it looks like none."""
    try:
        kind = format_of(text)
    except InvalidArgument:
        return ""
    sure = kind != "skypilot" or _mapping(text).keys() & {"resources", "num_nodes", "file_mounts", "envs"}
    return kind if sure else ""


def _mapping(text: str) -> dict[str, Any]:
    content = load(text)
    if not isinstance(content, dict):
        raise InvalidArgument(FieldViolation("file", "is neither fields and values (YAML) nor a script for sbatch"))
    return content
