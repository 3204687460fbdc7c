"""`sites` of a model file: where it runs, how often, and what is otherwise there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.text_values import Texts, Variables, texts
from whaleflux.manifests.values import Schema, Value, Violations, Whole

MOST_SITES = 100
MAX_REPLICAS = 1000  # of all sites together


@dataclass(frozen=True, slots=True)
class Site:
    """A site that runs a model; `replicas` 0: as many as the model's `replicas.min`."""

    site: str  # sites/{site}
    replicas: int = 0
    gpu_models: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = field(default=())


@dataclass(frozen=True)
class Sites(Value):
    """Names, or names with a number of replicas or fields of their own."""

    def words(self) -> str:
        return "list of sites, or `{SITE: REPLICAS}`, or `{SITE: {replicas, on, args, environment}}`"

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> list[Site] | None:
        if isinstance(reader.raw(key), (str, list)):
            return reader.take(key, lambda value: [Site(_site(name)) for name in texts(value)], absent)  # type: ignore[no-any-return]
        inner = reader.inner(key)
        return [found for name in inner.keys() if (found := self._one(inner, name, base))]  # noqa: SIM118 - a reader is no mapping

    def _one(self, reader: Reader, name: str, base: Path) -> Site | None:
        try:
            site = _site(name)
        except InvalidArgument as wrong:
            reader.raw(name)
            reader.note(name, wrong.violations[0].description)
            return None
        if not isinstance(reader.raw(name), dict):
            return Site(site, Whole(1, MAX_REPLICAS).take(reader, name, base, 0))
        inner = reader.inner(name)
        found = Site(
            site,
            Whole(1, MAX_REPLICAS).take(inner, "replicas", base, 0),
            tuple(Texts().take(inner, "on", base, ())),
            tuple(Texts().take(inner, "args", base, ())),
            tuple((Variables().take(inner, "environment", base, {}) or {}).items()),
        )
        inner.done()
        return found

    def write(self, message: Any, name: str, value: Any) -> None:
        for one in value:
            made = getattr(message, name).add(site=one.site, replicas=one.replicas)
            made.gpu_models.extend(one.gpu_models)
            made.args.extend(one.args)
            made.environment.update(dict(one.environment))

    def reading(self, path: str) -> Callable[[Any], Any]:
        return lambda message: tuple(map(site_of, getattr(message, path)))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > MOST_SITES:
            yield FieldViolation(at, f"{len(value)} sites; at most {MOST_SITES}")
        if len({one.site for one in value}) < len(value):
            yield FieldViolation(at, "name a site twice; name it once, with the replicas of both")
        for i, one in enumerate(value[:MOST_SITES]):
            yield from self._of_one(f"{at}[{i}]", one)

    def _of_one(self, at: str, one: Site) -> Violations:
        try:
            names.split(one.site, "sites", field=f"{at}.site")
        except InvalidArgument as wrong:
            yield from wrong.violations
        yield from Whole(1, MAX_REPLICAS).violations(f"{at}.replicas", one.replicas)
        yield from Texts().violations(f"{at}.gpu_models", one.gpu_models)
        yield from Texts().violations(f"{at}.args", tuple(dict.fromkeys(one.args)))  # the same word twice is well
        yield from Variables().violations(f"{at}.environment", one.environment)

    def schema(self) -> Schema:
        fields = {
            "replicas": Whole(1, MAX_REPLICAS).schema(),
            "on": Texts().schema(),
            "args": Texts().schema(),
            "environment": Variables().schema(),
        }
        one = {"type": "object", "properties": fields, "additionalProperties": False}
        named = {"type": "object", "additionalProperties": {"anyOf": [Whole(1, MAX_REPLICAS).schema(), one]}}
        return {"anyOf": [Texts().schema(), named]}


def site_of(message: Any) -> Site:
    """A ModelSite of the contract as the checks read it."""
    variables = tuple(message.environment.items())
    return Site(message.site, message.replicas, tuple(message.gpu_models), tuple(message.args), variables)


def _site(name: Any) -> str:
    return names.join(("sites", names.check_id("site", str(name).removeprefix("sites/"))))
