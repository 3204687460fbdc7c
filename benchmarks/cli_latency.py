"""How long a person waits for the command line: help, a look at the fleet, an error, and `up` until everything serves.

Each command is a process of its own. CPU is user and system time of the process and its children as the kernel counts it when it ends:
what neighbours on the host take is not in it. Wall time is stated beside it. Commands and peers take turns, so that a busy moment meets all.

Peers are tools of the same kind: command lines in Python. `pip` and `tox` are beside this Python; others are named with `--peer "dstack
--help"`. `python -c "import grpc"` is the floor of any Python client of gRPC.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import Options, Report, Row, Target, main

HELP_S, STATUS_CPU_S, UP_S, REFUSED_S = 0.2, 0.35, 5.0, 1.0
READY_S = 120.0
ROUNDS = {"quick": 5, "full": 15}
STARTS = {"quick": 2, "full": 5}
WHALEFLUX = (sys.executable, "-m", "whaleflux.cli")


@dataclass(slots=True)
class Series:
    """What one command took, run by run, in seconds."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def row(self, name: str) -> Row:
        return {
            "command": name,
            "wall s": statistics.median(self.wall_s),
            "CPU s": statistics.median(self.cpu_s),
            "best wall s": min(self.wall_s),
            "best CPU s": min(self.cpu_s),
            "runs": len(self.wall_s),
        }


def timed(argv: Sequence[str], environment: Mapping[str, str], *, expected: int = 0) -> tuple[float, float]:
    """Wall and CPU seconds of one run. Raises RuntimeError, with what it said, when it ends otherwise than expected."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise RuntimeError(f"{shlex.join(argv)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def suite(state: Path) -> Iterator[float]:
    """`whaleflux up` until the end of the block; gives the seconds until everything served."""
    argv = [*WHALEFLUX, "up", "--no-register", "--state", str(state)]
    began = time.perf_counter()
    with (state / "up.log").open("ab") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        while not (state / "context.json").exists():
            if process.poll() is not None or time.perf_counter() - began > READY_S:
                raise RuntimeError(f"the suite did not start:\n{(state / 'up.log').read_text()[-2000:]}")
            time.sleep(0.01)
        yield time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(timeout=60)


def start_seconds(starts: int) -> list[float]:
    """Of so many first starts, each with a state folder of its own."""
    found = []
    for _ in range(starts):
        with tempfile.TemporaryDirectory(prefix="wf-") as folder, suite(Path(folder)) as seconds:
            found.append(seconds)
    return found


def peers(named: Sequence[str]) -> dict[str, list[str]]:
    """Tools beside this Python, and those that were named, where they are installed."""
    beside = Path(sys.executable).parent
    commands = {"pip --version": [sys.executable, "-m", "pip", "--version"]}
    if (beside / "tox").exists():
        commands["tox --version"] = [str(beside / "tox"), "--version"]
    for text in named:
        words = shlex.split(text)
        if shutil.which(words[0]):
            commands[" ".join([Path(words[0]).name, *words[1:]])] = words
    return commands


def rounds_of(commands: Mapping[str, tuple[list[str], Mapping[str, str], int]], rounds: int) -> dict[str, Series]:
    """All commands in turn, again and again; the first round only warms files and bytecode."""
    found = {name: Series() for name in commands}
    for number in range(rounds + 1):
        for name, (argv, environment, expected) in commands.items():
            wall_s, cpu_s = timed(argv, environment, expected=expected)
            if number:
                found[name].wall_s.append(wall_s)
                found[name].cpu_s.append(cpu_s)
    return found


def nowhere(folder: Path, state: Path) -> Path:
    """A context whose fleet does not run: nothing listens on its port."""
    content = json.loads((state / "context.json").read_text()) | {"server": "127.0.0.1:1"}
    (folder / "nowhere.json").write_text(json.dumps(content))
    return folder / "nowhere.json"


def measure(options: Options) -> Report:
    """Wall and CPU of commands against a suite that is up, beside other command lines in Python; starts of the suite."""
    mode = "quick" if options.quick else "full"
    plain = {key: value for key, value in os.environ.items() if not key.startswith("WHALEFLUX_")}
    with tempfile.TemporaryDirectory(prefix="wf-") as folder, suite(Path(folder)):
        state = Path(folder)
        up = plain | {"WHALEFLUX_CONTEXT": str(state / "context.json")}
        down = plain | {"WHALEFLUX_CONTEXT": str(nowhere(state, state))}
        ours = {"--help": 0, "--version": 0, "status": 0, "jobs": 0, "nodes": 0, "profiles": 0}
        commands: dict[str, tuple[list[str], Mapping[str, str], int]] = {
            **{f"whaleflux {word}": ([*WHALEFLUX, word], up, code) for word, code in ours.items()},
            "whaleflux status, nothing listens": ([*WHALEFLUX, "status"], down, 3),
            'python -c "import grpc"': ([sys.executable, "-c", "import grpc"], plain, 0),
            **{name: (argv, plain, 0) for name, argv in peers(options.extra.peer).items()},
        }
        found = rounds_of(commands, ROUNDS[mode])
    return report(found, start_seconds(STARTS[mode]))


def report(found: Mapping[str, Series], starts_s: Sequence[float]) -> Report:
    rows = [series.row(name) for name, series in found.items()]
    rows.append({"command": "whaleflux up, all ready", "wall s": statistics.median(starts_s), "best wall s": min(starts_s),
                 "runs": len(starts_s)})  # fmt: skip
    by_name = {row["command"]: row for row in rows}
    floor = float(by_name['python -c "import grpc"']["CPU s"])
    return Report(
        rows=rows,
        targets=[
            Target("help", by_name["whaleflux --help"]["best wall s"], HELP_S, "s", per="python"),
            Target("status_cpu", by_name["whaleflux status"]["CPU s"], STATUS_CPU_S, "s of CPU", per="python"),
            Target(
                "refused", by_name["whaleflux status, nothing listens"]["best wall s"], REFUSED_S, "s", per="python"
            ),
            Target("up", min(starts_s), UP_S, "s", per="python"),
        ],
        notes=[
            f"status takes {by_name['whaleflux status']['CPU s'] / floor:.1f} times the CPU of importing gRPC alone",
            "help, refused and up are wall time and are read by their best run: neighbours on the host only make it longer",
        ],
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="another tool to measure beside")


if __name__ == "__main__":
    sys.exit(main("cli_latency", measure, add_arguments=_arguments))
