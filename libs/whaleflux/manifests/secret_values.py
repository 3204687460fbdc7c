"""Secrets in job and model files: which ones, and as what the ranks find them. Values never stand in files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.errors import FieldViolation
from whaleflux.manifests.text_values import shortened
from whaleflux.manifests.values import Schema, Value, Violations

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
FILE = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,128}")
MAX_VERSION = 2**31 - 1
_KEYS = ("name", "env", "file", "version")
_FORMS = "use NAME, {name: NAME, env: VARIABLE}, or {name: NAME, file: FILE}"


@dataclass(frozen=True, slots=True)
class SecretUse:
    """One secret of a job: secrets/{secret}, a version (0: the newest), and the variable or the file that has its value.

    With both, the variable has the path of the file.
    """

    secret: str = ""
    version: int = 0
    variable: str = ""
    file: str = ""

    @property
    def as_text(self) -> bool:
        """Whether a variable has to hold the value itself."""
        return bool(self.variable) and not self.file


def variable_of(secret_id: str) -> str:
    """The variable of a secret that names none: HF_TOKEN of hf-token."""
    return secret_id.upper().replace("-", "_")


def twice(uses: Iterable[SecretUse]) -> Iterator[tuple[int, str]]:
    """Positions and words of uses whose variable or file an earlier one has."""
    seen: dict[tuple[str, str], str] = {}
    for i, use in enumerate(uses):
        for place in (("variable", use.variable), ("file", use.file)):
            if place[1] and place in seen:
                yield (
                    i,
                    f"{place[0]} {shortened(place[1])} is that of {names.last(seen[place])} already; choose another",
                )
            seen.setdefault(place, use.secret)


def set_otherwise(uses: Iterable[SecretUse], environment: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Positions and words of uses whose variable the environment sets as well."""
    known = set(environment)
    for i, use in enumerate(uses):
        if use.variable in known:
            yield i, f"{shortened(use.variable)} is set in environment too; take it out there"


@dataclass(frozen=True)
class Secrets(Value):
    """A list of secrets, each its name, or its name with the variable or file."""

    reserved: frozenset[str] = frozenset()
    reserved_prefixes: tuple[str, ...] = ()
    most: int = 64

    def words(self) -> str:
        return "list of secrets, each `NAME`, `{name: NAME, env: VARIABLE}`, or `{name: NAME, file: FILE}`; with `version: N` an older one"

    def parse(self, value: object, base: Path) -> Any:
        found = [self._one(item) for item in (value if isinstance(value, list) else [value])]
        if clash := next(twice(found), None):
            raise ValueError(clash[1])
        return found

    def _one(self, item: object) -> SecretUse:
        given = item if isinstance(item, dict) else {"name": item}
        if unknown := [str(key) for key in given if key not in _KEYS]:
            raise ValueError(
                f"has {shortened(unknown[0])!r}, which is not one of {', '.join(_KEYS)}; a secret's value is kept by: whaleflux secrets add"
            )
        name, env, file, version = (given.get(key) for key in _KEYS)
        if not isinstance(name, str) or not names.ID_PATTERN.fullmatch(name.removeprefix("secrets/")):
            raise ValueError(f"must be names of secrets, such as hf-token; {_FORMS}")
        if version is not None and (
            isinstance(version, bool) or not isinstance(version, int) or not 0 < version <= MAX_VERSION
        ):
            raise ValueError(f"{name}: version must be a whole number from 1; see: whaleflux secrets show {name}")
        variable = variable_of(name.removeprefix("secrets/")) if env is None and file is None else env or ""
        for said, kind, pattern, fix in (
            (variable, "env", VARIABLE, "use letters, digits and _, not a digit first"),
            (file or "", "file", FILE, "use a plain name of letters, digits, '.', '_' and '-', without folders"),
        ):
            if said and not (isinstance(said, str) and pattern.fullmatch(said)):
                raise ValueError(f"{name}: {kind} {shortened(str(said))!r} cannot be; {fix}")
        return SecretUse(names.secret(name), version or 0, str(variable), str(file or ""))

    def write(self, message: Any, name: str, value: Any) -> None:
        for one in value:
            getattr(message, name).add(secret=one.secret, version=one.version, variable=one.variable, file=one.file)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(SecretUse(u.secret, u.version, u.variable, u.file) for u in get(message))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} secrets; at most {self.most}")
        for i, use in enumerate(value[: self.most]):
            yield from self._violations(f"{at}[{i}]", use)
        for i, words in twice(value[: self.most]):
            yield FieldViolation(f"{at}[{i}]", words)

    def _violations(self, at: str, use: SecretUse) -> Violations:
        if not use.secret.startswith("secrets/") or not names.ID_PATTERN.fullmatch(names.last(use.secret)):
            yield FieldViolation(
                f"{at}.secret", f"{shortened(use.secret)!r} is not the name of a secret, such as secrets/hf-token"
            )
        if not 0 <= use.version <= MAX_VERSION:
            yield FieldViolation(f"{at}.version", "is negative; use 0 for the newest, or a version that is kept")
        if not use.variable and not use.file:
            yield FieldViolation(at, "says neither variable nor file; say where the ranks find it")
        if use.variable and not VARIABLE.fullmatch(use.variable):
            yield FieldViolation(f"{at}.variable", "is not a variable name; use letters, digits and _, at most 256")
        elif use.variable in self.reserved or use.variable.startswith(self.reserved_prefixes or "\0"):
            yield FieldViolation(f"{at}.variable", f"{use.variable} is set for each rank by the agent; choose another")
        if use.file and not FILE.fullmatch(use.file):
            yield FieldViolation(
                f"{at}.file", "is not a plain file name of letters, digits, '.', '_' and '-'; folders are not made"
            )

    def schema(self) -> Schema:
        name = {"type": "string", "pattern": f"^(secrets/)?{names.ID_PATTERN.pattern}$"}
        parts = {
            "name": name,
            "env": {"type": "string", "pattern": f"^{VARIABLE.pattern}$"},
            "file": {"type": "string", "pattern": f"^{FILE.pattern}$"},
            "version": {"type": "integer", "minimum": 1, "maximum": MAX_VERSION},
        }
        one = {
            "anyOf": [
                name,
                {"type": "object", "properties": parts, "required": ["name"], "additionalProperties": False},
            ]
        }
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.most}]}


_SECRET_WORDS = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|(?:API|ACCESS|SECRET|PRIVATE|LICENSE|SIGNING|ENCRYPTION|ACCOUNT)_KEY)(?:$|_)|_KEY$|PASSWORD",
    re.IGNORECASE,
)


def look_like_secrets(environment: Iterable[tuple[str, str]]) -> list[str]:
    """Variables whose names say that their values are secrets: those stand in the job's record for whoever may read it.

    Paths and empty values are none.
    """
    return [
        name
        for name, value in environment
        if value and not value.startswith(("/", "~", "$")) and _SECRET_WORDS.search(name)
    ]


def advice(variables: list[str], field: str = "environment") -> str:
    """What to do about them; "" where there are none. Never shows a value."""
    if not variables:
        return ""
    first = variables[0].lower().replace("_", "-").strip("-")
    those = ", ".join(variables[:5]) + (" and more" if len(variables) > 5 else "")
    return (
        f"{those} in {field} look like secrets: they are kept in clear in the job's record, where operators and your team read them; "
        f"better: whaleflux secrets add {first}, and in the file secrets: [{first}] instead"
    )
