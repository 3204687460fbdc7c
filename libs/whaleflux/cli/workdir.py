"""The folder that goes with a job: which one, what of it, whether you want that, and the sending."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from whaleflux.cli import output

if TYPE_CHECKING:
    from whaleflux.code.pack import Contents, Packed
    from whaleflux.manifests.yaml_files import JobManifest

_ANSWERS = Path("~/.config/whaleflux/folders.json")
_MOST_ANSWERS = 1_000


@dataclass(frozen=True, slots=True)
class Parcel:
    """A packed folder. `said`: the job file names it, so nobody has to be asked."""

    contents: Contents
    packed: Packed
    said: bool

    def lines(self, *, all_of_it: bool) -> list[str]:
        """For the plan; with all_of_it also what is largest, and what stays behind."""
        from whaleflux.code.pack import ignored, shown_size, summary

        packed = shown_size(self.packed.size_bytes)
        lines = [f"  sends      {self.contents.root} ({summary(self.contents)}; {packed} packed)"]
        if all_of_it:
            lines += [f"  sends      {shown_size(f.size_bytes):>9}  {f.path}" for f in self.contents.biggest()]
            lines.append("  stays here " + (ignored(self.contents.left_out) or "nothing"))
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        found = self.contents
        return {
            "folder": str(found.root),
            "digest": self.packed.digest,
            "files": len(found.files),
            "size_bytes": found.size_bytes,
            "packed_bytes": self.packed.size_bytes,
            "biggest": [{"path": f.path, "size_bytes": f.size_bytes} for f in found.biggest()],
            "left_out": [{"path": one.path, "why": one.why} for one in found.left_out],
        }


def parcel_of(folder: Path | None, said: bool) -> Parcel | None:
    """What `folder_of` found, packed; None for none. Raises InvalidArgument where it cannot travel."""
    if folder is None:
        return None
    from whaleflux.code.pack import contents, pack

    found = contents(folder)
    if not found.files and not said:
        return None
    return Parcel(found, pack(found), said)


def folder_of(manifest: JobManifest, file: str, base: Path) -> tuple[Path | None, bool]:
    """The folder that goes with a job (None: none does), and whether its file names it."""
    if manifest.workdir is not None:
        return (Path(manifest.workdir) if manifest.workdir else None), True
    if file == "-" or manifest.spec.working_directory:
        return None, False
    from whaleflux.code.beside import lies_beside_code

    if not lies_beside_code(base, manifest.spec.command, image=bool(manifest.spec.image)):
        return None, False
    if _answers().get(str(base)) is False:
        _say_declined(base, Path(file).name)
        return None, False
    return base, False


@functools.lru_cache(maxsize=_MOST_ANSWERS)
def _say_declined(base: Path, file: str) -> None:
    """Once, however many jobs of the file there are."""
    output.note(f"{base} is not sent, as you said before; `workdir: .` in {file} sends it")


def wanted(parcel: Parcel, yes: bool) -> bool:
    """Whether the folder may be sent: asked once for each folder that no job file names."""
    from whaleflux.code.pack import summary

    root = str(parcel.contents.root)
    if parcel.said or yes or root in _answers():
        return True
    answer = typer.confirm(f"send {root} ({summary(parcel.contents)}) with the job?", default=True, err=True)
    _remember(root, answer)
    also = "" if answer else "; `workdir: .` in the job file sends it"
    output.note(f"remembered for this folder in {_ANSWERS}{also}")
    return answer


def send(client: Any, parcel: Parcel) -> None:
    """Sends it unless the fleet has it; a terminal sees how far it is."""
    from whaleflux.code.pack import shown_size
    from whaleflux.sdk import code

    size_bytes, live = parcel.packed.size_bytes, sys.stderr.isatty()

    def progress(sent: int) -> None:
        if live:
            output.progress(f"sent {shown_size(sent)} of {shown_size(size_bytes)}")

    new = code.send(client, parcel.packed, progress)
    if live and new:
        output.progress("")
    output.note(f"sent {shown_size(size_bytes)}" if new else "the fleet has this code already; nothing is sent")


def _answers() -> dict[str, bool]:
    try:
        content = json.loads(_ANSWERS.expanduser().read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): v is True for k, v in content.items()} if isinstance(content, dict) else {}


def _remember(root: str, answer: bool) -> None:
    known = {**_answers(), root: answer}
    newest = dict(list(known.items())[-_MOST_ANSWERS:])
    with contextlib.suppress(OSError):  # asked again then
        file = _ANSWERS.expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(newest, indent=2))
        new.replace(file)
