"""Programs that start the processes of a distributed training themselves, and how they are found in a command line. Pure.

WhaleFlux starts one process per GPU. A launcher would start as many again in each of them; where one is wanted all the
same, `launch: once` starts the command once per node.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.manifests.shell_text import simple_commands


@dataclass(frozen=True, slots=True)
class Launcher:
    """One of them. `meets`: its copies on several nodes find one another; those of others reach out by ssh or Slurm."""

    name: str
    meets: bool


_PROGRAMS = {
    "torchrun": True,
    "deepspeed": False,
    "mpirun": False,
    "mpiexec": False,
    "orterun": False,
    "srun": False,
    "horovodrun": False,
}
_MODULES = {
    "torch.distributed.run": True,
    "torch.distributed.launch": True,
    "accelerate.commands.launch": True,
    "accelerate.commands.accelerate_cli": True,
    "deepspeed": False,
    "deepspeed.launcher.runner": False,
}
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=.*", re.DOTALL)
_PYTHON = re.compile(r"(?:pypy|python)[0-9.]*")
# Programs that run another one: options that take a word, and words of their own before the other begins.
_OPTIONS_WITH_WORD = {
    "env": {"-u", "-C", "--unset", "--chdir"},
    "nice": {"-n"},
    "ionice": {"-c", "-n"},
    "stdbuf": {"-i", "-o", "-e"},
    "timeout": {"-s", "-k", "--signal", "--kill-after"},
    "sudo": {"-u", "-g"},
    "numactl": {"-m", "-N", "-C"},
    "taskset": set(),
    "exec": {"-a"},
    "uv": {"--with", "--python", "-p", "--extra", "--group", "--directory", "--project", "--env-file"},
    "conda": {"-n", "-p", "--name", "--prefix", "--cwd"},
    "nsys": {"-o", "-t", "--output", "--trace"},
}
_OPTIONS_WITH_WORD |= dict.fromkeys(("mamba", "micromamba"), _OPTIONS_WITH_WORD["conda"])
_OWN_WORDS = {"timeout": 1, "taskset": 1}
_WRAPPERS = {"env", "nice", "ionice", "stdbuf", "timeout", "sudo", "numactl", "taskset", "exec", "time", "nohup", "setsid", "command",
             "builtin", "catchsegv", "unbuffer"}  # fmt: skip
_RUNNERS = {"uv": "run", "poetry": "run", "pipenv": "run", "pdm": "run", "hatch": "run", "rye": "run", "pixi": "run", "conda": "run",
            "mamba": "run", "micromamba": "run", "nsys": "profile"}  # fmt: skip


_ASKS = {"--version", "--help", "-h"}  # starts nothing
_LOOKS_UP = {"command": {"-v", "-V"}, "sudo": {"-l"}}


def find_launcher(command: Sequence[str]) -> Launcher | None:
    """The first launcher that a command line starts, also in a script or behind `env`, `uv run`, `exec` and the like."""
    return next((found for words in simple_commands(command) if (found := _launcher(list(words)))), None)


def _launcher(words: list[str]) -> Launcher | None:
    words = _unwrapped(words)
    if not words or (len(words) > 1 and words[-1] in _ASKS):
        return None
    program = posixpath.basename(words[0])
    if program.partition(".")[0] in ("mpirun", "mpiexec"):  # mpirun.openmpi, mpiexec.hydra
        program = program.partition(".")[0]
    if program in _PROGRAMS:
        return Launcher(program, _PROGRAMS[program])
    if program == "accelerate" and words[1:2] == ["launch"]:
        return Launcher("accelerate launch", True)
    module = _module(words) if _PYTHON.fullmatch(program) else ""
    return Launcher(f"python -m {module}", _MODULES[module]) if module in _MODULES else None


def _unwrapped(words: list[str]) -> list[str]:
    """Without what stands before the program itself."""
    while words:
        program = posixpath.basename(words[0])
        if _ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        elif words[1:] and words[1] in _LOOKS_UP.get(program, ()):
            return []
        elif program in _WRAPPERS:
            words = _after_options(program, words[1:])
        elif program in _RUNNERS and _RUNNERS[program] in words[1:]:
            words = _after_options(program, words[words.index(_RUNNERS[program], 1) + 1 :])
        else:
            return words
    return words


def _after_options(program: str, words: list[str]) -> list[str]:
    takes = _OPTIONS_WITH_WORD.get(program, set())
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] in takes else words[1:]
    return words[_OWN_WORDS.get(program, 0) :]


def _module(words: list[str]) -> str:
    """MODULE of `python -u -m MODULE`."""
    at = 1
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "-m":
            return words[at + 1] if at + 1 < len(words) else ""
        at += 2 if words[at] in ("-X", "-W") else 1
    return ""
