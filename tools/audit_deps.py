"""Whether what the locks hold has known vulnerabilities: `make audit-deps`, with pip-audit.

ADVISORIES (a folder of OSV records, or the zip file that OSV publishes for PyPI) is asked where it is given, without network. Else
pip-audit asks the package index. Where nobody answers, it says so, and that is no failure: what is not checked is not known.
Exit code 0: nothing found, or not checked; 1: found; 2: the advisories given cannot be read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import advisories, locks

VARIABLE = "ADVISORIES"
_TIMEOUT_S = 300.0
_ANSWER_S = 5  # that the index may take for one package
_PROBE = "protobuf"  # in every lock; an index that knows nothing of it knows no advisories


def all_pins(images: Sequence[str] = (*locks.IMAGES, locks.BUILD)) -> list[locks.Pin]:
    """What all locks hold, each package and version once."""
    found = {(pin.name, pin.version): pin for image in images for pin in locks.pins(image)}
    return [found[key] for key in sorted(found)]


def audit(pins: Sequence[locks.Pin], database: Path | None, *more: str) -> tuple[int, str]:
    """Exit code, and what to tell. `more` are arguments of pip-audit, as --ignore-vuln ID. ValueError: an unreadable database."""
    if database:
        with advisories.served(advisories.load(database)) as url:
            found = _asked(pins, "--vulnerability-service=osv", f"--osv-url={url}", *more)
        return _told(found, f"{database}") if found else (2, "pip-audit did not run through: see above")
    probe = _asked([pin for pin in pins if pin.name == _PROBE], *more)
    if not probe or not _checked(probe):
        return (
            0,
            f"not checked: no advisory database (the index has none or does not answer; give one with {VARIABLE}=PATH)",
        )
    found = _asked(pins, *more)
    return _told(found, "the package index") if found else (0, "not checked: the index stopped answering")


def _asked(pins: Sequence[locks.Pin], *options: str) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None where its source did not answer."""
    with tempfile.TemporaryDirectory(prefix="whaleflux-audit-") as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("".join(_requirement(pin) for pin in pins))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--disable-pip", "--require-hashes"]
        settings = ["--format=json", "--progress-spinner=off", f"--timeout={_ANSWER_S}", f"--cache-dir={folder}"]
        environment = os.environ | {"NO_PROXY": "127.0.0.1"}
        made = subprocess.run(
            [*command, *settings, *options],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environment,
        )
    try:
        return list(json.loads(made.stdout)["dependencies"])
    except (json.JSONDecodeError, KeyError):
        print(
            made.stderr.strip().splitlines()[-1][:300] if made.stderr.strip() else "pip-audit said nothing",
            file=sys.stderr,
        )
        return None


def _requirement(pin: locks.Pin) -> str:
    return " ".join([f"{pin.name}=={pin.version}", *(f"--hash=sha256:{digest}" for digest in pin.hashes)]) + "\n"


def _checked(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [package for package in found if "skip_reason" not in package]


def _told(found: list[dict[str, Any]], source: str) -> tuple[int, str]:
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']} ({', '.join(vulnerability.get('aliases', []))})"
        f", fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in _checked(found)
        for vulnerability in package["vulns"]
    ]
    counted = (
        f"{len(_checked(found))} packages checked against {source}, {len(found) - len(_checked(found))} not known there"
    )
    advice = [
        "Take a fixed version with `make locks UPGRADE=1`, or accept one: `make audit-deps ARGS='--ignore-vuln ID'`."
    ]
    return (1, "\n".join([*lines, counted, *advice])) if lines else (0, f"no known vulnerabilities; {counted}")


def main() -> None:
    """The check; prints what was found."""
    database = os.environ.get(VARIABLE, "")
    try:
        code, words = audit(all_pins(), Path(database) if database else None, *sys.argv[1:])
    except ValueError as unreadable:
        code, words = 2, str(unreadable)
    print(f"audit-deps: {words}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
