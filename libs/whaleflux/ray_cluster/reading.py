"""Runs `reader` in the interpreter that has the cluster's Ray: which that is, with a deadline, and what its ends mean."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from whaleflux.reasons import ErrorReason

READ_S = 60.0  # importing Ray takes seconds on a busy host
_MOST_BYTES = 32 << 20
_GIVE = "name the interpreter of an environment that has the cluster's Ray with --python"


def interpreter(named: str = "") -> str:
    """`named`, else that of the `ray` program on the PATH, else this one. Raises FailedPrecondition when none has Ray."""
    if named:
        if (found := shutil.which(named)) is None:
            raise InvalidArgument(FieldViolation("--python", f"{named} is no program; {_GIVE}"))
        return found
    program = shutil.which("ray")
    if program is not None:
        return _interpreter_of(Path(program))
    if find_spec("ray") is None:
        raise FailedPrecondition(f"no Ray is on the PATH; {_GIVE}", reason=ErrorReason.PROGRAM_MISSING)
    return sys.executable


def _interpreter_of(program: Path) -> str:
    """That of its first line, also behind `env`. Raises FailedPrecondition where that is no Python: some installers wrap programs in a shell."""
    with program.open("rb") as lines:
        first = lines.readline(1024).decode(errors="replace").strip()
    words = first[2:].split() if first.startswith("#!") else []
    named = words[1] if len(words) == 2 and Path(words[0]).name == "env" else words[0] if words else ""
    found = shutil.which(named) if Path(named).name.startswith("python") else None
    if found is None:
        raise FailedPrecondition(
            f"{program} does not say which Python runs it; {_GIVE}", reason=ErrorReason.PROGRAM_MISSING
        )
    return found


def read_once(address: str, python: str = "") -> Mapping[str, Any]:
    """The cluster's state now, as JSON of RayDemand. Raises Unavailable when nobody answers, FailedPrecondition when there is no Ray."""
    command = [interpreter(python), str(Path(__file__).with_name("reader.py")), "--address", address, "--once"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READ_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"the Ray cluster at {address} did not answer within {READ_S:g} s", reason=ErrorReason.RAY_UNREACHABLE
        ) from None
    said = done.stderr.strip().splitlines()[-1:] or [f"{command[0]} ended with {done.returncode}"]
    if done.returncode == 2:
        raise InvalidArgument(FieldViolation("--address", said[0]))
    if done.returncode == 4:
        raise FailedPrecondition(f"{said[0]}; {_GIVE}", reason=ErrorReason.PROGRAM_MISSING)
    if done.returncode:
        raise Unavailable(said[0], reason=ErrorReason.RAY_UNREACHABLE)
    return dict(json.loads(done.stdout[:_MOST_BYTES].splitlines()[-1]))
