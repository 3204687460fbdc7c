"""A job file in the making: what was understood, what has no equivalent, what cannot be kept. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.manifests.job_fields import JOB_FIELDS
from whaleflux.manifests.model_fields import MODEL_FIELDS
from whaleflux.manifests.secret_values import VARIABLE, variable_of

GO_ON = "set +eu +o pipefail"  # a failing command ends nothing, as where the script comes from
_ID = re.compile(r"[^a-z0-9-]+")
_COMMENT_CHARS = 120


@dataclass
class Draft:
    """One file. `kind` is "job" or "model"; `reader` is the format that it comes from, for people."""

    reader: str
    kind: str = "job"
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    refused: list[FieldViolation] = field(default_factory=list)

    def note(self, what: str, why: str) -> None:
        """Something that has no equivalent, or that is done in another way."""
        if (what, why) not in self.notes:
            self.notes.append((what, why))

    def refuse(self, what: str, why: str) -> None:
        """Something without which the file would mean something else."""
        self.refused.append(FieldViolation(what, why))

    def put(self, name: str, value: Any) -> None:
        """Sets a field ("nodes.min"), unless the value is None."""
        *groups, last = name.split(".")
        place = self.fields
        for group in groups if value is not None else ():
            place = place.setdefault(group, {})
        if value is not None:
            place[last] = value

    def name(self, given: object, what: str = "name") -> None:
        """The job's name as an id."""
        found = _ID.sub("-", str(given).lower()).strip("-")[:63].strip("-")
        if found:
            self.put("model" if self.kind == "model" else "name", found)
        if found != str(given):
            self.note(what, f"{str(given)!r} is called {found!r}: ids are lower-case letters, digits and dashes")

    def gpus(self, nodes: int, each: int, cpu_ranks: int = 1) -> None:
        """So many GPUs on each of so many nodes; without any, so many ranks."""
        self.put("gpus", nodes * each)
        if not each and nodes * cpu_ranks > 1:
            self.put("ranks", nodes * cpu_ranks)
        self.put("nodes.min", nodes)
        self.put("nodes.max", nodes)

    def gpu_types(self, given: list[str]) -> None:
        """Types by the names that other systems use: `a100` stands for all that WhaleFlux tells apart."""
        found: list[str] = []
        for name in given:
            known = [one for one in CATALOGUE.types if _plain(one) == _plain(name)]
            known = known or [one for one in CATALOGUE.types if _plain(one).startswith(f"{_plain(name)}-")]
            if not known:
                self.note(
                    "gpu", f"{name!r} is no type of the catalogue; nodes are taken whose driver says {name.upper()}"
                )
            elif len(known) > 1:
                self.note("gpu", f"{name!r} may be any of {', '.join(known)}; name one to be exact")
            found += known or [name.upper()]
        if found:
            self.put("gpu.any", list(dict.fromkeys(found)))

    def secret(self, variable: str, what: str, *, name: str = "", field: str = "secrets", kept: bool = False) -> None:
        """A variable whose value the fleet keeps, as `name`. `kept`: the other file has the value, which is not taken over."""
        name = _ID.sub("-", (name or variable).lower()).strip("-")[:63].strip("-")
        if not name or not VARIABLE.fullmatch(variable):
            self.refuse(what, f"{variable[:60]!r} is no variable")
            return
        *groups, last = field.split(".")
        place = self.fields
        for group in groups:
            place = place.setdefault(group, {})
        known = place.setdefault(last, [])
        use = name if variable_of(name) == variable else {"name": name, "env": variable}
        if use not in known:
            known.append(use)
        old = "its value stands in the file and is not taken over: remove it there, and " if kept else ""
        self.note(what, f"is a secret of the fleet: {old}store it once with: whaleflux secrets add {name}")

    def text(self) -> str:
        """The file. Raises InvalidArgument with everything that cannot be kept."""
        if self.refused:
            raise InvalidArgument(self.refused)
        lines = [f"# Made from {self.reader} by `whaleflux import`."]
        for what, why in self.notes:
            lines += _comment(f"note: {what}: {why}")
        order = [one.file.partition(".")[0] for one in (JOB_FIELDS if self.kind == "job" else MODEL_FIELDS)]
        fields = dict(sorted(self.fields.items(), key=lambda one: order.index(one[0])))
        body = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        return "\n".join(lines) + "\n" + body


def positive(draft: Draft, what: str, value: object) -> int:
    """A whole number above 0; 1 where it is none, which is refused."""
    if re.fullmatch(r"[0-9]+", str(value)) and int(str(value)) > 0 and not isinstance(value, bool):
        return int(str(value))
    draft.refuse(what, f"{str(value)[:60]!r} is not a whole number above 0")
    return 1


def shaped(
    draft: Draft, content: dict[str, Any], groups: tuple[str, ...], lists: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`content` without the values that are of another kind than they must be, which are refused."""
    found = dict(content)
    for names, kind, what in ((groups, dict, "fields and values"), (lists, list, "a list")):
        for name in names:
            if found.get(name) is not None and not isinstance(found[name], kind):
                draft.refuse(name, f"must be {what}")
                del found[name]
    return found


def without_shebang(draft: Draft, script: str) -> str:
    """The script as bash is given it: what its first line asks of the shell stands in lines of its own."""
    first, _, rest = script.partition("\n")
    if not first.startswith("#!"):
        return script.strip("\n")
    words = first.removeprefix("#!").split()
    shell = words[-1 if words and words[0].endswith("/env") else 0] if words else ""
    if not shell.endswith(("bash", "/sh")) and shell not in ("sh", "bash"):
        draft.refuse("#!", f"{first[:60]!r}: only scripts of bash and sh are taken over")
    options = [word for word in words[1:] if word.startswith("-")]
    lines = ""
    for option in options:
        if "l" in option or option == "--login":
            lines += "source /etc/profile\n"
            draft.note(
                f"{shell} {option}", "a login shell: /etc/profile is read first, files of the user's home are not"
            )
        if set(option) & set("eux"):
            lines += f"set -{''.join(sorted(set(option) & set('eux')))}\n"
    return (lines + rest).strip("\n")


def _plain(name: str) -> str:
    return name.upper().removeprefix("NVIDIA").strip(" -_").replace("_", "-").replace("GB", "")


def _comment(text: str) -> list[str]:
    found, line = list[str](), "#"
    for word in " ".join(text.split()).split(" "):
        if len(line) + len(word) > _COMMENT_CHARS and line != "#":
            found, line = [*found, line], "#  "
        line += f" {word}"
    return [*found, line]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as block scalars; what looks like another kind is quoted by PyYAML itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    lines = "\n" in value and all(line == line.rstrip() for line in value.split("\n")) and value.isprintable() is False
    block = (
        lines
        and all(part.isprintable() or part == "" for part in value.split("\n"))
        and not value.startswith((" ", "\n"))
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if block else None)


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(int, lambda dumper, value: dumper.represent_int(int(value)))
_Dumper.add_multi_representer(float, lambda dumper, value: dumper.represent_float(float(value)))
