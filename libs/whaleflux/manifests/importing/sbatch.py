"""A script for sbatch (https://slurm.schedmd.com/sbatch.html) as a job file. Pure.

Slurm runs the script once, on the first node, and `srun` in it as often as there are tasks. Here `run` is started once per GPU
or once per node. So what stands around the one `srun` is run by each of them; it is kept where that is the same (variables,
modules, environments, folders) and refused where it is not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

from whaleflux.manifests.importing.draft import GO_ON, Draft, without_shebang
from whaleflux.manifests.importing.sbatch_options import (
    DIRECTIVE,
    FLAGS,
    LONG,
    NOTES,
    READ,
    REFUSED,
    Asked,
    take_options,
    time_limit,
)
from whaleflux.manifests.importing.variables import (
    PER_NODE,
    PER_RANK,
    PER_TASK_OF_A_NODE,
    note_arguments,
    prologue,
    with_meeting_point,
)
from whaleflux.manifests.launchers import find_launcher
from whaleflux.manifests.shell_text import as_command, simple_commands

# What may run in each rank, or on each node, as well as once: it sets or shows, and leaves nothing behind.
_REPEATABLE = frozenset({
    "export", "set", "unset", "shopt", "ulimit", "module", "ml", "source", ".", "conda", "mamba", "micromamba", "eval", "cd", "pushd", "popd", "echo", "printf",
    "date", "hostname", "nvidia-smi", "env", "printenv", "which", "type", "command", "pwd", "true", ":", "test", "[", "[[", "umask", "trap", "wait", "exit", "sleep",
    "declare", "local", "readonly", "typeset", "scontrol", "cat", "head", "tail", "awk", "sed", "tr", "cut", "grep", "wc", "expr", "seq", "basename", "dirname",
    "realpath", "readlink", "return", "whoami", "id", "uname", "free", "df", "lscpu", "ls", "nproc", "python-version", "spack", "mkdir",
})  # fmt: skip
_SRUN = re.compile(
    r"""(?<![\w/-])srun\b((?:[ \t]|\\\n)+(?:'[^']*'|"(?:\\.|[^"\\])*"|\\\n|\\.|\d*>&\d|&>>?|[^\n;&|)#'"\\]|(?<=\S)\#)*)""",
    re.DOTALL,
)


def read(text: str, file: str = "") -> Draft:
    """The draft of a script; Slurm calls a job without a name after its `file`."""
    draft = Draft("a script for sbatch")
    asked = Asked()
    body: list[str] = []
    begun = False  # sbatch reads no options behind the first command
    for line in text.split("\n"):
        begun = begun or (bool(line.strip()) and not line.lstrip().startswith("#"))
        directive = DIRECTIVE.match(line)
        if directive and not begun:
            take_options(draft, asked, _words(draft, directive[1]))
        elif directive:
            draft.note("#SBATCH", f"{directive[1]} stands behind the first command, where sbatch passes over it, too")
        elif not line.startswith("#SBATCH"):
            body.append(line)
    script = with_meeting_point(draft, without_shebang(draft, "\n".join(body)))
    nodes = asked.number(draft, "nodes", default=1)
    gpus = _gpus(draft, asked, nodes)
    note_arguments(draft, script)
    step = _Step.find(draft, script)
    tasks = _tasks_per_node(draft, asked, step, nodes, gpus)
    if "array" in asked.options:
        asked.options.setdefault("job-name", file.partition(".")[0] or "array")
        draft.put(
            "array", re.sub(r"^(\d+)(?=%|$)", r"\1-\1", asked.options["array"])
        )  # 5 alone is one member there, five here
    _fields(draft, asked, nodes, gpus, tasks)
    _step_fields(draft, step)
    _run(draft, asked, script, step, nodes, gpus, tasks)
    return draft


