"""Whether a job file lies beside code, so that its folder is meant to travel though the file does not say so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_CODE = ("*.py", "*.sh")


def names_a_file(folder: Path, command: Iterable[str]) -> bool:
    """Whether a word of the command line, or of a script in it, is a file in the folder or below."""
    words = (word.strip("'\";()") for part in command for word in part.split())
    return any(_is_file_in(folder, word) for word in words)


def lies_beside_code(folder: Path, command: Iterable[str], *, image: bool) -> bool:
    """`run` names a file that is there; or, where the job brings no image with code of its own, a *.py or *.sh is.

    Never a home folder or the root of a disk: those are sent when a file says so, not by guess.
    """
    if folder in (Path.home(), Path(folder.anchor)):
        return False
    return names_a_file(folder, command) or (not image and any(True for kind in _CODE for _ in folder.glob(kind)))


def _is_file_in(folder: Path, word: str) -> bool:
    if not word or word.startswith(("/", "-", "~", "$")) or len(word) > 255 or "\0" in word or ".." in word.split("/"):
        return False
    try:
        return (folder / word).is_file()
    except OSError:
        return False
