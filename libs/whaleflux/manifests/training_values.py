"""What a job file says of a model that is planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.job_values import KnownModel
from whaleflux.manifests.text_values import text
from whaleflux.manifests.values import Schema, Violations
from whaleflux.planning.known_models import MODELS, model_named
from whaleflux.planning.model_files import MAX_BYTES, model_from_text
from whaleflux.planning.model_shape import ModelShape

MAX_MODEL_CHARS = 16 << 10


class TrainedModel(KnownModel):
    """A model that is planned: a known name, a file that describes one, or its fields; in messages the name, or the fields as JSON."""

    def words(self) -> str:
        return "name of a model, a file that describes it (config.json, YAML), or its fields"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, dict):
            return self._checked(_json(value))
        said = text(value)
        if said.endswith((".json", ".yaml", ".yml")):
            described = model_text(_described(base / said))
            return self._checked(described) if described.startswith("{") else described
        return model_named(said).name

    def _checked(self, fields: str) -> str:
        if len(fields) > MAX_MODEL_CHARS:
            raise ValueError(f"has {len(fields)} characters; at most {MAX_MODEL_CHARS}")
        try:
            model_from_text(fields)
        except InvalidArgument as wrong:
            raise ValueError("; ".join(f"{one.field}: {one.description}" for one in wrong.violations)) from None
        return fields

    def violations(self, at: str, value: Any) -> Violations:
        if not value.startswith("{"):
            yield from super().violations(at, value)
            return
        try:
            self._checked(value)
        except ValueError as wrong:
            yield FieldViolation(at, str(wrong))

    def schema(self) -> Schema:
        return {"type": ["string", "object"], "maxLength": MAX_MODEL_CHARS}


def _json(fields: dict[Any, Any]) -> str:
    try:
        return json.dumps(fields)
    except (TypeError, ValueError, RecursionError):  # dates, sets, keys of YAML
        raise ValueError("holds something besides names, numbers, true and false; see: whaleflux fits --list") from None


def _described(path: Path) -> ModelShape:
    try:
        with path.open(encoding="utf-8") as file:
            return model_from_text(
                file.read(MAX_BYTES + 1), path.stem if path.stem != "config" else path.resolve().parent.name
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None
    except InvalidArgument as wrong:
        raise ValueError("; ".join(f"{one.field}: {one.description}" for one in wrong.violations)) from None


def _fields_of(shape: ModelShape) -> dict[str, Any]:
    """As a file of few fields says it."""
    found = dataclasses.asdict(shape)
    return {name: value for name, value in found.items() if value not in (None, 0, False)} | {
        "gated": shape.gated,
        "tied": shape.tied,
    }


def model_text(shape: ModelShape) -> str:
    """As messages have it: the name where the planner knows it, else its fields as JSON."""
    return shape.name if MODELS.get(shape.name) == shape else json.dumps(_fields_of(shape))
