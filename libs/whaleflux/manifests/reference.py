"""The tables of fields as people and editors read them: text for one field, a page of Markdown, a JSON Schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.manifests.field import Field, groups
from whaleflux.manifests.job_fields import JOB_FIELDS
from whaleflux.manifests.model_fields import MODEL_FIELDS
from whaleflux.manifests.ray_file import RAY_FIELDS

TABLES: dict[str, tuple[Field, ...]] = {"job": JOB_FIELDS, "model": MODEL_FIELDS, "ray": RAY_FIELDS}
_MESSAGES = {"job": "JobSpec", "model": "Model", "ray": "RayCluster"}
_INTRODUCTIONS = {
    "job": """A job file says what to run and on how many GPUs; everything else has a default. `whaleflux submit job.yaml` shows the
plan before anything runs, `whaleflux validate job.yaml` checks a file without a fleet, and every mistake is named with its
line and what would be right.""",
    "model": """A model file says what serves a model and how often. `whaleflux deploy model.yaml` shows what will run and asks;
`whaleflux validate model.yaml` checks a file without a fleet.""",
    "ray": """A ray file says which Ray cluster the fleet is to have. `whaleflux ray up ray.yaml --dry-run` checks it, and the guide says
[how the cluster breathes](ray.md).""",
}


def fields_of(kind: str) -> list[Field]:
    """All fields that people write, in the order of the table."""
    return [field for field in TABLES[kind] if field.file]


def find(kind: str, name: str) -> list[Field]:
    """The field of that name, or all below it. Raises InvalidArgument where there is none."""
    found = [field for field in fields_of(kind) if field.file == name or field.file.startswith(f"{name}.")]
    if not found:
        known = ", ".join(field.file for field in fields_of(kind))
        raise InvalidArgument(FieldViolation("field", f"a {kind} file has no {name!r}; it has {known}"))
    return found


def explained(kind: str, field: Field) -> list[tuple[str, str]]:
    """What there is to know about one field, as titles and texts."""
    rows = [
        ("field", field.file),
        ("for", _about(field)),
        ("value", field.value.words()),
        ("default", "none, it is required" if field.required else field.default),
        ("example", _example(field)),
        ("contract", f"{_MESSAGES[kind]}.{field.path or 'name'}"),
    ]
    if "GPU type" in field.value.words():
        rows.append(("known types", ", ".join(CATALOGUE.types) + "; others go by the driver's name without its maker"))
    return [(title, text) for title, text in rows if text]


def _about(field: Field) -> str:
    return field.about + (" Not yet: it is checked and kept, and nothing acts on it." if field.not_yet else "")


def _example(field: Field) -> str:
    """As it stands in a file, in one line."""
    *outer, key = field.file.split(".")
    text = f"{key}: {field.example}"
    for group in reversed(outer):
        text = f"{group}: {{{text}}}"
    return text


def page(kind: str) -> str:
    """docs/guide/{kind}-file.md."""
    lines = [
        f"# The {kind} file",
        "",
        "<!-- Made from the table of fields by `make generate`; a test compares. -->",
        "",
        _INTRODUCTIONS[kind],
        "",
        f"`whaleflux explain-field{'' if kind == 'job' else f' --{kind}'} FIELD` prints one of these with the GPU types that are known, and with",
        "`--json-schema` a schema that editors complete and check with.",
        "",
        "| field | value | without it | |",
        "|---|---|---|---|",
    ]
    for field in fields_of(kind):
        without = "required" if field.required else field.default
        cells = (f"`{field.file}`", field.value.words(), without, _about(field))
        lines.append(_row(cells))
    lines += ["", "All of them at once:", "", "```yaml", *_full_example(kind), "```", ""]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    """Of a table in Markdown, where a bar within a cell is written with a backslash, also in code."""
    return "".join(["| ", " | ".join(cell.replace("|", "\\|") for cell in cells), " |"])


def _full_example(kind: str) -> Iterable[str]:
    """A file in which every field says something that can stand beside the others."""
    for key, below in groups((field for field in fields_of(kind) if not field.apart), 0):
        if below[0].file == key:
            yield f"{key}: {below[0].example}"
        else:
            yield f"{key}:"
            yield from (f"  {field.file.split('.')[1]}: {field.example}" for field in below)


def json_schema(kind: str) -> dict[str, Any]:
    """JSON Schema (2020-12) of a file."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"WhaleFlux {kind} file"}
    return title | _schema_of(fields_of(kind), 0)


def _schema_of(fields: Sequence[Field], depth: int) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key, below in groups(fields, depth):
        field = below[0]
        if field.file.count(".") == depth:
            properties[key] = {"description": field.about, **field.value.schema()}
        else:
            inner = _schema_of(below, depth + 1)
            short = [one.value.schema() for one in below if one.short]
            properties[key] = {"anyOf": [*short, inner]} if short else inner
    needed = [field.file for field in fields if field.required and field.file.count(".") == depth]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": needed} if needed else {})