def _words(draft: Draft, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as wrong:
        draft.refuse("#SBATCH", f"{text[:60]!r}: {wrong}")
        return []


def _gpus(draft: Draft, asked: Asked, nodes: int) -> int:
    """GPUs per node; 0 where it asks for none."""
    for name, per_node in (("gpus-per-node", True), ("gres", True), ("gpus", False), ("gpus-per-task", None)):
        if name not in asked.options:
            continue
        kind, count = _gpu_words(draft, name, asked.options[name])
        if count == 0:
            continue
        if kind:
            draft.gpu_types([kind])
        if per_node is None:
            tasks = asked.number(draft, "ntasks", default=0) // nodes or asked.number(
                draft, "ntasks-per-node", default=1
            )
            return count * tasks
        if not per_node and count % nodes:
            draft.refuse("--gpus", f"{count} GPUs cannot be spread evenly over {nodes} nodes")
        return count if per_node else max(1, count // nodes)
    return 0


def _gpu_words(draft: Draft, name: str, text: str) -> tuple[str, int]:
    """(type, number) of `gpu:a100:4`, `a100:4`, `gpu:4`, `4`; other gres are noted."""
    for one in text.split(","):
        parts = one.partition("(")[0].split(":")
        if name == "gres" and parts[0] != "gpu":
            draft.note("--gres", f"{one} has no equivalent")
            continue
        parts = [part for part in parts if part != "gpu"]
        number = parts.pop() if parts and parts[-1].isdigit() else "1"
        return (parts[0] if parts else ""), int(number)
    return "", 0


@dataclass(frozen=True)
class _Step:
    """The one `srun` of a script: where it stands, its options, and what it starts."""

    begin: int
    end: int
    asked: Asked
    command: str

    @staticmethod
    def find(draft: Draft, script: str) -> _Step | None:
        found = [one for one in _SRUN.finditer(script) if not _in_comment(one)]
        if len(found) > 1:
            draft.refuse(
                "srun", f"stands {len(found)} times: a job is one step; submit a job for each, with depends_on"
            )
        if not found:
            return None
        words, rest = _options_of_srun(found[0][1])
        asked = Asked()
        take_options(draft, asked, words)
        return _Step(found[0].start(), found[0].end(), asked, rest)


def _in_comment(found: re.Match[str]) -> bool:
    line = found.string[found.string.rfind("\n", 0, found.start()) + 1 : found.start()]
    return line.lstrip().startswith("#") or bool(re.search(r"\s#\s", line))


def _options_of_srun(text: str) -> tuple[list[str], str]:
    """Options as words, and the text behind them as it stands."""
    words: list[str] = []
    rest = re.sub(r"^(?:[ \t]|\\\n)+", "", text)
    while rest.startswith("-"):
        word = re.match(r"(?:\"[^\"]*\"|'[^']*'|[^\s\"'])+", rest)
        assert word is not None
        words.append(word[0].replace('"', "").replace("'", ""))
        rest = re.sub(r"^(?:[ \t]|\\\n)+", "", rest[word.end() :])
        name = words[-1].lstrip("-")
        takes = "=" not in words[-1] and (
            (words[-1].startswith("--") and name not in FLAGS)
            or (len(words[-1]) == 2 and LONG.get(name, name) not in FLAGS)
        )
        value = re.match(r"(?:\"[^\"]*\"|'[^']*'|[^\s\"'])+", rest)
        if takes and value is not None:
            words.append(value[0].strip("\"'"))
            rest = re.sub(r"^(?:[ \t]|\\\n)+", "", rest[value.end() :])
    return words, rest


def _tasks_per_node(draft: Draft, asked: Asked, step: _Step | None, nodes: int, gpus: int) -> int:
    """How often `srun` starts its command on a node."""
    both = Asked({**asked.options, **(step.asked.options if step else {})})
    if step and step.asked.options.get("nodes", str(nodes)) not in (
        str(nodes),
        "$SLURM_NNODES",
        "$SLURM_JOB_NUM_NODES",
    ):
        draft.refuse("srun --nodes", f"{step.asked.options['nodes']} of the {nodes} nodes: a step runs on all of them")
    for name in ("ntasks-per-node", "ntasks"):
        if both.options.get(name, "").startswith("$"):
            both.options.pop(name)
    if "ntasks-per-node" in both.options:
        return both.number(draft, "ntasks-per-node")
    if "ntasks" in both.options:
        return max(1, both.number(draft, "ntasks") // nodes)
    return (
        gpus
        if "gpus-per-task" in both.options and both.number(draft, "gpus-per-task") == 1 and nodes == 1 and gpus > 1
        else 1
    )


def _fields(draft: Draft, asked: Asked, nodes: int, gpus: int, tasks: int) -> None:
    if "job-name" in asked.options:
        draft.name(asked.options["job-name"], "--job-name")
    ranks = gpus or tasks  # of a node
    draft.gpus(nodes, gpus, tasks)
    for name, value in asked.options.items():
        if name in REFUSED:
            draft.refuse(f"--{name}", REFUSED[name])
        elif NOTES.get(name):
            draft.note(f"--{name}" + (f"={value}" if value else ""), NOTES[name])
        elif name not in NOTES and name not in READ:
            draft.refuse(f"--{name}", "is no option of sbatch that is known here")
    if "time" in asked.options:
        draft.put("time_limit", time_limit(draft, asked.options["time"]))
    if "cpus-per-task" in asked.options:
        draft.put("cpus_per_rank", _whole(asked.number(draft, "cpus-per-task") * tasks / ranks))
    _memory(draft, asked, ranks, tasks)
    for pair in asked.options.get("export", "").split(","):
        name, equal, value = pair.partition("=")
        if equal:
            draft.fields.setdefault("environment", {})[name] = value
    draft.put("retry.max_restarts", 0)
    draft.put("directory", asked.options.get("chdir", "."))
    draft.note(
        "directory",
        "as under Slurm the script runs in the folder it lies in, which all nodes must mount; else write workdir: . instead",
    )


def _step_fields(draft: Draft, step: _Step | None) -> None:
    """What `srun` itself is told."""
    for name, value in (step.asked.options if step else {}).items():
        if name == "container-image":
            draft.put("image", value.replace("#", "/").removeprefix("docker://"))
        elif name.startswith("container-"):
            draft.note(f"srun --{name}", f"{value} is not kept: a container sees its image and the job's folder")
        elif NOTES.get(name):
            draft.note(f"srun --{name}" + (f"={value}" if value else ""), NOTES[name])
        elif name not in (*NOTES, *READ, "mpi"):
            draft.refuse(f"srun --{name}", "is no option of srun that is known here")


def _whole(value: float) -> float:
    return int(value) if value == int(value) else round(value, 3)


def _memory(draft: Draft, asked: Asked, ranks: int, tasks: int) -> None:
    ways: tuple[tuple[str, Callable[[int], float]], ...] = (
        ("mem", lambda mib: mib / ranks),
        ("mem-per-gpu", lambda mib: mib),
        ("mem-per-cpu", lambda mib: mib * asked.number(draft, "cpus-per-task", default=1) * tasks / ranks),
    )
    for name, per_rank in ways:
        if name in asked.options and asked.options[name] not in ("0", "0G", "0M"):
            found = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", asked.options[name], re.IGNORECASE)
            if found is None:
                draft.refuse(f"--{name}", f"{asked.options[name]!r} is no amount of memory")
                return
            mib = int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024 * 1024}[found[2].upper()]
            draft.put("memory_per_rank", f"{max(1, round(per_rank(int(mib))))} MiB")


def _run(draft: Draft, asked: Asked, script: str, step: _Step | None, nodes: int, gpus: int, tasks: int) -> None:
    if step is None and nodes > 1:
        draft.refuse(
            "run",
            f"Slurm runs this script on the first of {nodes} nodes only, and nothing in it (srun) uses the others",
        )
    gpus = gpus or tasks
    if step is not None and tasks not in (1, gpus):
        draft.refuse(
            "--ntasks-per-node",
            f"{tasks} tasks for {gpus} GPUs of a node: a command is started once per GPU, or once per node",
        )
    per_rank = step is not None and tasks == gpus and find_launcher(as_command(step.command)) is None
    if step is not None:
        script, step = _evaluated_once(draft, script, step, nodes * (gpus if per_rank else 1))
        _only_repeatable(draft, script[: step.begin] + script[step.end :], nodes, gpus if per_rank else 1)
        script = f"{script[: step.begin]}{step.command}{script[step.end :]}"
    if not per_rank:
        draft.put("launch", "once")
    if re.search(r"\$\{?SLURM_JOB_?ID\b", script):
        draft.note("SLURM_JOB_ID", "is text here: the name of the job and the number of the attempt")
    copies = nodes * (gpus if per_rank else 1)
    if step is not None and copies > 1 and re.search(r"(?<!2)&?>(?!&)", step.command):
        why = f"is written by each of {copies} copies, where srun collects what they print: leave it out and read `whaleflux logs`"
        draft.note("the file behind > after srun", why)
    if step is not None:
        _mpi(draft, step, nodes * tasks)
    known = PER_RANK if per_rank else PER_TASK_OF_A_NODE if step is not None else PER_NODE
    if re.search(r"(?m)^\s*(?:module|ml)\s", script):
        draft.note(
            "module",
            "needs Environment Modules or Lmod on the nodes, and its function in bash: source their profile before it",
        )
    if re.search(r"\bconda activate\b", script) and "conda" not in re.sub(r"conda activate.*", "", script):
        draft.note(
            "conda activate", 'needs conda on the PATH of the agents, and eval "$(conda shell.bash hook)" before it'
        )
    draft.put(
        "run", f"{GO_ON}\n{prologue(draft, script, known, nodes, _said(asked, nodes, tasks, step is None))}{script}"
    )


def _said(asked: Asked, nodes: int, tasks: int, batch: bool) -> list[tuple[str, str]]:
    """Variables whose values stand in the script itself; those of the one process of a script without a step."""
    names = {"cpus-per-task": "SLURM_CPUS_PER_TASK", "partition": "SLURM_JOB_PARTITION", "job-name": "SLURM_JOB_NAME"}
    said = [(name, shlex.quote(asked.options[option])) for option, name in names.items() if option in asked.options]
    if "array" in asked.options:
        said += [
            ("SLURM_ARRAY_TASK_ID", "$WHALEFLUX_ARRAY_INDEX"),
            ("SLURM_ARRAY_TASK_COUNT", "$WHALEFLUX_ARRAY_SIZE"),
            ("SLURM_ARRAY_JOB_ID", "$WHALEFLUX_ARRAY"),
        ]
    one = [
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NTASKS", str(nodes * tasks)),
        ("SLURM_NPROCS", str(nodes * tasks)),
    ]
    return said + (one if batch else [])


def _mpi(draft: Draft, step: _Step, copies: int) -> None:
    if step.asked.options.get("mpi", "none") not in ("none", "list"):
        draft.refuse(
            "srun --mpi",
            "programs of MPI meet through Slurm's PMI, which is not there; with torchrun's variables they would each be alone",
        )
    elif copies > 1 and not re.match(
        r"(?:\S*/)?(?:python[\d.]*|torchrun|accelerate|bash|sh|uv|conda|\$)(?![\w.])", step.command
    ):
        draft.note(
            "srun",
            "if its program uses MPI, it does not meet the others here: there is no PMI, only torchrun's variables",
        )


_CHANCE = re.compile(
    r"\$RANDOM\b|\$\{RANDOM\}|\$\$|\buuidgen\b|mktemp|/dev/urandom|\$\((?:date|hostname)\b|`(?:date|hostname)\b"
)


def _evaluated_once(draft: Draft, script: str, step: _Step, copies: int) -> tuple[str, _Step]:
    """Slurm expands what stands in the script once; what would differ in each copy is replaced or refused."""
    if copies == 1:
        return script, step
    command = re.sub(r"(--rdzv[-_]id[ =]\"?)\$\{?(?:RANDOM|SLURM_JOB_?ID)\}?", r"\1$PET_RDZV_ID", step.command)
    if command != step.command:
        draft.note("--rdzv-id", "is the same on all nodes of an attempt as $PET_RDZV_ID")
    for line in f"{script[: step.begin]}{command}{script[step.end :]}".split("\n"):
        if (found := _CHANCE.search(line)) and not re.match(r"\s*(?:#|echo\b|printf\b)", line):
            why = f"{found[0]!r} differs in each of {copies} copies, where Slurm expands it once; use $WHALEFLUX_JOB and $WHALEFLUX_EPOCH"
            draft.refuse("run", why)
    return script, replace(step, command=command)


def _only_repeatable(draft: Draft, around: str, nodes: int, ranks: int) -> None:
    """Refuses what stands around the step and may not be done more than once."""
    if nodes * ranks == 1:
        return
    if ">>" in around:
        draft.refuse("run", f"a line outside of srun is appended to a file: here it would be {nodes * ranks} times")
    for words in simple_commands(as_command(around)):
        words = [word for word in words if not re.match(r"[A-Za-z_]\w*\+?=", word)]
        alone = (words[:1] == ["mkdir"] and "-p" not in words) or (words[:1] == ["sed"] and "-i" in words)
        if words and (words[0] not in _REPEATABLE or alone):
            what = f"{' '.join(words)[:60]!r} stands outside of srun: Slurm runs it once, here it would run {nodes * ranks} times"
            draft.refuse("run", f"{what}; put it into `setup` (once per node) or into a job of its own")
