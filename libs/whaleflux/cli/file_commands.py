"""What may stand in a file, and whether a file is right: without a fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from whaleflux.cli import output, submission
from whaleflux.cli.files import File, read
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output


def validate(file: File, fmt: Output = Format.table) -> None:
    """Checks a job or model file without a fleet; where there is a bash, it reads scripts, too, and runs nothing.

    \b
      whaleflux validate job.yaml
      whaleflux validate job.yaml -o json | jq .violations     for editors and CI; exit code 2 where there are some
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import InvalidArgument

    try:
        kind, names, remark = _valid(file)
    except InvalidArgument as error:
        if fmt.is_json:
            wrong = [{"field": v.field, "description": v.description} for v in error.violations]
            output.say_json({"file": file, "valid": False, "violations": wrong}, fmt)
        raise
    if fmt.is_json:
        notes = [remark] if remark else []
        output.say_json(
            {"file": file, "valid": True, "kind": kind, "names": names, "violations": [], "notes": notes}, fmt
        )
    elif fmt is Format.name:
        output.say(*names)
    else:
        next_ = f"whaleflux {'serve' if kind == 'model' else 'submit'} {file}"
        output.note(remark)
        output.note(f"{file} is a valid {kind} file; next: {next_}")


def _valid(file: str) -> tuple[str, list[str], str]:
    """Whether jobs or a model stand in it, the names that it gives, and a remark. Raises InvalidArgument naming each wrong field."""
    from whaleflux.cli import bash_syntax
    from whaleflux.errors import InvalidArgument
    from whaleflux.manifests.yaml_files import is_model, jobs_from_yaml, model_from_yaml

    text, base = read(file)
    if is_model(text):
        model = model_from_yaml(text, base)
        return "model", [model.model_id], submission.secrets_in_clear([model.model.engine])
    jobs = jobs_from_yaml(text, base)
    if wrong := bash_syntax.mistakes(jobs):
        raise InvalidArgument(wrong)
    return "job", [job.job_id for job in jobs if job.job_id], submission.secrets_in_clear(job.spec for job in jobs)


def explain_field(
    field: Annotated[str, typer.Argument(help="Field, or group of fields; all when it is left out.")] = "",
    model: Annotated[bool, typer.Option("--model", help="Of model files instead of job files.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Of files with a Ray cluster.")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="A JSON Schema of the file, for editors.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Says what may stand in a job or model file, or in one with a Ray cluster.

    \b
      whaleflux explain-field                              all fields of a job file
      whaleflux explain-field checkpoint.keep              one of them, with its limits and default
      whaleflux explain-field --json-schema > job.schema.json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests import reference

    if model and ray:
        raise InvalidArgument(FieldViolation("--ray", "and --model are of different files; give one of them"))
    kind = "model" if model else "ray" if ray else "job"
    if json_schema and field:
        raise InvalidArgument(FieldViolation("--json-schema", f"is of the whole file; leave out {field}"))
    if json_schema:
        output.say_json(reference.json_schema(kind), fmt)
    elif fmt.is_json:
        chosen = reference.find(kind, field) if field else reference.fields_of(kind)
        output.show([dict(reference.explained(kind, found)) for found in chosen], (), fmt)
    elif field:
        for found in reference.find(kind, field):
            output.say(*(f"{title:12}{text}" for title, text in reference.explained(kind, found)), "")
    else:
        for known in reference.fields_of(kind):
            output.say(f"{known.file:24}{known.about}" + (" (not yet)" if known.not_yet else ""))
