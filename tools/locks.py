"""What goes into each image, to the last byte: `make locks` writes deploy/docker/locks from pyproject.toml.

One file per role, as pip reads it: every package at one version, with the hashes of all its files, and which packages asked for it.
`build.txt` is what the wheel is built with. Versions that stand there stay while they fit; `make locks UPGRADE=1` takes the newest.
`licences.json` holds what each package says of its licence, from the packages that are installed here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from whaleflux.services import ROLES

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "deploy" / "docker" / "locks"
LICENCES = LOCKS / "licences.json"
IMAGES = (*ROLES, "agent")
BUILD = "build"
BESIDE = {"inventory": ("clouds",)}  # extras that an image has beside its own
_PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_SPDX = {  # what packages say in other words; https://spdx.org/licenses
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of a lock. `asked_by` are names of other packages; "whaleflux" for what pyproject.toml names."""

    name: str
    version: str
    hashes: tuple[str, ...]  # SHA-256 of each file of this version
    asked_by: tuple[str, ...]


def lock_file(image: str) -> Path:
    return LOCKS / f"{image}.txt"


def extra_of(image: str) -> str:
    """Its extra in pyproject.toml."""
    return image.replace("_", "-")


def extras_of(image: str) -> tuple[str, ...]:
    """All extras that it has."""
    return (extra_of(image), *BESIDE.get(image, ()))


def pins(image: str) -> list[Pin]:
    """What the lock of `image` holds, in its order."""
    return list(read(lock_file(image).read_text()))


def read(text: str) -> Iterator[Pin]:
    """The pins in the text of a lock."""
    starts = [*re.finditer(rf"^{_PIN.pattern}", text, re.MULTILINE)]
    ends = [start.start() for start in starts[1:]] + [len(text)]
    for start, end in zip(starts, ends, strict=True):
        block = text[start.start() : end]
        asked = re.findall(r"^    #(?: via|  ) +([\w.-]+)", block, re.MULTILINE)
        yield Pin(start["name"], start["version"], tuple(_HASH.findall(block)), tuple(asked))


def licence_of(package: str) -> str:
    """What the installed package says: an SPDX expression where it gives one, else its own words; "" for nothing."""
    said: Any = metadata.metadata(package)  # an email.message.Message, which its type hides
    if expression := said.get("License-Expression"):
        return str(expression)
    found = [line.rpartition(" :: ")[2] for line in said.get_all("Classifier") or () if line.startswith("License ::")]
    own = [line for line in (said.get("License") or "").splitlines()[:1] if line != "UNKNOWN" and len(line) < 60]
    words = [_SPDX.get(word, word) for word in [*own[:1], *found] if word != "OSI Approved"]
    return next((word for word in words if word in _SPDX.values()), words[0] if words else "")


def _write(image: str, requirements: list[str], *, upgrade: bool) -> None:
    program = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    options = [
        "--generate-hashes",
        "--python-version=3.11",
        "--python-platform=linux",
        "--no-header",
        "--quiet",
        "--native-tls",
    ]
    command = [program, "pip", "compile", *requirements, *options, *(["--upgrade"] if upgrade else [])]
    subprocess.run([*command, f"--output-file={lock_file(image)}"], cwd=ROOT, check=True)


def _licences() -> dict[str, str]:
    """Of all packages of all locks; what is not installed here keeps what was known of it."""
    known: dict[str, str] = json.loads(LICENCES.read_text()) if LICENCES.exists() else {}
    found = {}
    for name in sorted({pin.name for image in (*IMAGES, BUILD) for pin in pins(image)}):
        try:
            found[name] = licence_of(name)
        except metadata.PackageNotFoundError:
            found[name] = known.get(name, "")
    return found


def main() -> None:
    """Writes all locks and licences."""
    upgrade = "--upgrade" in sys.argv
    LOCKS.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        _write(image, ["pyproject.toml", *(f"--extra={extra}" for extra in extras_of(image))], upgrade=upgrade)
    build = LOCKS / "build.in"
    try:
        build.write_text(
            "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]) + "\n"
        )
        _write(BUILD, [str(build.relative_to(ROOT))], upgrade=upgrade)
    finally:
        build.unlink(missing_ok=True)
    LICENCES.write_text(json.dumps(_licences(), indent=1) + "\n")


if __name__ == "__main__":
    main()
