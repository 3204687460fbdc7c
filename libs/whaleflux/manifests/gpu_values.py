"""Kinds of values that say which part of a GPU a rank gets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux import quantities
from whaleflux.errors import FieldViolation
from whaleflux.manifests.values import Schema, Size, Value, Violations

_MIG_PROFILE = re.compile(r"([1-9]c\.)?[1-9]g\.[1-9][0-9]{0,3}gb(\+[a-z.]{1,8})?")


@dataclass(frozen=True)
class LeastSize(Size):
    """A least size, written with >=: without it nobody could tell "at least" from "this much of it"."""

    instead: str = ""  # the field for "this much of it"

    def words(self) -> str:
        return "least size: `>= 80 GB`"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, str) and value.strip().startswith(">="):
            return super().parse(value, base)
        shown = str(value)[:40]
        raise ValueError(
            f"is the least memory of each whole GPU and is written with >=: '>= {shown}'; for {shown} of a GPU that others"
            f" may use too write {self.instead}: {shown} instead"
        )

    def schema(self) -> Schema:
        return {"type": "string", "pattern": r"^\s*>="}


@dataclass(frozen=True)
class MigInstance(Value):
    """A MIG profile, or the least memory that the profile has by its name; the message has a field for each."""

    most: int = 4 << 40

    def words(self) -> str:
        return "MIG profile: `1g.18gb`; or a least size: `20 GB`"

    def parse(self, value: object, base: Path) -> str | int:
        if isinstance(value, str) and _MIG_PROFILE.fullmatch(value.strip()):
            return value.strip()
        try:
            size = quantities.size_bytes(value)
        except ValueError:
            size = 0
        if not 0 < size <= self.most:
            raise ValueError(
                "must be a MIG profile such as 1g.18gb, or a size such as 20 GB for the smallest that has it"
            )
        return size

    def write(self, message: Any, name: str, value: Any) -> None:
        if isinstance(value, str):
            message.mig_profile = value
        else:
            message.mig_memory_bytes = value

    def violations(self, at: str, value: Any) -> Violations:
        if value and not _MIG_PROFILE.fullmatch(value):
            yield FieldViolation(at, f"{value[:40]!r} is not a MIG profile; use one such as 1g.18gb or 3g.71gb")

    def schema(self) -> Schema:
        return {"type": ["string", "integer"]}
