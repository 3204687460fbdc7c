"""What bash says of the scripts in job files, where there is a bash: `bash -n` reads them and runs nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from whaleflux.errors import FieldViolation
from whaleflux.manifests.shell_text import script_of

if TYPE_CHECKING:
    from whaleflux.manifests.yaml_files import JobManifest

WITHIN_S = 2.0  # for all scripts together; what is not read by then is not judged
_MOST = 20  # members of an array may each have a script of their own
# Bash 3 does not know what nodes' newer ones do. $0 is bash, $1 an option more.
_READ = '((BASH_VERSINFO[0] >= 4)) || exit 0; exec "$0" --norc -n $1 /dev/stdin'
_EXTGLOB = "-O extglob"  # `shopt -s extglob` in the script is not run, and changes what can be read
_SAID = re.compile(r"/dev/stdin: line (\d+): (.*)")


def mistakes(jobs: Iterable[JobManifest], within_s: float = WITHIN_S) -> list[FieldViolation]:
    """The first syntax error of each script, with its line in the script; none where bash is missing, old or slow."""
    if not (bash := shutil.which("bash")):
        return []
    scripts: dict[str, str] = {}
    for job in jobs:
        for field, command in (("run", job.spec.command), ("setup", job.spec.setup)):
            if (script := script_of(command)) is not None:
                scripts.setdefault(script, field)
    until_s = time.monotonic() + within_s
    said = ((field, _said(bash, script, until_s)) for script, field in list(scripts.items())[:_MOST])
    return [FieldViolation(field, what) for field, what in said if what]


def _said(bash: str, script: str, until_s: float) -> str:
    """The mistake and its line; "" for none, and where bash does not answer. Its environment is empty: BASH_ENV would be run."""
    option = _EXTGLOB if "extglob" in script else ""
    try:
        done = subprocess.run(
            [bash, "--norc", "-c", _READ, bash, option],
            input=script.encode(errors="replace"),
            capture_output=True,
            timeout=max(0.01, until_s - time.monotonic()),
            env={"LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = _SAID.search(done.stderr.decode(errors="replace"))
    if not done.returncode or not found:
        return ""
    return f"line {found[1]} of the script: {found[2][:200]} (says bash -n)"
