"""Which files belong to a folder: what .gitignore and .whalefluxignore leave of it.

Git's rules: the files of all folders from the top of the repository down count, the deepest says the last word, and what lies in
a folder that is left out cannot come back. .whalefluxignore has the same form, comes after .gitignore, and may take back what
that leaves out (`!data/small.csv`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from whaleflux.errors import FieldViolation, InvalidArgument

ALWAYS = frozenset({".git", ".hg", ".svn", "__pycache__", ".venv", ".whaleflux"})
FILES = (".gitignore", ".whalefluxignore")
_ENVIRONMENT = "pyvenv.cfg"  # lies at the top of each virtual environment, whatever its name
_MAX_IGNORE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """One file or link of a folder; `path` is relative, with slashes."""

    path: str
    size_bytes: int
    executable: bool = False
    target: str | None = None  # of a link


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that stays behind, and why."""

    path: str
    why: str


Rules = tuple[tuple[str, GitIgnoreSpec], ...]  # folder ("" or "a/b/") and what its files say, deepest last


def walk(root: Path) -> Iterator[Found | LeftOut]:
    """Everything in the folder, in a stable order, as it is kept or left out. Raises InvalidArgument for what cannot be read."""
    yield from _walk(root, "", _above(root))


def _walk(root: Path, at: str, rules: Rules) -> Iterator[Found | LeftOut]:
    folder = root / at
    here = (*rules, *_rules(folder, at))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(at or ".", error) from None
    for entry in entries:
        path = at + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if why := _left_out(entry, path, here, is_folder=is_folder):
            yield LeftOut(path + "/" * is_folder, why)
        elif is_folder:
            yield from _walk(root, path + "/", here)
        else:
            yield _found(entry, path)


def _left_out(entry: os.DirEntry[str], path: str, rules: Rules, *, is_folder: bool) -> str:
    """Why it stays behind; "" when it travels."""
    if entry.name in ALWAYS:
        return "always"
    if is_folder and os.path.exists(os.path.join(entry.path, _ENVIRONMENT)):
        return "virtual environment"
    if not (is_folder or entry.is_symlink() or entry.is_file(follow_symlinks=False)):
        return "no file"
    for folder, spec in reversed(rules):
        within = path.removeprefix(folder) if not folder.startswith("../") else _seen_from(folder, path)
        said = spec.check_file(within + "/" * is_folder).include
        if said is not None:  # the deepest that says anything
            return "ignored" if said else ""
    return ""


def _found(entry: os.DirEntry[str], path: str) -> Found:
    try:
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            return Found(path, 0, target=os.readlink(entry.path))
    except OSError as error:
        raise _unreadable(path, error) from None
    return Found(path, found.st_size, bool(found.st_mode & stat.S_IXUSR))


def _rules(folder: Path, at: str) -> Rules:
    """What the folder's own files say: the lines of both, one after the other."""
    lines: list[str] = []
    for name in FILES:
        try:
            with (folder / name).open("rb") as file:
                lines += file.read(_MAX_IGNORE_BYTES).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unreadable(at + name, error) from None
    return ((at, _spec(lines)),) if lines else ()


def _spec(lines: list[str]) -> GitIgnoreSpec:
    """What the lines say; one that is no pattern (a backslash at its end) matches nothing, as in git."""
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError:
        return GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def _above(root: Path) -> Rules:
    """The rules of the folders above, up to the top of the repository; none outside of one."""
    parents = list(root.parents)
    top = next((i for i, parent in enumerate(parents) if (parent / ".git").exists()), None)
    if top is None or (root / ".git").exists():
        return ()
    below = [(parent, root.relative_to(parent).as_posix()) for parent in reversed(parents[: top + 1])]
    rules = tuple(rule for parent, inner in below for rule in _rules(parent, f"../{inner}/"))
    wanted_all_the_same = any(spec.check_file(folder.removeprefix("../")).include for folder, spec in rules)
    return () if wanted_all_the_same else rules


def _seen_from(folder: str, path: str) -> str:
    """A path as the ignore file of a folder above sees it: `folder` is "../" and the way from there to the root."""
    return folder.removeprefix("../") + path


def _unreadable(path: str, error: OSError) -> InvalidArgument:
    fix = "make it readable, or leave it out with a line in .whalefluxignore"
    return InvalidArgument(FieldViolation("workdir", f"{path} cannot be read ({error.strerror}); {fix}"))
