"""The fleets that this user knows by name: one file or link each in ~/.config/whaleflux/contexts, and which is in use.

`whaleflux up` puts a link to its context file there, so that commands work from any folder and a renewed context is found.
What people put there for other fleets is never overwritten, and never ceases to be in use without their word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from whaleflux.errors import FieldViolation, InvalidArgument

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MOST = 100  # of one name; more fleets called alike are a mistake


@dataclass(frozen=True, slots=True)
class Registered:
    """Under which name a fleet is known now, and which other one stays in use; "" when this one is."""

    name: str
    still_in_use: str = ""


def config_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """$XDG_CONFIG_HOME/whaleflux, else ~/.config/whaleflux; None for a user without a home."""
    variables = os.environ if environ is None else environ
    if (base := variables.get("XDG_CONFIG_HOME", "")) and Path(base).is_absolute():
        return Path(base) / "whaleflux"
    if home := variables.get("HOME", ""):
        return Path(home) / ".config" / "whaleflux"
    try:
        return Path.home() / ".config" / "whaleflux" if environ is None else None
    except RuntimeError:  # no such user in the system's list either
        return None


class Contexts:
    """The names below one configuration folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def own_file(self) -> Path:
        """A context without a name, put there by hand; counts where no name is in use."""
        return self.folder / "context.json"

    def file(self, name: str) -> Path:
        """Where the context of that name is. Raises InvalidArgument for what is no name."""
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                FieldViolation("context", f"{name!r} is no name: lower-case letters, digits, '.', '_' and '-'")
            )
        return self.folder / "contexts" / f"{name}.json"

    def names(self) -> list[str]:
        """All that are known, also those whose fleet is gone."""
        return sorted(path.stem for path in (self.folder / "contexts").glob("*.json") if _NAME.fullmatch(path.stem))

    def current(self) -> str:
        """The one in use; "" for none."""
        try:
            name = (self.folder / "current").read_text().strip()
        except OSError:
            return ""
        return name if _NAME.fullmatch(name) else ""

    def known(self, name: str) -> Path:
        """The file of a known name. Raises InvalidArgument that lists those there are."""
        path = self.file(name)
        if not path.is_symlink() and not path.exists():
            there = ", ".join(self.names()) or "none"
            raise InvalidArgument(FieldViolation("context", f"{name!r} is not known here; known: {there}"))
        return path

    def use(self, name: str) -> None:
        """Makes a known one the one in use."""
        self.known(name)
        _replace(self.folder / "current", name)

    def remove(self, name: str) -> None:
        """Forgets a name; the fleet stays as it is."""
        self.known(name).unlink()
        if self.current() == name:
            (self.folder / "current").unlink()

    def link(self, name: str, target: Path) -> None:
        """Makes `name` mean the context file `target`. Raises InvalidArgument when it means another one."""
        path = self.file(name)
        if self._means(name, target):
            return
        if path.is_symlink() or path.exists():
            raise InvalidArgument(
                FieldViolation("context", f"{name!r} is another fleet's; free it with: whaleflux config remove {name}")
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.symlink_to(target.resolve())

    def register(self, target: Path, wanted: str) -> Registered:
        """Makes a fleet of this machine known, under `wanted` or a name like it, and in use unless another kind is.

        One that people named or wrote themselves stays in use; another one of this machine does not.
        """
        name = next((n for n in self.names() if self._means(n, target)), "") or self.free(wanted)
        self.link(name, target)
        current = self.current()
        keeps = (current and current != name and not self._is_of_this_machine(current)) or (
            not current and self.own_file.exists()
        )
        if keeps:
            return Registered(name, still_in_use=current or str(self.own_file))
        self.use(name)
        return Registered(name)

    def login_at(self, server: str) -> str:
        """The name of a login (`whaleflux login`) at that front door; "" for none."""
        from whaleflux.context import Context

        for name in self.names():
            if (file := self.file(name)).exists() and self._is_login(name) and Context.load(file).server == server:
                return name
        return ""

    def check_is_login_or_free(self, name: str) -> None:
        """Refuses the name of a fleet that no login made: it is not overwritten."""
        path = self.file(name)
        if (path.is_symlink() or path.exists()) and not self._is_login(name):
            raise InvalidArgument(
                FieldViolation("context", f"{name!r} is another fleet's; free it with: whaleflux config remove {name}")
            )

    def _is_login(self, name: str) -> bool:
        path = self.file(name)
        return path.is_symlink() and path.readlink().parent.parent == self.folder / "logins"

    def _means(self, name: str, target: Path) -> bool:
        path = self.file(name)
        return path.is_symlink() and path.resolve() == target.resolve()

    def _is_of_this_machine(self, name: str) -> bool:
        """Whether `whaleflux up` put it there: a link to a state folder, or to one that was deleted."""
        path = self.file(name)
        return (path.is_symlink() and (not path.exists() or is_state(path.resolve().parent))) or not path.exists()

    def free(self, wanted: str) -> str:
        """A name like `wanted` that means nothing yet."""
        plain = re.sub(r"[^a-z0-9._-]+", "-", wanted.lower()).strip("-._")[:50] or "local"
        tried = (plain, *(f"{plain}-{n}" for n in range(2, _MOST)))
        for name in tried:
            path = self.file(name)
            if not path.is_symlink() and not path.exists():
                return name
        raise InvalidArgument(FieldViolation("context", f"{_MOST} fleets are called {plain!r}; remove some"))


def is_state(folder: Path) -> bool:
    """Whether it is the state folder of a suite on this machine."""
    return (folder / "ports.json").exists()


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text + "\n")
    part.replace(path)
